"""Real pictures without a download: scikit-learn's handwritten digits, tinted, as "a red seven"; and their judge.

1,797 digits of 8 × 8 pixels (Alpaydin & Kaynak 1998, UCI). Every digit is drawn in every colour on black.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.randomness import Purpose, stream

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {  # sixth parts of the circle of hues
    "red": (255, 0, 0),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "cyan": (0, 255, 255),
    "blue": (0, 0, 255),
    "magenta": (255, 0, 255),
}
# (digit, colour) that no training picture shows: one of each colour, of six digits
HELD_OUT_PAIRS = ((0, "green"), (2, "magenta"), (3, "yellow"), (5, "blue"), (7, "red"), (8, "cyan"))
NUM_TRAINING = 1500
RESOLUTION = 8
_DARKEST = 16  # of the data set's grey levels


class Digits(NamedTuple):
    intensity: Bytes  # [N, 8, 8], 0: no ink
    label: NDArray[np.int64]  # [N]


class TintedDigit(NamedTuple):
    pixels: Bytes  # [8, 8, 3]
    digit: int
    color: str

    @property
    def caption(self) -> str:
        return caption(self.digit, self.color)


def caption(digit: int, color: str) -> str:
    return f"a {color} {DIGITS[digit]}"


def read_caption(text: str) -> tuple[int, str]:
    """(digit, colour) of what caption() wrote. Raises UserError for anything else."""
    found = _CAPTIONS.get(text)
    if found is None:
        raise UserError(f"'{text[:80]}' is no caption of a tinted digit, such as '{caption(7, 'red')}'")
    return found


_CAPTIONS = {caption(digit, color): (digit, color) for digit in range(len(DIGITS)) for color in COLORS}


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """(1,500 to train with, 297 held out), shuffled by the seed. Raises UserError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError:
        raise UserError(
            "the digits are part of scikit-learn: pip install 'megatron-mdm[images]' (or pip install scikit-learn)"
        ) from None
    data = bundled()
    intensity = (data.images * (255.0 / _DARKEST)).round().astype(np.uint8)
    order = stream(seed, Purpose.SPLIT).permutation(len(intensity))
    parts = (order[:NUM_TRAINING], order[NUM_TRAINING:])
    train, held_out = (Digits(intensity[part], data.target[part].astype(np.int64)) for part in parts)
    return train, held_out


def tinted(digits: Digits, *, without_held_out_pairs: bool) -> Iterator[TintedDigit]:
    """Every digit in every colour, one digit's colours behind another's."""
    for intensity, label in zip(digits.intensity, digits.label.tolist()):
        for color, ink in COLORS.items():
            if without_held_out_pairs and (label, color) in HELD_OUT_PAIRS:
                continue
            yield TintedDigit(tint(intensity, ink), label, color)


def tint(intensity: Bytes, ink: tuple[int, int, int]) -> Bytes:
    """[8, 8] → [8, 8, 3]: ink of that density on black."""
    return (intensity[..., None].astype(np.uint16) * np.array(ink, dtype=np.uint16) // 255).astype(np.uint8)


class Verdict(NamedTuple):
    digit: NDArray[np.int64]  # [N]
    color: list[str]  # [N]
    distance: Floats  # [N], RMS difference from the nearest training digit, in units of full ink


class DigitJudge:
    """Which digit and which colour a picture shows: the nearest training digit by intensity, the nearest hue by the
    ink's mean."""

    def __init__(self, pixels: Bytes, label: NDArray[np.int64]) -> None:
        """Of training pictures [N, 8, 8, 3] and their digits [N]; the same digit in several colours counts once."""
        intensity, first = np.unique(_intensity(pixels), axis=0, return_index=True)
        self.reference = intensity / 255.0
        self.label = label[first]

    def __call__(self, pixels: Bytes) -> Verdict:
        """pixels [N, 8, 8, 3]."""
        intensity = _intensity(pixels) / 255.0
        square = (intensity**2).sum(1)[:, None] - 2.0 * intensity @ self.reference.T + (self.reference**2).sum(1)
        nearest = square.argmin(1)
        distance = np.sqrt(np.maximum(square.min(1), 0.0) / intensity.shape[1])
        return Verdict(self.label[nearest], [_hue_name(picture) for picture in pixels], distance)


def _intensity(pixels: Bytes) -> Bytes:
    """[N, 8, 8, 3] → [N, 64]"""
    return pixels.max(-1).reshape(len(pixels), -1)


def _hue_name(pixels: Bytes) -> str:
    """The colour whose hue is nearest to the ink's mean [3]; of colourless ink, the first."""
    mean = pixels.reshape(-1, 3).mean(0)
    chroma = mean - mean.mean()
    directions: dict[str, Any] = {name: np.array(ink) - np.mean(ink) for name, ink in COLORS.items()}
    return max(directions, key=lambda name: float(chroma @ directions[name] / np.linalg.norm(directions[name])))
