#!/usr/bin/env bash
# Reinforcement learning, end to end, on two CPU cores: a model of word problems, stopped early, answers its training questions,
# several times each, and learns from which answers are right. At most 10 minutes after installation.
#   bash launch/quickstart.sh rl             start from scratch
#   bash launch/quickstart.sh rl --resume    resume after an interruption
#   bash launch/quickstart.sh rl --control   afterwards: the same with rewards that are shuffled, from which nothing can be learnt
# Other arguments are overrides of configs/rl/arithmetic.yaml: bash launch/quickstart.sh rl seed=7 rl.num_iterations=4
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment ""

data=runs/quickstart_rl_data
start=runs/quickstart_rl_start
run=runs/quickstart_rl
given=()
for argument in "$@"; do
    if [ "$argument" = --control ]; then
        given+=("rl.rewards=[{name: tests/rl/shuffled.py:exact_match}]" checkpoint.directory=runs/quickstart_rl_control)
    else
        given+=("$argument")
    fi
done
read_arguments ${given[@]+"${given[@]}"}
launch=(python launch/torchrun.py --nproc-per-node 2)
answer=(--task gsm8k gen_length=16 block_length=8 steps=16 batch_size=64)

if [ "$mode" = --overwrite ] && [ "$run" != runs/quickstart_rl_control ]; then
    rm -f "$start/chosen"
fi
if [ ! -e "$start/chosen" ]; then
    python tools/prepare_data.py arithmetic --output "$data" --train 60000 --validation 500 --test 2000
    python tools/train_tokenizer.py --data "$data/train.jsonl" --output "$data/tokenizer.model" \
        --model-type bpe --vocab-size 384 --whole-numbers 16
    "${launch[@]}" launch/train.py --config configs/rl/arithmetic_sft.yaml --overwrite
    # The first checkpoint that answers half of the validation questions rightly, or the last.
    for step in 400 500 600; do
        checkpoint=$start/checkpoints/step-00000$step
        "${launch[@]}" launch/evaluate.py --run-dir "$start" --checkpoint "$step" --data "$data/validation.jsonl" \
            --limit 300 "${answer[@]}" | grep "exact match"
        if python -c "import json, sys; sys.exit(json.load(open('$start/evaluation.json'))['exact_match'] < 0.5)"; then
            break
        fi
    done
    echo "the model to start from: $checkpoint"
    "${launch[@]}" launch/evaluate.py --run-dir "$start" --checkpoint "$step" --data "$data/test.jsonl" "${answer[@]}"
    echo "$checkpoint" > "$start/chosen"
fi
"${launch[@]}" launch/train.py --config configs/rl/arithmetic.yaml $mode "model.init_from=$(cat "$start/chosen")" \
    ${overrides[@]+"${overrides[@]}"}
"${launch[@]}" launch/evaluate.py --run-dir "$run" --data "$data/test.jsonl" "${answer[@]}"
echo "before and after, on questions that neither training has seen:"
python tools/report.py pair "$start" "$run" --run "$run" --output "$run/gain"
echo "all figures: $run/gain.json; $SECONDS seconds"
