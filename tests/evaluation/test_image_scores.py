"""Scores of pictures of the tinted digits: the ceiling of real ones, and the floor of shuffled captions."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.evaluation.image_scores import digit_scores
from megatron_mdm.images.digits import HELD_OUT_PAIRS, DigitJudge, load_digits, tinted


def test_real_pictures_are_the_ceiling_and_shuffled_captions_the_floor() -> None:
    train, test = load_digits(0)
    reference = list(tinted(train, without_held_out_pairs=True))
    judge = DigitJudge(np.stack([p.pixels for p in reference]), np.array([p.digit for p in reference]))
    real = list(tinted(test, without_held_out_pairs=False))
    pixels = np.stack([picture.pixels for picture in real])
    captions = [picture.caption for picture in real]
    distance = judge(pixels).distance
    ceiling = digit_scores(pixels, captions, judge, distance)
    assert ceiling["digit_accuracy"] > 0.98
    assert ceiling["color_accuracy"] == 1.0
    assert ceiling["digit_interval"][0] < ceiling["digit_accuracy"] < ceiling["digit_interval"][1]
    assert ceiling["num_held_out"] == sum((p.digit, p.color) in HELD_OUT_PAIRS for p in real)
    assert ceiling["num_digits_seen"] == 10
    assert ceiling["nearer_than_real"] == pytest.approx(0.5, abs=0.01)  # as far as themselves
    order = np.random.default_rng(0).permutation(len(captions))
    floor = digit_scores(pixels, [captions[place] for place in order], judge, distance)
    n = len(captions)
    assert abs(floor["digit_accuracy"] - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5
    assert abs(floor["color_accuracy"] - 1 / 6) < 4 * (1 / 6 * 5 / 6 / n) ** 0.5
    memorised = np.stack([picture.pixels for picture in reference[:60]])
    copied = digit_scores(memorised, [picture.caption for picture in reference[:60]], judge, distance)
    assert copied["nearer_than_real"] == 1.0
    assert "held_out_digit_accuracy" not in copied  # there are none


def test_other_captions_are_refused() -> None:
    judge = DigitJudge(np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64))
    with pytest.raises(UserError, match="'a pink seven' is no caption of a tinted digit, such as 'a red seven'"):
        digit_scores(np.zeros((1, 8, 8, 3), dtype=np.uint8), ["a pink seven"], judge, np.zeros(1))
