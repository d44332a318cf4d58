"""The tinted digits and their judge."""

from __future__ import annotations

import numpy as np

from megatron_mdm.images.digits import COLORS, HELD_OUT_PAIRS, DigitJudge, load_digits, tinted


def test_held_out_pairs_are_in_no_training_picture() -> None:
    train, test = load_digits(0)
    assert (len(train.label), len(test.label)) == (1500, 297)
    shown = [(picture.digit, picture.color) for picture in tinted(train, without_held_out_pairs=True)]
    assert set(shown) == {(digit, color) for digit in range(10) for color in COLORS} - set(HELD_OUT_PAIRS)
    assert {color for _, color in HELD_OUT_PAIRS} == set(COLORS)  # each is left out once, with a digit of its own
    assert len({digit for digit, _ in HELD_OUT_PAIRS}) == len(HELD_OUT_PAIRS)
    captions = {picture.caption for picture in tinted(test, without_held_out_pairs=False)}
    assert len(captions) == 60
    assert "a red seven" in captions


def test_the_judge_knows_real_pictures() -> None:
    """Held-out digits and colours are its ceiling: 1-NN's 99 %, and every hue, however faint the ink."""
    train, test = load_digits(0)
    reference = list(tinted(train, without_held_out_pairs=True))
    judge = DigitJudge(np.stack([p.pixels for p in reference]), np.array([p.digit for p in reference]))
    assert len(judge.reference) <= 1500  # the same digit in several colours counts once
    held_out = list(tinted(test, without_held_out_pairs=False))
    pixels = np.stack([picture.pixels for picture in held_out])
    for scale in (1, 4):
        verdict = judge(pixels // scale)
        assert verdict.color == [picture.color for picture in held_out]
    verdict = judge(pixels)
    assert (verdict.digit == [picture.digit for picture in held_out]).mean() > 0.98
    assert verdict.distance.min() > 0.0  # none is a training picture
    assert judge(np.stack([p.pixels for p in reference[:6]])).distance.max() < 1e-6
