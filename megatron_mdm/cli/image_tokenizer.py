"""Train a small image tokenizer (MAGVIT-v2's classes) on pictures: a folder, tar shards, parquet.

mdm image_tokenizer --images digits/train.parquet --held-out digits/test.parquet --output tokenizer --resolution 8

Writes config.json, model.safetensors, reconstructions.png (pictures it has not seen, each above its reconstruction) and
report.json. One process, on one GPU where there is one; it does not resume: small tokenizers take a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megatron_mdm.cli.numbers import above_zero, whole
from megatron_mdm.cli.pictures import Pictures, digits_of, read_pictures
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically, write_json
from megatron_mdm.data.records import ON_ERROR
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.images.digits import Bytes, DigitJudge
from megatron_mdm.images.pixels import to_png
from megatron_mdm.images.sheet import sheet
from megatron_mdm.images.tokenizer import ImageTokenizer, save_tokenizer
from megatron_mdm.images.train import (
    Progress,
    TrainingSettings,
    code_statistics,
    psnr,
    reconstruct,
    small_config,
    train,
)
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.progress import progress_bar

_HELD_OUT = 10  # of so many pictures, one is held out
_MOST_HELD_OUT = 1000
_NUM_SHOWN = 16
_BATCH_SIZE = 64  # of reconstructions


def train_tokenizer(arguments: argparse.Namespace) -> None:
    """Everything but the arguments."""
    training, held_out = _pictures(arguments)
    config = small_config(arguments.channels, arguments.down, arguments.blocks, arguments.bits)
    if arguments.resolution % config.down:
        raise UserError(f"--resolution {arguments.resolution} is not a multiple of 2^--down = {config.down}")
    judge = JUDGES[arguments.judge]
    judge(training, held_out, held_out.pixels)  # so that a missing field shows before the training
    settings = TrainingSettings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        commitment=arguments.commitment,
        entropy=arguments.entropy,
        seed=arguments.seed,
    )
    device = platform.device()
    begin = time.perf_counter()
    with progress_bar(total=settings.steps, desc="train", unit="step") as bar:

        def report(progress: Progress) -> None:
            bar.set_postfix(error=f"{progress.error:.4f}", entropy=f"{progress.entropy:.2f}", refresh=False)
            bar.update()

        tokenizer = train(config, torch.from_numpy(training.pixels), settings, device, report)
    seconds = time.perf_counter() - begin
    real = torch.from_numpy(held_out.pixels)
    shown = reconstruct(tokenizer, real, device, _BATCH_SIZE)
    result = {
        "psnr": psnr(real, shown.pixels),
        **judge(training, held_out, shown.pixels.numpy()),
        "codes": code_statistics(shown.codes, tokenizer.num_codes),
        "num_training": len(training.pixels),
        "num_held_out": len(held_out.pixels),
        "tokens_per_picture": shown.codes.shape[1],
        "num_parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "seconds": round(seconds, 1),
        "fingerprint": tokenizer.fingerprint(),
        "resolution": arguments.resolution,
        "settings": asdict(settings),
    }
    _write(arguments.output, tokenizer, real, shown.pixels, result)
    _check_gates(arguments, result)


def _pictures(arguments: argparse.Namespace) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures."""
    everything = _read(arguments.images, arguments)
    if arguments.held_out:
        return everything, _read(arguments.held_out, arguments)
    order = stream(arguments.seed, Purpose.SPLIT).permutation(len(everything.pixels))
    size = min(len(order) // _HELD_OUT, _MOST_HELD_OUT)
    if not size:
        raise UserError(f"{len(order)} pictures are too few to hold out one in {_HELD_OUT}; name some with --held-out")
    return _part(everything, order[size:]), _part(everything, order[:size])


def _read(paths: Sequence[str], arguments: argparse.Namespace) -> Pictures:
    return read_pictures(paths, arguments.resolution, arguments.on_error, needs_captions=False)


def _part(pictures: Pictures, rows: NDArray[np.int64]) -> Pictures:
    return Pictures(
        pictures.pixels[rows],
        [pictures.captions[row] for row in rows],
        [pictures.fields[row] for row in rows],
    )


def _write(folder: Path, tokenizer: ImageTokenizer, real: Tensor, shown: Tensor, result: dict[str, Any]) -> None:
    columns = min(_NUM_SHOWN, len(real))
    every = np.linspace(0, len(real) - 1, columns).astype(int)
    pairs = [Image.fromarray(pixels[row].numpy()) for pixels in (real, shown) for row in every]
    captions = ["real"] * columns + [f"{psnr(real[row], shown[row]):.1f} dB" for row in every]
    try:
        save_tokenizer(tokenizer, folder)
        write_atomically(folder / "reconstructions.png", to_png(sheet(pairs, captions, columns)))
        write_json(folder / "report.json", result)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None
    codes = result["codes"]
    print(f"image tokenizer: {folder}")
    print(f"held-out PSNR: {result['psnr']:.2f} dB; {codes['used']} of {codes['of']} codes used")
    if "digit_accuracy" in result:
        print(f"digit accuracy of reconstructions: {result['digit_accuracy']:.3f}")


def _check_gates(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    gates = (("psnr", "--min-psnr", arguments.min_psnr), ("digit_accuracy", "--min-accuracy", arguments.min_accuracy))
    for name, option, least in gates:
        if least and result.get(name, 0.0) < least:
            raise UserError(
                f"{name.replace('_', ' ')} {result.get(name, 0.0):.3f} is below {option} {least:g}: give more --steps, "
                f"--bits or --channels; what was trained is in {arguments.output}"
            )


def _judge_digits(training: Pictures, held_out: Pictures, shown: Bytes) -> dict[str, Any]:
    """Accuracies of a nearest-neighbour classifier of the real training pictures, on pictures of the held-out ones."""
    verdict = DigitJudge(training.pixels, digits_of(training))(shown)
    colors = [fields.get("color") == color for fields, color in zip(held_out.fields, verdict.color)]
    return {
        "digit_accuracy": float((verdict.digit == digits_of(held_out)).mean()),
        "color_accuracy": float(np.mean(colors)),
    }


# by --judge: (training, held-out, their reconstructions) → what is measured besides
JUDGES: dict[str, Callable[[Pictures, Pictures, Bytes], dict[str, Any]]] = {
    "none": lambda training, held_out, shown: {},
    "digits": _judge_digits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", nargs="+", required=True, help="folders, tar or parquet files of pictures")
    add("--held-out", nargs="+", default=[], help="those that quality is measured on; else one in ten, at most 1,000")
    add("--output", type=Path, required=True, help="the folder to write")
    add("--resolution", type=whole(1, 4096), required=True, help="pixels of a picture's side")
    add("--down", type=whole(0, 8), default=1, help="halvings of the side: a token is 2^N × 2^N pixels")
    add("--bits", type=whole(1, 24), default=8, help="of a code: 2^N codes")
    add("--channels", type=whole(1, 1024), default=16, help="of the first level; they double with each halving")
    add("--blocks", type=whole(1, 16), default=1, help="residual blocks a level")
    add("--steps", type=whole(1, 10**8), default=900)
    add("--batch-size", type=whole(1, 10**5), default=64)
    add("--lr", type=above_zero, default=5e-3, help="peak; it warms up and falls to 0 by a cosine")
    add("--commitment", type=float, default=0.025, help="weight of (sign z − z)² beside the pixels' squared error")
    add("--entropy", type=float, default=0.02, help="weight of E[H(bit)] − H(E[bit])")
    add("--judge", choices=JUDGES, default="none", help="what to measure besides PSNR")
    add("--min-psnr", type=float, default=0.0, help="dB on held-out pictures; below, exit code 1")
    add("--min-accuracy", type=float, default=0.0, help="--judge digits: of reconstructions; below, exit code 1")
    add("--on-error", choices=ON_ERROR, default="stop", help="at a picture that cannot be read")
    add("--seed", type=whole(0, 2**63), default=0)
    platform.quiet_libraries()
    train_tokenizer(parser.parse_args())
