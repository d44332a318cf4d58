"""Train a small CLIP on small pictures with few captions, such as the digits: what scores the images quickstart.

mdm small_clip --images digits/train.parquet --output clip --resolution 8

Writes a folder as transformers saves a CLIP. Half a minute on a CPU for the digits; its scores say nothing beside those
of a public CLIP.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mdm.cli.numbers import above_zero, whole
from megatron_mdm.cli.pictures import read_pictures
from megatron_mdm.config.errors import UserError
from megatron_mdm.data.records import ON_ERROR
from megatron_mdm.evaluation.small_clip import SmallClipSettings, train_small_clip
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.progress import progress_bar


def train(arguments: argparse.Namespace) -> None:
    """Everything but the arguments."""
    pictures = read_pictures(arguments.images, arguments.resolution, arguments.on_error)
    settings = SmallClipSettings(
        patch=arguments.patch,
        steps=arguments.steps,
        lr=arguments.lr,
        vocabulary=arguments.vocabulary,
        seed=arguments.seed,
    )
    with progress_bar(total=settings.steps, desc="train", unit="step") as bar:

        def report(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        try:
            train_small_clip(pictures.pixels, pictures.captions, arguments.output, settings, report)
        except OSError as error:
            raise UserError(f"{arguments.output}: cannot be written ({error.strerror})") from None
    print(f"CLIP: {arguments.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", nargs="+", required=True, help="folders, tar or parquet files of pictures with captions")
    add("--output", type=Path, required=True, help="the folder to write")
    add("--resolution", type=whole(1, 1024), required=True, help="pixels of a picture's side")
    add("--patch", type=whole(1, 64), default=2, help="pixels of a patch's side")
    add("--steps", type=whole(1, 10**6), default=500)
    add("--lr", type=above_zero, default=1e-3, help="peak; it warms up and falls to 0 by a cosine")
    add("--vocabulary", type=whole(300, 49_406), default=600, help="tokens of captions at most; 256 are bytes")
    add("--on-error", choices=ON_ERROR, default="stop", help="at a picture that cannot be read")
    add("--seed", type=whole(0, 2**63), default=0)
    platform.quiet_libraries()
    train(parser.parse_args())
