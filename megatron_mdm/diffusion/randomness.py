"""Counter-based random streams: every draw is a pure function of (seed, purpose, step, index).

Nothing is carried from draw to draw, so every layout, every restart and every rank agrees without communication.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes never overlap. The values are part of a run's results."""

    TIMES = 1
    MASKS = 2
    CALIBRATION = 3
    VALIDATION = 4
    DATA_ORDER = 5
    SPLIT = 6
    INITIAL_WEIGHTS = 7
    GENERATION = 8
    VARIANCE = 9
    ADAPTER_DROPOUT = 10
    CAPTION_DROPOUT = 11
    ROLLOUT = 12
    RL_TIMES = 13
    RL_MASKS = 14
    RL_PROMPT_MASKS = 15
    LIKELIHOOD = 20
    RANDOM_LENGTH = 21


def stream(seed: int, purpose: Purpose, step: int = 0, index: int = 0) -> np.random.Generator:
    """A numpy generator over Philox 4x64 (Salmon et al. 2011) with key (seed, purpose) and counter (·, index, step, 0).

    The first counter word counts the draws within the stream.
    """
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=[0, index, step, 0]))
