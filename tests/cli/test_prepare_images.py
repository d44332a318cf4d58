"""`prepare_data.py images`: pictures → codes, interrupted and resumed; mistakes are one line, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_mdm.images.pixels import read_image, to_tensor
from megatron_mdm.images.tokenizer import load_tokenizer, save_tokenizer
from tests.images.small import small_image_tokenizer
from tests.ranks import ProgramResult, run_program_ranks

NUM_PICTURES = 11
BATCH_SIZE = 3


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(small_image_tokenizer(), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    records = []
    for number in range(NUM_PICTURES):
        height, width = (9 + number, 12) if number % 2 else (12, 30)
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "caption": f"picture ✓ {number}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def encoded(pictures: Path, tokenizer: Path, output: Path, *arguments: str) -> ProgramResult:
    program = ["images", str(pictures), "--image-tokenizer", str(tokenizer), "--resolution", "12"]
    program += ["--output", str(output), "--batch-size", str(BATCH_SIZE), *arguments]
    return run_program_ranks("tools/prepare_data.py", program)[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def error_of(result: ProgramResult) -> str:
    assert result.exit_code == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_codes_are_those_of_the_pictures(tokenizer: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    Image.new("RGB", (20, 20)).save(pictures / "without.png")
    result = encoded(pictures, tokenizer, tmp_path / "codes.jsonl")
    assert result.exit_code == 0, result.stderr
    loaded = load_tokenizer(tokenizer)
    rows = lines(tmp_path / "codes.jsonl")
    assert [row["caption"] for row in rows] == [f"picture ✓ {number}" for number in range(NUM_PICTURES)]
    for number, row in enumerate(rows):
        expected = loaded.encode(to_tensor(read_image(pictures / f"{number}.png"), 12)[None])[0]
        assert row["image_codes"] == expected.tolist()
        assert (row["codes_of"], row["num_codes"]) == (loaded.fingerprint(), 32)
    assert "codes.jsonl: 11 pictures, 36 codes each" in result.stdout
    assert "warning: 1 of 11 pictures are smaller than 12 pixels: enlarged" in result.stderr
    assert f"warning: {pictures}: 1 pictures have no caption: left out" in result.stderr
    assert Image.open(tmp_path / "codes-preview.png").width > 8 * 128
    assert sorted(path.name for path in tmp_path.glob("codes*")) == ["codes-preview.png", "codes.jsonl"]


def test_it_resumes_behind_what_is_there(tokenizer: Path, tmp_path: Path) -> None:
    """Stopped by a broken picture, it goes on once that is mended, with the same result."""
    pictures = write_pictures(tmp_path / "pictures")
    encoded(pictures, tokenizer, tmp_path / "whole.jsonl")
    seventh = (pictures / "7.png").read_bytes()
    (pictures / "7.png").write_bytes(seventh[:200])
    output = tmp_path / "codes.jsonl"
    assert error_of(encoded(pictures, tokenizer, output)).startswith(f"error: {pictures}/captions.jsonl, line 8: ")
    assert not output.exists()
    save_tokenizer(small_image_tokenizer(1), tmp_path / "other")
    message = error_of(encoded(pictures, tmp_path / "other", output))
    assert message.startswith(f"error: {output}.partial: begun with image tokenizer = ")
    (pictures / "7.png").write_bytes(seventh)
    with open(f"{output}.partial", "a") as file:  # a line that was being written when the job died
        file.write('{"caption": "cut')
    result = encoded(pictures, tokenizer, output)
    assert f"{output}.partial: 6 pictures are there already" in result.stdout
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_bad_pictures_are_left_out_and_counted_once(tokenizer: Path, tmp_path: Path) -> None:
    """Also where the job was interrupted behind some of them."""
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "1.png").write_bytes(b"not a picture")
    captions = pictures / "captions.jsonl"
    text = captions.read_text()
    captions.write_text(text + "{broken\n")
    output = tmp_path / "codes.jsonl"
    result = encoded(pictures, tokenizer, output, "--on-error", "skip")
    assert result.exit_code == 0, result.stderr
    assert "2 bad records left out, such as:" in result.stderr
    assert [row["caption"][-1:] for row in lines(output)] == ["0", "2", "3", "4", "5", "6", "7", "8", "9", "0"]
    again = tmp_path / "again.jsonl"
    stopped = encoded(pictures, tokenizer, again, "--on-error", "skip", "--threads", "1")
    assert stopped.exit_code == 0
    progress = {
        "settings": {"pictures": [str(pictures)], "image tokenizer": load_tokenizer(tokenizer).fingerprint()}
        | {"resolution": 12, "caption field": "", "on error": "skip"},
        "bytes": len("".join(again.read_text().splitlines(keepends=True)[:6]).encode()),
        "rows": 6,
        "done": 7,
        "enlarged": 0,
        "bad": 1,
        "first_bad": ["the picture"],
    }
    again.rename(f"{again}.partial")
    Path(f"{again}.progress.json").write_text(json.dumps(progress))
    resumed = encoded(pictures, tokenizer, again, "--on-error", "skip")
    assert "2 bad records left out, such as:" in resumed.stderr
    assert again.read_bytes() == output.read_bytes()


def test_mistakes_are_one_line(tokenizer: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "captions.jsonl").write_text("")
    output = tmp_path / "codes.jsonl"
    (tmp_path / "damaged.jsonl.progress.json").write_text("{}")
    cases = {
        (
            pictures,
            tokenizer,
            output,
            "--resolution",
            "13",
        ): "resolution 13 is not a multiple of the image tokenizer's 2",
        (pictures, tmp_path / "none", output): f"{tmp_path}/none: no such folder of an image tokenizer",
        (tmp_path / "none", tokenizer, output): f"{tmp_path}/none: no such folder or file of pictures",
        (empty, tokenizer, output): f"{empty}: no pictures with captions (0 were bad)",
        (pictures, tokenizer, output, "--caption-field", "title"): "line 1: no caption ('title'); found image, caption",
        (pictures, tokenizer, tmp_path / "damaged.jsonl"): "progress.json: cannot be used ('first_bad'); remove it",
    }
    for (data, folder, file, *arguments), message in cases.items():
        assert message in error_of(encoded(data, folder, file, *arguments))
        for name in (f"{output}.partial", f"{output}.progress.json"):
            Path(name).unlink(missing_ok=True)
    assert not output.exists()
