#!/usr/bin/env bash
# Train with DeepSpeed's launcher, which starts the other nodes itself by ssh: one command on one node.
#   HOSTFILE=hosts MASTER_ADDR=node0 bash launch/deepspeed.sh --config my.yaml parallel.tensor=8
# HOSTFILE: lines "name slots=8"; without it, this node. RANKS_PER_NODE (the GPUs, or each host's slots), MASTER_ADDR,
# MASTER_PORT (29400), INTERFACE. The nodes need the same paths. A rank that dies ends the job; go on with --resume.
# SIGTERM and SIGUSR1 go to this node's ranks as SIGUSR1: all ranks save and end.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
activate_environment

launcher=(--no_local_rank --master_port "${MASTER_PORT:-29400}")
[ -n "${MASTER_ADDR:-}" ] && launcher+=(--master_addr "$MASTER_ADDR")
if [ -n "${HOSTFILE:-}" ]; then
    launcher+=(--hostfile "$HOSTFILE")
    [ -n "${RANKS_PER_NODE:-}" ] && launcher+=(--num_gpus "$RANKS_PER_NODE")
else
    export DS_ACCELERATOR="${DS_ACCELERATOR:-$(nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)}"
    launcher+=(--hostfile /dev/null --num_gpus "${RANKS_PER_NODE:-$(count_devices)}")
fi

deepspeed "${launcher[@]}" "$root/launch/train.py" "$@" &
child=$!
# The ranks run launch/train.py below the launcher's own processes, whose command lines name it, too.
trap 'pkill -USR1 -g 0 -f "^[^ ]*python[^ ]* -u [^ ]*launch/train.py"' TERM USR1
await_child "$child"
code=$?
exit "$code"
