"""What a rank is doing, and that it makes progress: what the watchdog looks at. Without one, it costs nothing."""

from __future__ import annotations

from typing import NamedTuple


class Pulse(NamedTuple):
    place: str  # what is being done, for people to read
    beats: int  # since the process started; only that it changes matters
    extra_seconds: float  # that may pass between two beats there, beyond the watchdog's limit


_pulse = Pulse("start", 0, 0.0)


def enter(place: str, extra_seconds: float = 0.0) -> None:
    """Begin something, such as "step 17". extra_seconds: how much longer than other things it may take in one go."""
    global _pulse
    _pulse = Pulse(place, _pulse.beats + 1, extra_seconds)


def beat() -> None:
    """Say that what was begun makes progress: at least once in each part that may take minutes. Any thread may."""
    global _pulse
    _pulse = _pulse._replace(beats=_pulse.beats + 1)


def pulse() -> Pulse:
    return _pulse
