"""What each rank of a job that hangs is doing, and which of them the others wait for."""

from __future__ import annotations

import json
import linecache
import os
import site
import sys
import sysconfig
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from megatron_mdm.parallel import platform

_PROJECT = Path(__file__).parents[2]
_LIBRARIES = tuple({*site.getsitepackages(), sysconfig.get_path("stdlib"), "<"})
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")
_PASSED_OVER = ("wrapper", "log_wrapper", "<lambda>")  # decorators of these libraries' functions
_OWN_COLLECTIVES = str(Path(__file__).with_name("collectives.py"))  # whoever called it says more
_FEW = 3  # ranks in a row that are not written as a range


class Report(NamedTuple):
    """What one rank is doing, JSON-able."""

    host: str
    place: str = ""  # heartbeat.Pulse.place
    where: str = ""  # file:line function, the innermost of the project or of the user's program
    collective: str = ""  # in which it waits for others; empty: it is somewhere else
    state: str = ""  # "silent": it did not answer; "ended": its program is over


def report_of(frame: FrameType | None, place: str, record: Mapping[str, Any]) -> Report:
    """The report of this process, by its main thread's innermost frame. record: platform.flight_record()."""
    stack = []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return Report(platform.host(), place, _innermost_own(stack), _collective(stack, record))


def _collective(stack: list[tuple[str, int, str]], record: Mapping[str, Any]) -> str:
    """The function of torch.distributed in which the stack, innermost first, ends; else the operation whose handle, or
    on CUDA whose device, it waits for."""
    found = ""
    for file, _, function in stack:
        if not any(part in file for part in _COLLECTIVES):
            break
        if function not in _PASSED_OVER:
            found = function
    waits = stack and ".wait(" in linecache.getline(stack[0][0], stack[0][1]) and "threading" not in stack[0][0]
    if not found and (waits or platform.is_cuda()):
        unfinished = [entry for entry in record.get("entries", []) if not entry["retired"]]
        found = unfinished[0]["profiling_name"].rpartition(":")[2] if unfinished else ""
    return found


def _innermost_own(stack: list[tuple[str, int, str]]) -> str:
    own = [frame for frame in stack if not frame[0].startswith(_LIBRARIES) and frame[0] != _OWN_COLLECTIVES]
    if not own:
        return "an unknown place"
    file, line, function = own[0]
    path = Path(file)
    name = path.relative_to(_PROJECT) if path.is_relative_to(_PROJECT) else path.name
    return f"{name}:{line} {function}"


def stacks() -> str:
    """The Python stack of every thread, the main one first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    parts = []
    for thread in threads:
        if thread.ident in frames:
            parts.append(f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident])))
    return "\n".join(parts)


def describe(reports: Mapping[int, Report]) -> str:
    """One clause: who does not answer, who is in which place, who waits; by rank."""
    silent = [rank for rank, report in reports.items() if report.state == "silent"]
    ended = [rank for rank, report in reports.items() if report.state == "ended"]
    alive = {rank: report for rank, report in reports.items() if not report.state}
    elsewhere = _by({rank: report.where for rank, report in alive.items() if not report.collective})
    waiting = {rank: report for rank, report in alive.items() if report.collective}
    parts = []
    if silent:
        parts.append(f"{_named(silent, reports)} {'does' if len(silent) == 1 else 'do'} not answer")
    for where, ranks in elsewhere.items():
        parts.append(f"{_named(ranks, reports)} {_is(ranks)} in {where}")
    suspects = silent + [rank for ranks in elsewhere.values() for rank in ranks]
    if suspects:
        for collective, ranks in _by({rank: report.collective for rank, report in waiting.items()}).items():
            wait = "waits" if len(ranks) == 1 else "wait"
            parts.append(f"{_ranks(ranks)} {wait} for {'it' if len(suspects) == 1 else 'them'} in {collective}")
    elif waiting:
        places = _by({rank: f"{report.collective} ({report.where})" for rank, report in waiting.items()})
        each = (f"{_named(ranks, reports)} in {where}" for where, ranks in places.items())
        parts.append(f"all ranks wait in collectives: {', '.join(each)}")
    if ended:
        parts.append(f"{_ranks(ended)} {'has' if len(ended) == 1 else 'have'} ended")
    return "; ".join(parts)


def place_of(reports: Mapping[int, Report]) -> str:
    """What the job is doing: by the first rank that is not in a collective, else by the first that answers."""
    alive = [report for report in reports.values() if not report.state]
    for report in [*(report for report in alive if not report.collective), *alive]:
        return report.place
    return "an unknown place"


def encode(report: Report) -> str:
    return json.dumps(report._asdict())


def decode(text: str | bytes) -> Report:
    return Report(**json.loads(text))


def _by(values: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks by value, in the order of the first rank of each."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(values):
        ranks[values[rank]].append(rank)
    return dict(ranks)


def _named(ranks: list[int], reports: Mapping[int, Report]) -> str:
    """Ranks with their hosts, as text."""
    hosts = sorted({reports[rank].host for rank in ranks})
    return f"{_ranks(ranks)} ({'host' if len(hosts) == 1 else 'hosts'} {', '.join(hosts)})"


def _is(ranks: list[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _ranks(ranks: Iterable[int]) -> str:
    """Ranks as text: "rank 3"; "ranks 0, 1, 4"; "ranks 0–6, 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [", ".join(map(str, run)) if len(run) <= _FEW else f"{run[0]}–{run[-1]}" for run in runs]
    return f"rank{'s' * (sum(map(len, runs)) > 1)} {', '.join(texts)}"
