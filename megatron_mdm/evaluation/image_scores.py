"""Pictures of the tinted digits against their captions: does a classifier of real pictures see what was asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.evaluation.intervals import wilson_interval
from megatron_mdm.images.digits import HELD_OUT_PAIRS, Bytes, DigitJudge, Floats, read_caption


class Asked(NamedTuple):
    digit: int
    color: str


class RealDigits(NamedTuple):
    """What pictures are judged by."""

    judge: DigitJudge  # of those that were trained on
    distance: Floats  # [M], the judge's, of real ones that were held out

    @classmethod
    def of(cls, judge: DigitJudge, held_out: Bytes) -> RealDigits:
        """held_out [M, 8, 8, 3]."""
        return cls(judge, judge(held_out).distance)


def digit_scores(pixels: Bytes, captions: Sequence[str], judge: DigitJudge, real_distance: Floats) -> dict[str, Any]:
    """Scores of pictures [N, 8, 8, 3] of captions such as "a red seven", with 95 % intervals.

    Digit and colour accuracies, over all and over the pairs that no training picture shows. nearer_than_real: share of
    pictures that are nearer to a training picture than half of the held-out real ones are (judge's distances,
    real_distance [M]): about a half where nothing is memorised. Raises UserError for another caption.
    """
    asked = [Asked(*read_caption(caption)) for caption in captions]
    verdict = judge(pixels)
    right_digit = verdict.digit == np.array([each.digit for each in asked])
    right_color = np.array([found == each.color for found, each in zip(verdict.color, asked, strict=True)])
    held_out = np.array([tuple(each) in HELD_OUT_PAIRS for each in asked])
    return {
        **_accuracy("digit", right_digit),
        **_accuracy("color", right_color),
        **_accuracy("held_out_digit", right_digit[held_out]),
        **_accuracy("held_out_color", right_color[held_out]),
        "num_digits_seen": len(np.unique(verdict.digit)),
        "nearer_than_real": float((verdict.distance < np.median(real_distance)).mean()),
        "num_images": len(pixels),
        "num_held_out": int(held_out.sum()),
    }


def summary(result: dict[str, Any]) -> list[str]:
    """Lines that say what digit_scores found."""
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


def _accuracy(name: str, right: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Nothing where there are no such pictures."""
    if not len(right):
        return {}
    return {
        f"{name}_accuracy": float(right.mean()),
        f"{name}_interval": list(wilson_interval(int(right.sum()), len(right))),
    }
