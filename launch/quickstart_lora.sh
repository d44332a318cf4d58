#!/usr/bin/env bash
# After launch/quickstart.sh: its model learns operators that it has never seen, max and min, by adapters beside its frozen
# weights, and answers as before without them. About 3 minutes on two CPU cores.
#   bash launch/quickstart.sh lora            start from scratch
#   bash launch/quickstart.sh lora --resume   resume after an interruption
# Other arguments are overrides of configs/quickstart_lora.yaml: bash launch/quickstart.sh lora model.lora.rank=8
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment ""

base=runs/quickstart
data=runs/quickstart_lora_data
run=runs/quickstart_lora
read_arguments "$@"
if [ ! -e "$base/evaluation.json" ]; then
    echo "error: $base: holds no evaluated model; run bash launch/quickstart.sh first" >&2
    exit 1
fi

python tools/prepare_data.py arithmetic --kind comparisons --output "$data" --train 8000 --validation 200 --test 500
python launch/torchrun.py --nproc-per-node 2 launch/train.py --config configs/quickstart_lora.yaml "$mode" \
    ${overrides[@]+"${overrides[@]}"}
answer=(--task gsm8k gen_length=16 block_length=8 steps=16 batch_size=64)
evaluate=(python launch/torchrun.py --nproc-per-node 2 launch/evaluate.py --run-dir "$run")
echo "the new problems, without the adapters and with them:"
"${evaluate[@]}" --adapter none --adapter own --data "$data/test.jsonl" "${answer[@]}"
echo "the old problems, without the adapters:"
"${evaluate[@]}" --adapter none --data runs/quickstart_data/test.jsonl "${answer[@]}"
cmp "$run/samples.jsonl" "$base/samples.jsonl"
echo "without the adapters all answers are those that $base gave, bit for bit"
