"""`mdm prepare digits`: pictures with captions without a download."""

from __future__ import annotations

import argparse
import json

from PIL import Image

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.captioned import write_captioned
from megatron_mdm.images.digits import COLORS, DIGITS, HELD_OUT_PAIRS, TintedDigit, caption, load_digits, tinted
from megatron_mdm.images.pixels import to_png
from megatron_mdm.images.sheet import sheet

_NUM_SHOWN = 60


def write_digits(arguments: argparse.Namespace) -> None:
    """train.parquet (without the held-out pairs), test.parquet (all pairs), captions.jsonl (each once), preview.png."""
    train, test = load_digits(arguments.seed)
    folder = arguments.output
    sets = {
        "train": list(tinted(train, without_held_out_pairs=True)),
        "test": list(tinted(test, without_held_out_pairs=False)),
    }
    captions = [
        {"caption": caption(digit, color), "digit": digit, "color": color, "held_out": (digit, color) in HELD_OUT_PAIRS}
        for digit in range(len(DIGITS))
        for color in COLORS
    ]
    try:
        for name, pictures in sets.items():
            path = folder / f"{name}.parquet"
            write_captioned(path, [(to_png(Image.fromarray(picture.pixels)), _record(picture)) for picture in pictures])
            print(f"{path}: {len(pictures):,} pictures")
        write_atomically(folder / "captions.jsonl", "".join(json.dumps(line) + "\n" for line in captions))
        shown = sets["train"][:_NUM_SHOWN]
        page = sheet([Image.fromarray(picture.pixels) for picture in shown], [picture.caption for picture in shown])
        write_atomically(folder / "preview.png", to_png(page))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


def _record(picture: TintedDigit) -> dict[str, object]:
    return {"caption": picture.caption, "digit": picture.digit, "color": picture.color}
