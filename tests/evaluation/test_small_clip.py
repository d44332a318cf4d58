"""The small CLIP for small pictures, and the program that scores pictures on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.captioned import write_captioned
from megatron_mdm.evaluation.clip_score import evaluate_clip, load_clip
from megatron_mdm.evaluation.small_clip import SmallClipSettings, train_small_clip
from megatron_mdm.images.digits import load_digits, tinted
from megatron_mdm.images.pixels import to_png
from tests.ranks import ProgramResult, run_program_ranks

SETTINGS = SmallClipSettings(patch=4, steps=40, lr=3e-3, vocabulary=400, seed=0)
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def plain(number: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of one colour, of any brightness."""
    generator = np.random.default_rng(0)
    names = [list(COLORS)[place % len(COLORS)] for place in range(number)]
    ink = np.array([COLORS[name] for name in names]) * generator.uniform(0.4, 1.0, (number, 1))
    return np.broadcast_to(ink[:, None, None], (number, 8, 8, 3)).astype(np.uint8), [f"{name} paint" for name in names]


def test_a_trained_clip_prefers_the_right_caption_and_is_the_same_each_time(tmp_path: Path) -> None:
    pixels, captions = plain(30)
    losses = list[float]()
    for name in ("first", "second"):
        train_small_clip(pixels, captions, tmp_path / name, SETTINGS, losses.append)
    assert losses[:40] == losses[40:]
    assert losses[39] < 0.2 < losses[0]
    first, second = (load_clip(tmp_path / name) for name in ("first", "second"))
    assert first.identity["sha256"] == second.identity["sha256"]
    assert len(first.ids("red paint")[0]) == 4  # its words are tokens
    result = evaluate_clip([Image.fromarray(each) for each in pixels], captions, first)
    assert result["recall_at_1"] == 1.0
    assert result["above_shuffled"] > 3 * result["above_shuffled_error"]


def scored(output: Path, *arguments: str) -> ProgramResult:
    return run_program_ranks("tools/score_images.py", [*arguments, "--output", str(output)])[0]


def test_pictures_on_disk_are_scored(tmp_path: Path) -> None:
    train, test = load_digits(0)
    for name, digits in (("train", train), ("test", test)):
        pictures = [picture for picture, _ in zip(tinted(digits, without_held_out_pairs=False), range(180))]
        fields: list[dict[str, Any]] = [{"caption": p.caption, "digit": p.digit, "color": p.color} for p in pictures]
        write_captioned(
            tmp_path / f"{name}.parquet",
            [(to_png(Image.fromarray(p.pixels)), field) for p, field in zip(pictures, fields)],
        )
    program = ["--images", str(tmp_path / "train.parquet"), "--output", str(tmp_path / "clip"), "--resolution", "8"]
    result = run_program_ranks("tools/train_small_clip.py", [*program, "--steps", "2"])[0]
    assert result.exit_code == 0, result.stderr
    data = [str(tmp_path / f"{name}.parquet") for name in ("train", "test")]
    (tmp_path / "report.json").write_text('{"psnr": 23.8, "digit_accuracy": 0.975}')
    beside = ["--beside", f"reconstructions={tmp_path / 'report.json'}"]
    arguments = [data[1], "--clip", str(tmp_path / "clip"), "--digits", *data]
    result = scored(tmp_path / "scores.json", *arguments, *beside)
    assert result.exit_code == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"digit accuracy: {scores['digits']['digit_accuracy']:.2f}\n" in result.stdout
    assert f"CLIP score: {scores['clip']['clip_score']:.2f}\n" in result.stdout
    assert scores["digits"]["color_accuracy"] == 1.0
    assert scores["clip"]["clip"]["name"] == "clip"
    heading, these, others = [line.split() for line in result.stdout.splitlines()[-3:]]
    assert heading[:2] == ["digit", "colour"]
    assert these[:3] == ["these", f"{scores['digits']['digit_accuracy']:.3f}", "1.000"]
    assert others[:3] == ["reconstructions", "0.975", "–"]
    (tmp_path / "other.json").write_text('{"psnr": 23.8}')
    cases = {
        (data[0], "--digits", *data, "--beside", f"x={tmp_path / 'none'}"): "none: cannot be read as scores ([Errno 2]",
        (data[0], "--digits", *data, "--beside", f"x={tmp_path / 'other.json'}"): "other.json: holds no scores (clip",
        (data[0],): "nothing to score by: give --clip FOLDER, --digits TRAIN TEST, or both",
        (data[0], "--clip", str(tmp_path)): f"{tmp_path}: no folder with a CLIP model's config.json",
        (data[0], "--digits", str(tmp_path / "none"), data[1]): "none: no such folder or file of pictures",
    }
    for arguments, message in cases.items():
        failed = scored(tmp_path / "other.json", *arguments)
        assert failed.exit_code == 1
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(("patch", "captions"), [(3, ["a", "b"]), (4, ["a", "a"])])
def test_what_cannot_be_trained_on_is_refused(patch: int, captions: list[str], tmp_path: Path) -> None:
    pixels = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    settings = SmallClipSettings(patch=patch, steps=1, lr=1e-3, vocabulary=300, seed=0)
    with pytest.raises(UserError, match=r"patches of 3|two distinct captions"):
        train_small_clip(pixels, captions, tmp_path, settings, lambda loss: None)
