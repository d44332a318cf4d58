"""A function of the step, computed one step ahead on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.parallel import platform

T = TypeVar("T")
Times = tuple[Floats, Floats]  # Noise.times of a step


class _Coming(NamedTuple):
    step: int
    times: Times  # when it was asked for
    result: Future


class OneStepAhead(Generic[T]):
    """What `make` gives for a step, made while the step before is trained.

    make must be a function of the step and of times(step) alone. Where times have changed since it was asked for, as
    p(t) was fitted again, or another step is wanted than the next, it is made anew. It must not communicate: ranks'
    threads run in no common order.
    """

    def __init__(self, make: Callable[[int], T], times: Callable[[int], Times]) -> None:
        self.make = make
        self.times = times
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=platform.select_device)
        self._coming: _Coming | None = None

    def __call__(self, step: int) -> T:
        """An error of the thread is raised here."""
        coming = self._coming
        if coming is None or coming.step != step or not _equal(coming.times, self.times(step)):
            if coming is not None:
                coming.result.cancel()
            coming = self._begin(step)
        result: T = coming.result.result()
        self._coming = self._begin(step + 1)
        return result

    def _begin(self, step: int) -> _Coming:
        return _Coming(step, self.times(step), self._pool.submit(self.make, step))


def _equal(one: Times, other: Times) -> bool:
    return all(map(np.array_equal, one, other))
