"""Progress bars: lively on a terminal, a line now and then in a log file, on the main rank only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LOG_LINES = 20.0


def progress_bar(iterable: Iterable[Any] | None = None, *, enabled: bool = True, **options: Any) -> tqdm:
    """tqdm with its usual options."""
    interval = 0.2 if sys.stderr.isatty() else _SECONDS_BETWEEN_LOG_LINES
    return tqdm(
        iterable, disable=not enabled, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options
    )
