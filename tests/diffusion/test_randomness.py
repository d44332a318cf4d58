"""Counter-based streams."""

import itertools

import numpy as np

from megatron_mdm.diffusion.randomness import Purpose, stream


def test_streams_are_pure_functions_and_differ_in_every_argument() -> None:
    base = (1, Purpose.MASKS, 2, 3)
    np.testing.assert_array_equal(stream(*base).random(8), stream(*base).random(8))
    others = [(2, Purpose.MASKS, 2, 3), (1, Purpose.TIMES, 2, 3), (1, Purpose.MASKS, 3, 3), (1, Purpose.MASKS, 2, 4)]
    draws = [stream(*arguments).random(8).tolist() for arguments in [base, *others]]
    assert all(a != b for a, b in itertools.combinations(draws, 2))


def test_values_are_fixed_for_good() -> None:
    """Another numpy must not change old runs: these numbers are part of the format."""
    assert stream(42, Purpose.MASKS, 7, 11).random(3).tolist() == [
        0.6831278592692686,
        0.6596092776086412,
        0.21097277536602443,
    ]
