"""tools/train_image_tokenizer.py on the digits: what it writes, its gate, its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mdm.data.captioned import write_captioned
from megatron_mdm.images.digits import load_digits, tinted
from megatron_mdm.images.pixels import to_png
from megatron_mdm.images.tokenizer import load_tokenizer
from megatron_mdm.images.train import TrainingSettings, psnr, reconstruct, small_config, train
from tests.ranks import ProgramResult, run_program_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "some.parquet"
    pictures = [picture for picture, _ in zip(tinted(load_digits(0)[0], without_held_out_pairs=True), range(600))]
    records: list[dict[str, Any]] = [{"digit": picture.digit, "color": picture.color} for picture in pictures]
    write_captioned(path, [(to_png(Image.fromarray(p.pixels)), record) for p, record in zip(pictures, records)])
    return path


def trained(images: Path | str, output: Path, *arguments: str) -> ProgramResult:
    program = ["--images", str(images), "--output", str(output), "--resolution", "8", "--channels", "8"]
    return run_program_ranks("tools/train_image_tokenizer.py", [*program, *arguments])[0]


def test_what_training_writes_and_its_gate(digits: Path, tmp_path: Path) -> None:
    """The tokenizer is kept where it misses the gate."""
    result = trained(digits, tmp_path, "--steps", "60", "--batch-size", "24", "--judge", "digits", "--min-psnr", "60")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith(
        f"is below --min-psnr 60: give more --steps, --bits or --channels; what was trained is in {tmp_path}"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_training"], report["num_held_out"], report["tokens_per_picture"]) == (540, 60, 16)
    assert report["psnr"] > 11.0  # black alone has 9.3 dB
    assert 0.0 <= report["digit_accuracy"] <= 1.0
    assert report["color_accuracy"] > 0.1  # after so few steps; both are in the report
    assert f"held-out PSNR: {report['psnr']:.2f} dB" in result.stdout
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.fingerprint() == report["fingerprint"]
    assert (tokenizer.num_codes, tokenizer.down) == (256, 2)
    assert Image.open(tmp_path / "reconstructions.png").size == (16 * 136 + 8, 2 * (128 + 18 + 8) + 8)


def test_the_same_seed_trains_the_same_tokenizer() -> None:
    pixels = torch.from_numpy(np.stack([p.pixels for p in tinted(load_digits(0)[1], without_held_out_pairs=False)]))
    config = small_config(channels=8, halvings=1, blocks=1, bits=6)

    def fingerprint(seed: int) -> str:
        settings = TrainingSettings(steps=3, batch_size=8, lr=1e-3, commitment=0.1, entropy=0.1, seed=seed)
        return train(config, pixels, settings, CPU, lambda progress: None).fingerprint()

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


def test_reconstructions_do_not_depend_on_the_cut_into_batches() -> None:
    pixels = torch.from_numpy(
        np.stack([p.pixels for p in tinted(load_digits(0)[1], without_held_out_pairs=False)][:50])
    )
    settings = TrainingSettings(steps=2, batch_size=8, lr=1e-3, commitment=0.1, entropy=0.1, seed=0)
    tokenizer = train(small_config(8, 2, 1, 5), pixels, settings, CPU, lambda progress: None)
    whole = reconstruct(tokenizer, pixels, CPU, 50)
    assert whole.codes.shape == (50, 4)
    assert torch.equal(whole.codes, reconstruct(tokenizer, pixels, CPU, 7).codes)


def test_psnr_by_hand() -> None:
    left = torch.zeros(2, 1, 1, 3, dtype=torch.uint8)
    right = left.clone()
    assert psnr(left, right) == np.inf
    right[0, 0, 0, 0] = 255
    assert psnr(left, right) == pytest.approx(10 * np.log10(6))


@pytest.mark.parametrize(("channels", "halvings"), [(1, 0), (6, 1), (16, 1), (32, 4), (128, 4)])
def test_small_sizes_are_valid(channels: int, halvings: int) -> None:
    config = small_config(channels, halvings, 1, 8)
    assert config.down == 1 << halvings


def test_mistakes_are_one_line(digits: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(20):
        Image.new("RGB", (10, 12), (number, 0, 0)).save(plain / f"{number:02d}.png")
    (plain / "broken.png").write_bytes(b"no picture")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (8, 8)).save(few / "a.png")
    cases = {
        (str(plain),): f"error: {plain}/broken.png: not a picture that can be read",
        (str(few),): "error: 1 pictures are too few to hold out one in 10; name some with --held-out",
        (str(digits), "--down", "4"): "error: --resolution 8 is not a multiple of 2^--down = 16",
        (str(plain), "--on-error", "skip", "--judge", "digits"): "error: every picture's record needs its 'digit'",
        (str(tmp_path / "none"),): f"error: {tmp_path}/none: no such folder or file of pictures",
        (str(digits), "--lr", "1e30", "--steps", "3"): "error: the loss of step",
    }
    for (images, *arguments), message in cases.items():
        result = trained(images, tmp_path / "out", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
