#!/usr/bin/env bash
# The small study, end to end, on two CPU cores and without a download: data of four kinds of tasks → an autoregressive base
# model, and a masked one that continues it on the same mix; beside them a base for text to image → all runs, their tables,
# pictures and verdicts. Interrupted anywhere, the same command goes on.
#   bash launch/study.sh            everything
#   bash launch/study.sh bases      data and bases only
#   bash launch/study.sh --dry-run  after the bases: runs, hours and disk; further arguments are those of `mdm study`
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment "[images]"

data=runs/study_data
images=$data/images
export OMP_NUM_THREADS=1

make_texts() {
    python tools/prepare_data.py study --output "$data"
    touch "$data/made"
}

make_images() {
    rm -rf "$images"
    python tools/prepare_data.py digits --output "$images/digits"
    python tools/train_small_clip.py --images "$images/digits/train.parquet" --output "$images/clip" --resolution 8
    python tools/train_image_tokenizer.py --images "$images/digits/train.parquet" --held-out "$images/digits/test.parquet" \
        --output "$images/tokenizer" --resolution 8 --judge digits --min-psnr 22 --min-accuracy 0.95
    python tools/prepare_data.py images "$images/digits/train.parquet" --image-tokenizer "$images/tokenizer" --resolution 8 \
        --batch-size 256 --output "$images/codes.jsonl"
    python tools/train_tokenizer.py --data "$images/digits/captions.jsonl" --field caption --model-type word --vocab-size 64 \
        --output "$images/captions.model"
    for rows in "rows 0" "few 1422"; do
        read -r name samples <<<"$rows"
        python tools/prepare_data.py task text-to-image "$images/codes.jsonl" --tokenizer "$images/captions.model" \
            --vocabulary behind --samples "$samples" --test 0 --output "$images/$name"
    done
    touch "$images/made"
}

base() { # $1: of configs/study/base_$1.yaml; a base that is there is left alone, one that was interrupted resumes
    if ! grep -qs '"stopped_early": ""' "runs/study_base/$1/summary.json"; then
        mkdir -p runs/study_base
        python launch/train.py --config "configs/study/base_$1.yaml" --resume >>"runs/study_base/$1.log" 2>&1 || {
            tail -n 5 "runs/study_base/$1.log" >&2
            return 1
        }
    fi
    echo "base: runs/study_base/$1"
}

[ -e "$data/made" ] || make_texts
{
    base autoregressive
    base masked
} &
texts=$!
{
    [ -e "$images/made" ] || make_images >"$data/images.log" 2>&1
    base images
} &
others=$!
wait "$texts"
wait "$others"
if [ "${1:-}" != bases ]; then
    python tools/study.py study/small "$@"
fi
