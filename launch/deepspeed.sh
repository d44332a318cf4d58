#!/usr/bin/env bash
# Train with DeepSpeed's launcher, which starts the other nodes itself by ssh: one command on one node.
#   HOSTFILE=hosts MASTER_ADDR=node0 bash launch/deepspeed.sh --config my.yaml parallel.tensor=8
# HOSTFILE: lines "name slots=8"; without it, this node. RANKS_PER_NODE (the GPUs, or each host's slots), MASTER_ADDR,
# MASTER_PORT (29400; without HOSTFILE any that is free), INTERFACE. The nodes need the same paths. A rank that dies ends
# the job; resume with --resume. Variables for torch, NCCL, CUDA, OpenMP, Hugging Face and this project go to all nodes.
# SIGTERM and SIGUSR1 go to this node's ranks as SIGUSR1: all ranks save and end.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
activate_environment

forward_variables() { # its launcher passes on NCCL's, paths and what a file names: this one, beside the user's own
    variables=$(mktemp)
    trap 'rm -f "$variables"' EXIT
    {
        env | grep -E '^(CUDA_DEVICE_|DS_|GLOO_|HF_|INTERFACE=|MDM_|OMP_|PYTORCH_|TORCH_)'
        grep -hs = ~/.deepspeed_env .deepspeed_env
    } >"$variables"
    export DS_ENV_FILE="$variables"
}

launcher=(--no_local_rank)
[ -n "${MASTER_ADDR:-}" ] && launcher+=(--master_addr "$MASTER_ADDR")
if [ -n "${HOSTFILE:-}" ]; then
    [ -n "${DS_ENV_FILE:-}" ] || forward_variables
    launcher+=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29400}")
    [ -n "${RANKS_PER_NODE:-}" ] && launcher+=(--num_gpus "$RANKS_PER_NODE")
else
    launcher+=(--hostfile /dev/null --master_port "${MASTER_PORT:-$(free_port)}")
    read -ra devices <<<"$(visible_devices)"
    if [ "${#devices[@]}" -gt 0 ]; then # the launcher would number them from 0, whatever CUDA_VISIBLE_DEVICES says
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cuda}"
        ranks=${RANKS_PER_NODE:-${#devices[@]}}
        if [ "$ranks" -gt "${#devices[@]}" ] || [[ ${CUDA_VISIBLE_DEVICES:-} == MIG-* ]]; then
            echo "error: $ranks ranks on ${#devices[@]} GPUs (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-}) are more than" \
                "DeepSpeed's launcher can place; set RANKS_PER_NODE, or use launch/torchrun.sh" >&2
            exit 1
        fi
        launcher+=(--include "localhost:$(IFS=, && echo "${devices[*]:0:ranks}")")
    else
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
        launcher+=(--num_gpus "${RANKS_PER_NODE:-1}")
    fi
fi

deepspeed "${launcher[@]}" "$root/launch/train.py" "$@" &
child=$!
# The ranks run launch/train.py below the launcher's own processes, whose command lines name it, too.
trap 'pkill -USR1 -g 0 -f "^[^ ]*python[^ ]* -u [^ ]*launch/train.py"' TERM USR1
await_child "$child"
code=$?
exit "$code"
