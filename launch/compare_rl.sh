#!/usr/bin/env bash
# Methods of reinforcement learning compared: after `bash launch/quickstart.sh rl`, each of configs/rl/compare/ continues its start
# with seeds 42, 731 and 20231 and equal forward passes, one run on each core, and answers the 2,000 test questions.
# About an hour and a half on two cores. Interrupted, the same command goes on.
#   bash launch/compare_rl.sh                  all
#   bash launch/compare_rl.sh espo coupled_grpo   some
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment ""

data=runs/quickstart_rl_data
start=$(cat runs/quickstart_rl_start/chosen)
runs=runs/compare_rl
names=("$@")
[ $# -gt 0 ] || names=(diffu_grpo unigrpo unigrpo_two_rows unigrpo_ppots_mirror coupled_grpo espo)
export OMP_NUM_THREADS=1
mkdir -p "$runs"

one() { # $1: name of a configuration, $2: seed
    local run=$runs/$1-$2
    if [ ! -e "$run/evaluation.json" ]; then
        {
            python launch/train.py --config "configs/rl/compare/$1.yaml" --resume "seed=$2" "checkpoint.directory=$run" \
                "model.init_from=$start" &&
                python launch/evaluate.py --run-dir "$run" --data "$data/test.jsonl" --task gsm8k gen_length=16 \
                    block_length=8 steps=16 batch_size=64
        } >"$run.log" 2>&1 || {
            echo "$run: failed; the end of $run.log:" >&2
            tail -n 3 "$run.log" >&2
            return 1
        }
    fi
    echo "$run: $(grep -h "exact match" "$run.log" | tail -n 1)"
}
export -f one
export runs start data

for seed in 42 731 20231; do
    printf "%s $seed\n" "${names[@]}"
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 bash -c 'one "$@"' _
python tools/report.py runs "$runs" --output "$runs/scores"
