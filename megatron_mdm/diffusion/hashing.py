"""Random numbers that a device makes by itself: hashed 64-bit integers, the same on every device.

SplitMix64 (Steele, Lea, Flood 2014): a stream is named by a key, its n-th number is mixed(key + n · DISTANCE). Keys are
random themselves (randomness.py), or numbers of another stream. Integers wrap, as torch's do on CPU and CUDA.
"""

from __future__ import annotations

from torch import Tensor


def _signed(value: int) -> int:
    """The signed 64-bit integer of the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


DISTANCE = _signed(0x9E3779B97F4A7C15)  # of neighbours, before mixing
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))  # (shift, factor) of each
_LAST_SHIFT = 31
_DIGITS = 52  # of a uniform number: with the half that keeps it from 0, as many as a float64 holds


def mixed(values: Tensor) -> Tensor:
    """A bijection of 64-bit integers under which neighbours become unlike. In place."""
    for shift, factor in _ROUNDS:
        values = values.bitwise_xor_(_shifted(values, shift)).mul_(factor)
    return values.bitwise_xor_(_shifted(values, _LAST_SHIFT))


def uniforms(values: Tensor) -> Tensor:
    """Hashes → float64 numbers in (0, 1), neither of which they are: multiples of 2⁻⁵² plus 2⁻⁵³, exact everywhere."""
    return _shifted(values, 64 - _DIGITS).double().add_(0.5).mul_(2.0**-_DIGITS)


def _shifted(values: Tensor, by: int) -> Tensor:
    """Shifted to the right, with zeros from the left: torch's shift repeats the sign."""
    return (values >> by).bitwise_and_((1 << (64 - by)) - 1)
