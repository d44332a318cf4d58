#!/usr/bin/env bash
# Text to image, end to end, on two CPU cores and without a download: tinted handwritten digits with captions → an image
# tokenizer → codes → P-POTS calibration → training on two data-parallel ranks → pictures of every caption → scores beside those
# of real pictures (what can be reached) and of pictures without guidance and without training. About 4 minutes after installation.
#   bash launch/quickstart.sh images            start from scratch
#   bash launch/quickstart.sh images --resume   resume after an interruption
# Other arguments are overrides of configs/images/digits.yaml: bash launch/quickstart.sh images seed=7 schedule.steps=1500
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment "[images]"

data=runs/quickstart_images_data
run=runs/quickstart_images
read_arguments "$@"
real=("$data/digits/train.parquet" "$data/digits/test.parquet")

make_data() {
    local clip
    rm -rf "$data"
    python tools/prepare_data.py digits --output "$data/digits"
    OMP_NUM_THREADS=1 python tools/train_small_clip.py --images "${real[0]}" --output "$data/clip" --resolution 8 \
        >"$data/clip.log" 2>&1 & # on the second core
    clip=$!
    OMP_NUM_THREADS=1 python tools/train_image_tokenizer.py --images "${real[0]}" --held-out "${real[1]}" \
        --output "$data/tokenizer" --resolution 8 --judge digits --min-psnr 22 --min-accuracy 0.95 |
        sed 's/^digit accuracy of/digits in/'
    python tools/prepare_data.py images "${real[0]}" --image-tokenizer "$data/tokenizer" --resolution 8 \
        --batch-size 256 --output "$data/codes.jsonl"
    python tools/train_tokenizer.py --data "$data/digits/captions.jsonl" --field caption --model-type word \
        --vocab-size 64 --output "$data/captions.model"
    python tools/prepare_data.py task text-to-image "$data/codes.jsonl" --tokenizer "$data/captions.model" \
        --vocabulary behind --samples 0 --test 0 --output "$data/rows"
    wait "$clip" || {
        cat "$data/clip.log" >&2
        return 1
    }
    touch "$data/made"
}

train() { # $@: of launch/train.py
    python launch/torchrun.py --nproc-per-node 2 launch/train.py --config configs/images/digits.yaml "$@"
}

draw() { # $1: run; $2: folder of pictures; others: settings
    python launch/torchrun.py --nproc-per-node 2 launch/generate.py --run-dir "$1" --prompts "$data/digits/captions.jsonl" \
        --output "$2" images_per_caption=5 steps=6 batch_size=75 "${@:3}"
}

score() { # $1: folder of pictures; $2: the file of scores; others: more of tools/score_images.py
    python tools/score_images.py "$1" --clip "$data/clip" --digits "${real[@]}" --output "$2" "${@:3}"
}

quietly() { # $1: a file for what is said; others: the command
    "${@:2}" >"$1" 2>&1 || {
        cat "$1" >&2
        return 1
    }
}

if [ "$mode" = --overwrite ] || [ ! -e "$data/made" ]; then
    make_data
fi
train "$mode" ${overrides[@]+"${overrides[@]}"}
rm -rf "$run/pictures" "$run/unguided" "$run/untrained"
draw "$run" "$run/pictures" cfg_scale=2

echo "pictures without guidance, and of an untrained model, to compare"
mkdir -p "$run/untrained"
quietly "$run/untrained/log.txt" train --overwrite ${overrides[@]+"${overrides[@]}"} \
    checkpoint.directory="$run/untrained/run" schedule.steps=1 schedule.warmup_steps=0 optimizer.lr=1e-12 diffusion.t_sampler=uniform \
    evaluation.every=0 image.preview=
quietly "$run/untrained/log.txt" draw "$run/untrained/run" "$run/untrained/pictures" cfg_scale=2
quietly "$run/untrained/log.txt" draw "$run" "$run/unguided" cfg_scale=0
beside=("real pictures=$run/real.json" "reconstructions=$data/tokenizer/report.json")
beside+=("no guidance=$run/unguided.json" "untrained=$run/untrained.json")
quietly "$run/untrained/log.txt" score "${real[1]}" "$run/real.json"
quietly "$run/untrained/log.txt" score "$run/unguided" "$run/unguided.json"
quietly "$run/untrained/log.txt" score "$run/untrained/pictures" "$run/untrained.json"
score "$run/pictures" "$run/scores.json" --beside "${beside[@]}"
echo "pictures: $run/pictures, all on one page: $run/pictures/sheet.png"
