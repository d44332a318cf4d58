"""Score pictures that lie on disk with their captions, wherever they come from: real ones, reconstructions, generated.

mdm image_scores pictures/ --clip clip-vit-base-patch16 --output scores.json
mdm image_scores digits/test.parquet --digits digits/train.parquet digits/test.parquet --output real.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_mdm.cli.pictures import Pictures, digits_of, read_pictures
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.data.records import ON_ERROR
from megatron_mdm.evaluation.clip_score import evaluate_clip, load_clip
from megatron_mdm.evaluation.image_scores import digit_scores
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
    train, test = (
        read_pictures([path], RESOLUTION, arguments.on_error, needs_captions=False) for path in arguments.digits
    )
    pictures = _read(arguments, RESOLUTION)
    judge = DigitJudge(train.pixels, digits_of(train))
    return lambda: digit_scores(pictures.pixels, pictures.captions, judge, judge(test.pixels).distance)


def _read(arguments: argparse.Namespace, resolution: int) -> Pictures:
    return read_pictures(arguments.input, resolution, arguments.on_error, caption_field=arguments.caption_field)


def _clip_summary(result: dict[str, Any]) -> list[str]:
    error = result["standard_error"]
    return [
        f"CLIP score: {result['clip_score']:.2f}",
        f"standard error {error if error is None else f'{error:.2f}'}, with other captions {result['shuffled']:.2f}; "
        f"own caption first of {result['num_captions']}: {result['recall_at_1']:.3f}; {result['num_images']} pictures, "
        f"{result['num_cut']} captions cut; by {result['clip']['name']}",
    ]


def _digits_summary(result: dict[str, Any]) -> list[str]:
    low, high = result["digit_interval"]
    lines = [
        f"digit accuracy: {result['digit_accuracy']:.2f}",
        f"95 % interval {low:.3f} to {high:.3f}; colour accuracy {result['color_accuracy']:.3f}; "
        f"{result['num_images']} pictures, {result['num_digits_seen']} digits seen",
    ]
    if result["num_held_out"]:
        lines.append(
            f"of pairs that no training picture shows: digit {result['held_out_digit_accuracy']:.3f}, colour "
            f"{result['held_out_color_accuracy']:.3f}, {result['num_held_out']} pictures"
        )
    return lines


SUMMARIES: dict[str, Callable[[dict[str, Any]], list[str]]] = {"clip": _clip_summary, "digits": _digits_summary}


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
