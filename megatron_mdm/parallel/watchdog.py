"""A job in which no rank makes progress is ended, and the rank and the place are named: never a silent hang.

Every rank has a thread that counts the job's heartbeats (heartbeat.py) in the job's store. When there has been none on
any rank for the limit, each writes its stacks, tells the store where it is, one of them prints a line for all, and all
end with an exit code after which a launcher may try again. A rank whose process is stopped or whose host is gone is
known by its silence.

What may raise or block meanwhile (a library's flight recorder, a disk, a terminal, the store) loses its part of the
report, and never keeps the process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mdm.config.files import write_json
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.hang_report import Report, decode, describe, encode, place_of, report_of, stacks
from megatron_mdm.parallel.heartbeat import pulse

HANGS = "hangs"
_EXIT_CODE = 70  # as of any crash that another try may cure: see program.py
_LONGEST_PERIOD = 10.0  # seconds between two looks
_SECONDS_TO_WRITE = 5.0  # at most, the looking included: a recorder, a disk or a terminal may be what hangs
_SECONDS_TO_ANSWER = 2.0  # of the store, at least
_SECONDS_TO_HEAR = 1.0  # that the line is printed
_SECONDS_TO_STOP = 2.0  # of each thread, at the end of the program
_SECONDS_AT_MOST = 60.0  # beyond the sum of all that may take time
_watchdog: Watchdog | None = None


def watch(
    folder: Path, minutes: float, context: ParallelContext, record: Callable[[], Any] = platform.flight_record
) -> None:
    """Start this rank's watchdog. Collective. minutes without any rank's heartbeat end the job; 0: none is started.

    What the ranks were doing is left in folder/hangs. record: gives the last collectives; it may raise, or not return.
    """
    global _watchdog
    unwatch()
    if minutes:
        _watchdog = Watchdog(folder / HANGS, 60.0 * minutes, context, record)
        _watchdog.start()


def unwatch() -> bool:
    """Stop it, at the end of the program. False: a thread of it is still within the store's code, where the end of the
    interpreter would abort the process (C++: "terminate called without an active exception")."""
    global _watchdog
    has_stopped = _watchdog.stop() if _watchdog else True
    _watchdog = None
    return has_stopped


def wait_if_hanging() -> None:
    """Wait for the watchdogs while they end the job, in a main thread whose collective breaks: they have to speak."""
    if _watchdog and _watchdog.is_ending:
        _watchdog.join()  # ends the process


class Watchdog(threading.Thread):
    """This rank's thread that ends a hanging job. Times in seconds."""

    def __init__(self, folder: Path, limit: float, context: ParallelContext, record: Callable[[], Any]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.folder = folder
        self.limit = limit
        self.record = record
        self.rank = context.rank
        self.size = context.layout.world_size
        self.seconds_to_write = min(limit, _SECONDS_TO_WRITE)
        self.period = min(max(limit / 4, 0.25), _LONGEST_PERIOD)
        self.board = Board(max(limit / 10, _SECONDS_TO_ANSWER))
        self.board.ask(lambda store: store.set(f"host/{self.rank}", platform.host()))
        self.is_ending = False
        self.has_written = False
        self._stop_asked = threading.Event()

    def run(self) -> None:
        idle = 0.0
        beats = -1
        total = 0
        now = time.monotonic()
        while not self._stop_asked.wait(self.period):
            # A process that was stopped as a whole and continues has not been idle for that long.
            elapsed = min(time.monotonic() - now, 2 * self.period)
            now = time.monotonic()
            mine = pulse()
            total_before = total
            moved = int(mine.beats != beats)
            beats = mine.beats
            found, total = self._job_moved(moved) or (False, total + moved)  # without the store, by this rank alone
            idle = 0.0 if total != total_before else idle + elapsed
            if found or idle >= self.limit + mine.extra_seconds:
                self.is_ending = True
                self._end()

    def stop(self) -> bool:
        """Returns whether both threads have ended."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else the store may be gone with rank 0
            report = encode(Report(platform.host(), state="ended"))
            self.board.ask(lambda store: store.set(f"report/{self.rank}", report))
        self._stop_asked.set()
        self.join(_SECONDS_TO_STOP)
        return self.board.close() and not self.is_alive()

    def _job_moved(self, moved: int) -> tuple[bool, int] | None:
        """(whether a rank has found that the job hangs, looks at which a rank had moved), this rank's told first."""
        return self.board.ask(lambda store: (store.check(["hangs"]), store.add("beats", moved)))

    def _end(self) -> None:
        """Report, and leave, whatever becomes of the report."""
        patience = 2 * self.period + self.seconds_to_write + _SECONDS_TO_ANSWER
        last = threading.Timer(self.seconds_to_write + 2 * patience + _SECONDS_AT_MOST, os._exit, (_EXIT_CODE,))
        last.daemon = True
        last.start()
        try:
            self._tell(patience)
        except Exception as error:
            self._say(f"rank {self.rank}: {self._since(pulse().place)}; its report failed: {error!r}")
        finally:
            os._exit(_EXIT_CODE)

    def _tell(self, patience: float) -> None:
        """Report, wait for the others' reports, and let one of all print the line."""
        self.board.ask(lambda store: store.set("hangs", ""))
        report = self._look()
        self.board.ask(lambda store: store.set(f"report/{self.rank}", encode(report)))
        names = [f"report/{rank}" for rank in range(self.size)]
        self._until(lambda store: store.check(names) or store.check(["told"]), patience)
        if self.board.is_lost:
            self._say(f"rank {self.rank}: {self._since(report.place)}: it {_doing(report)}; {self.board.lost}")
        elif self.board.ask(lambda store: store.add("speakers", 1)) == 1:
            reports = {rank: self._answer_of(rank) for rank in range(self.size)}
            where = self.folder if self.has_written else f"they cannot be written to {self.folder}"
            self._say(f"{self._since(place_of(reports))}: {describe(reports)}; stacks: {where}")
            self.board.ask(lambda store: store.set("told", ""))
        else:
            self._until(lambda store: store.check(["told"]), patience)
        if self.rank == 0:  # it may be the store's host
            time.sleep(_SECONDS_TO_HEAR)

    def _look(self) -> Report:
        """What this rank is doing, which is also written down. The recorder takes half of the time at most, the report
        half of what is left."""
        deadline = time.monotonic() + self.seconds_to_write
        place = pulse().place
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        record = _within(self.seconds_to_write / 2, self.record) or {}
        left = (deadline - time.monotonic()) / 2
        unknown = Report(platform.host(), place, where="an unknown place")
        report = _within(left, lambda: report_of(frame, place, record)) or unknown
        _within(deadline - time.monotonic(), lambda: self._write(report, record))
        return report

    def _since(self, place: str) -> str:
        limit = self.limit + pulse().extra_seconds
        duration = f"{limit / 60:.3g} min" if limit >= 60 else f"{limit:.3g} s"
        return f"no progress for {duration} at {place}"

    def _answer_of(self, rank: int) -> Report:
        key = f"report/{rank}"
        host = f"host/{rank}"
        if self.board.ask(lambda store: store.check([key])):
            return decode(self.board.ask(lambda store: store.get(key)) or "{}")
        named = self.board.ask(lambda store: store.check([host])) and self.board.ask(lambda store: store.get(host))
        return Report(named.decode() if named else "unknown", state="silent")

    def _until(self, question: Callable[[dist.Store], bool], seconds: float) -> None:
        """Ask until the answer is yes, but no longer."""
        deadline = time.monotonic() + seconds
        while not self.board.ask(question) and not self.board.is_lost and time.monotonic() < deadline:
            time.sleep(0.1)

    def _write(self, report: Report, record: Any) -> None:
        """This rank's stacks and, where the libraries keep them, its last collectives (record)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.rank:03d}"
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}, host {report.host}, process {os.getpid()}: "
        text = f"{head}{self._since(report.place)}; it {_doing(report)}\n\n{stacks()}"
        (self.folder / f"{name}.txt").write_text(text, encoding="utf-8")
        self.has_written = True
        if record:
            write_json(self.folder / f"{name}.collectives.json", record)

    def _say(self, text: str) -> None:
        """Past sys.stderr, whose lock the main thread may hold; on a line of its own, below a progress bar."""
        _within(self.seconds_to_write, lambda: os.write(2, f"\nerror: {text}\n".encode()))


class Board:
    """The job's store, asked on a thread of its own: where its host has stopped, a question is never answered."""

    def __init__(self, seconds: float) -> None:
        """seconds: how long an answer may take. One that takes longer is the last."""
        self.seconds = seconds
        self.is_lost = False
        self.lost = ""
        self._questions: queue.SimpleQueue[tuple[Callable[[dist.Store], Any], queue.SimpleQueue[Any]] | None]
        self._questions = queue.SimpleQueue()  # None: there are no more
        store: Any = dist.distributed_c10d._get_default_store()
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        self._address = store.host, store.port
        self._thread = threading.Thread(target=self._serve, name="watchdog's store", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """No more questions. Returns whether the thread has ended."""
        self._questions.put(None)
        self._thread.join(_SECONDS_TO_STOP)
        return not self._thread.is_alive()

    def ask(self, question: Callable[[dist.Store], Any]) -> Any:
        """The answer; None where there is none, now or before."""
        if self.is_lost:
            return None
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._questions.put((question, answer))
        try:
            result = answer.get(timeout=self.seconds)
        except queue.Empty:
            result = TimeoutError()
        if isinstance(result, Exception):
            self.is_lost = True
            self.lost = f"the job's store at {self._address[0]}:{self._address[1]} does not answer"
            return None
        return result

    def _serve(self) -> None:
        """Answer questions over a connection of its own: one that another thread waits on cannot be used."""
        connection: dist.Store | None = None
        while asked := self._questions.get():
            question, answer = asked
            try:
                if connection is None:
                    host, port = self._address
                    patience = timedelta(seconds=self.seconds)
                    client = dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
                    connection = dist.PrefixStore("watchdog", client)
                answer.put(question(connection))
            except Exception as error:
                answer.put(error)


def _doing(report: Report) -> str:
    return f"waits in {report.collective} ({report.where})" if report.collective else f"is in {report.where}"


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """What the action gives; None where it raises, or takes longer than this."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def act() -> None:
        result = None
        with contextlib.suppress(Exception):
            result = action()
        answer.put(result)

    threading.Thread(target=act, daemon=True).start()
    try:
        return answer.get(timeout=max(0.0, seconds))
    except queue.Empty:
        return None
