"""Where a step's time goes on this rank: seconds by phase, and seconds within collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_mdm.parallel import platform

# Of every step. other: what is left of it; pipeline: messages to and from other stages, waiting for them included. A
# source of batches may measure more.
PHASES = ("data", "forward", "backward", "optimizer", "pipeline", "other")


class PhaseClock:
    """Seconds of the host by phase. A phase within another counts for the inner one.

    On CUDA the host runs ahead of the device, and a phase holds what it waits for; with is_exact each phase waits for
    the device at its end.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.is_exact = False
        self._inner = 0.0  # of phases within the one that is being measured

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        outer = self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            if self.is_exact:
                platform.synchronize()
            elapsed = time.perf_counter() - began
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed - self._inner
            self._inner = outer + elapsed

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured as a phase."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.measure(phase):
                return function(*arguments, **named)

        return call

    def close(self, total: float) -> dict[str, float]:
        """Seconds by phase of a step that took total, the rest as other."""
        seconds = dict(self.seconds)
        seconds["other"] = max(0.0, total - sum(seconds.values()))
        return seconds


class CommunicationProfile:
    """Seconds in which a collective of this rank was under way, its waiting for others included: torch's profiler.

    It costs some microseconds per operation, so it is switched on for single steps. Gloo's collectives appear as
    gloo:…, NCCL's as kernels of its own (not exercised).
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.seconds = float("nan")

    def __enter__(self) -> CommunicationProfile:
        if self.is_on:
            device = "cuda" if platform.is_cuda() else None
            self._profiler = torch.autograd.profiler.profile(use_device=device)
            self._profiler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the measurement; read() takes its result, which is not part of the step."""
        if self.is_on:
            self._profiler.__exit__(None, None, None)

    def read(self) -> float:
        """Seconds; not a number where the profile was off."""
        if self.is_on:
            # As they were recorded: the library's own tables of them take longer to make than a step.
            recorded = self._profiler.kineto_results
            assert recorded is not None
            events = recorded.events()
            spans = [
                (event.start_ns(), event.start_ns() + event.duration_ns())
                for event in events
                if event.name().startswith(("gloo:", "nccl"))
            ]
            self.seconds = covered(spans) / 1e9
        return self.seconds


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total = 0.0
    end = float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
