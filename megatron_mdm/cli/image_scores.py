"""Score pictures that lie on disk with their captions, wherever they come from: real ones, reconstructions, generated.

mdm image_scores pictures/ --clip clip-vit-base-patch16 --output scores.json
mdm image_scores digits/test.parquet --digits digits/train.parquet digits/test.parquet --output real.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_mdm.cli.pictures import Pictures, digits_of, read_pictures
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.data.records import ON_ERROR
from megatron_mdm.evaluation import clip_score, image_scores
from megatron_mdm.evaluation.clip_score import evaluate_clip, load_clip
from megatron_mdm.evaluation.image_scores import RealDigits, digit_scores
from megatron_mdm.images.digits import RESOLUTION, DigitJudge
from megatron_mdm.parallel import platform

Score = Callable[[], dict[str, Any]]


def score(arguments: argparse.Namespace) -> None:
    """Everything but the arguments. All files are read before anything is scored."""
    wanted: list[tuple[str, Score]] = []
    if arguments.clip:
        wanted.append(("clip", _clip(arguments)))
    if arguments.digits:
        wanted.append(("digits", _digits(arguments)))
    if not wanted:
        raise UserError("nothing to score by: give --clip FOLDER, --digits TRAIN TEST, or both")
    result = {name: scored() for name, scored in wanted}
    try:
        write_json(arguments.output, result)
    except OSError as error:
        raise UserError(f"{arguments.output}: cannot be written ({error.strerror})") from None
    for name, values in result.items():
        print("\n".join(SUMMARIES[name](values)))


def _clip(arguments: argparse.Namespace) -> Score:
    clip = load_clip(arguments.clip)
    pictures = _read(arguments, clip.resolution)
    return lambda: evaluate_clip([Image.fromarray(each) for each in pictures.pixels], pictures.captions, clip)


def _digits(arguments: argparse.Namespace) -> Score:
    real = real_digits(arguments.digits, arguments.on_error)
    pictures = _read(arguments, RESOLUTION)
    return lambda: digit_scores(pictures.pixels, pictures.captions, *real)


def real_digits(paths: Sequence[str], on_error: str) -> RealDigits:
    """Of the pictures that were trained on, and of those held out."""
    train, test = (read_pictures([path], RESOLUTION, on_error, needs_captions=False) for path in paths)
    return RealDigits.of(DigitJudge(train.pixels, digits_of(train)), test.pixels)


def _read(arguments: argparse.Namespace, resolution: int) -> Pictures:
    return read_pictures(arguments.input, resolution, arguments.on_error, caption_field=arguments.caption_field)


SUMMARIES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "clip": clip_score.summary,
    "digits": image_scores.summary,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", nargs="+", help="folders with captions.jsonl, tar or parquet files")
    add("--output", type=Path, required=True, help="the JSON file to write")
    add("--clip", default="", help="folder of a CLIP model of transformers")
    add("--digits", nargs=2, default=(), metavar=("TRAIN", "TEST"), help="real tinted digits: `mdm prepare digits`")
    add("--caption-field", default="", help="of the records; else caption, prompt or text")
    add("--on-error", choices=ON_ERROR, default="stop", help="at a picture that cannot be read")
    platform.quiet_libraries()
    score(parser.parse_args())
