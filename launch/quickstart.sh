#!/usr/bin/env bash
# The main job, end to end, on two CPU cores: generated word problems → tokenizer → P-POTS calibration → training on two
# data-parallel ranks → answers → score. About 5 minutes after installation.
#   bash launch/quickstart.sh            start from scratch
#   bash launch/quickstart.sh --resume   resume after an interruption
#   bash launch/quickstart.sh lora       afterwards: the model learns further operators by adapters (quickstart_lora.sh)
#   bash launch/quickstart.sh images     instead: text to image, from handwritten digits to pictures (quickstart_images.sh)
#   bash launch/quickstart.sh rl         instead: reinforcement learning with exact match as the reward (quickstart_rl.sh)
# Other arguments are overrides of configs/quickstart.yaml: bash launch/quickstart.sh seed=7 optimizer.lr=5e-4
set -euo pipefail
if [[ "${1:-}" == lora || "${1:-}" == images || "${1:-}" == rl ]]; then
    exec bash "$(dirname "$0")/quickstart_$1.sh" "${@:2}"
fi
source "$(dirname "$0")/environment.sh"
prepare_environment ""

data=runs/quickstart_data
run=runs/quickstart
read_arguments "$@"

if [ "$mode" = --overwrite ] || [ ! -e "$data/tokenizer.model" ]; then
    python tools/prepare_data.py arithmetic --output "$data" --train 60000 --validation 500 --test 500
    python tools/train_tokenizer.py --data "$data/train.jsonl" --output "$data/tokenizer.model" \
        --model-type bpe --vocab-size 384 --whole-numbers 16
fi
python launch/torchrun.py --nproc-per-node 2 launch/train.py --config configs/quickstart.yaml "$mode" \
    ${overrides[@]+"${overrides[@]}"}
python launch/torchrun.py --nproc-per-node 2 launch/evaluate.py --run-dir "$run" --data "$data/test.jsonl" \
    --task gsm8k gen_length=16 block_length=8 steps=16 batch_size=64
python tools/report.py run "$run"
