"""Score pictures that lie on disk with their captions, wherever they come from: real ones, reconstructions, generated.

mdm image_scores pictures/ --clip clip-vit-base-patch16 --output scores.json
mdm image_scores digits/test.parquet --digits digits/train.parquet digits/test.parquet --output real.json
mdm image_scores pictures/ --clip clip --output scores.json --beside real=real.json untrained=untrained.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
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
    others = {name: read_scores(path) for name, path in arguments.beside}
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
    if others:
        print("\n".join(score_table({"these": result, **others})))


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


def read_scores(path: Path) -> dict[str, Any]:
    """What an earlier call wrote; of an image tokenizer's report.json, what a judge said of its reconstructions."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as scores ({' '.join(str(error).split())})") from None
    found = {"digits": values} if isinstance(values, dict) and "digit_accuracy" in values else values
    if not isinstance(found, dict) or not found.keys() & SUMMARIES.keys():
        raise UserError(f"{path}: holds no scores ({', '.join(SUMMARIES)}), as mdm image_scores writes them")
    return found


COLUMNS = {  # heading → where the figure is
    "digit": ("digits", "digit_accuracy"),
    "colour": ("digits", "color_accuracy"),
    "held-out digit": ("digits", "held_out_digit_accuracy"),
    "held-out colour": ("digits", "held_out_color_accuracy"),
    "CLIP score": ("clip", "clip_score"),
    "other captions": ("clip", "shuffled"),
}


def score_table(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """A line of each result, by name, below a heading; a dash where it has no such figure."""
    rows = [["", *COLUMNS]]
    for name, result in results.items():
        figures = [result.get(kind, {}).get(key) for kind, key in COLUMNS.values()]
        rows.append([name, *("–" if figure is None else f"{figure:.3f}" for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FILE")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", nargs="+", help="folders with captions.jsonl, tar or parquet files")
    add("--output", type=Path, required=True, help="the JSON file to write")
    add("--clip", default="", help="folder of a CLIP model of transformers")
    add("--digits", nargs=2, default=(), metavar=("TRAIN", "TEST"), help="real tinted digits: `mdm prepare digits`")
    add(
        "--beside",
        nargs="+",
        default=(),
        type=named_file,
        metavar="NAME=FILE",
        help="earlier results, or the report.json of an image tokenizer, to print in one table with this one",
    )
    add("--caption-field", default="", help="of the records; else caption, prompt or text")
    add("--on-error", choices=ON_ERROR, default="stop", help="at a picture that cannot be read")
    platform.quiet_libraries()
    score(parser.parse_args())
