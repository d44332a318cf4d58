#!/usr/bin/env bash
# Train on one node or many: the same command on every node, with the arguments of launch/train.py.
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh --config my.yaml parallel.tensor=8
# NODES (1), NODE_RANK (0; Slurm's, where it started this), RANKS_PER_NODE (the GPUs), MASTER_ADDR (127.0.0.1: node 0),
# MASTER_PORT (29400; on one node any that is free), RUN_ID (mdm), LOCAL_ADDR (this node's address, where its name does
# not tell), INTERFACE, MAX_RESTARTS (3) after a rank or a node has died. A user's mistake is not tried again.
# Another try resumes a run that the one before has begun; else it starts as the first was told to.
# SIGTERM and SIGUSR1 go to the ranks as SIGUSR1: they save, and this ends with 0.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
activate_environment

nodes=${NODES:-1}
node=${NODE_RANK:-${SLURM_NODEID:-0}}
restarts_left=${MAX_RESTARTS:-3}
try_again=75 # launch/torchrun.py's exit code where a rank died for no fault of the user's
launcher=(--nnodes "$nodes" --nproc-per-node "${RANKS_PER_NODE:-$(count_devices)}" --max-restarts 0)
if [ "$nodes" != 1 ] || [ -n "${MASTER_ADDR:-}${MASTER_PORT:-}" ]; then # else launch/torchrun.py finds a place
    port=${MASTER_PORT:-$([ "$nodes" = 1 ] && echo 0 || echo 29400)}
    launcher+=(--node-rank "$node" --rdzv-backend c10d --rdzv-id "${RUN_ID:-mdm}"
        --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:$port"
        --rdzv-conf "is_host=$([ "$node" = 0 ] && echo true || echo false)")
fi
[ -n "${LOCAL_ADDR:-}" ] && launcher+=(--local-addr "$LOCAL_ADDR")
export MDM_LAUNCH_ID="${MDM_LAUNCH_ID:-$HOSTNAME-$$-$(date +%s)}" # by which a try knows what the one before began
child="" stopping=""

stop() {
    stopping=1
    [ -n "$child" ] && pkill -USR1 -P "$child" # its ranks; the launcher itself would give them 30 s only
}
trap stop TERM USR1

while true; do
    python "$root/launch/torchrun.py" "${launcher[@]}" "$root/launch/train.py" "$@" &
    child=$!
    await_child "$child"
    code=$?
    if [ "$code" != "$try_again" ] || [ -n "$stopping" ] || [ "$restarts_left" -le 0 ]; then
        exit "$code"
    fi
    restarts_left=$((restarts_left - 1))
    echo "node $node: trying again ($restarts_left more times), from the newest checkpoint where the run has begun" >&2
    sleep "${RESTART_SECONDS:-5}" # the other nodes' launchers end, too
done
