"""A run is done by one process, and by another when that is gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

from megatron_mdm.study import claims
from megatron_mdm.study.claims import claim, holds


def _try(folder: str, number: int, barrier, results) -> None:
    barrier.wait()
    results.put((number, claim(Path(folder), "a") is not None))
    barrier.wait()  # all have tried before the first is gone


def _claim_and_die(folder: str) -> None:
    assert claim(Path(folder), "a")


def test_of_processes_that_try_at_once_one_has_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(3):  # the claims of processes that are gone are taken over, by one, too
        barrier = context.Barrier(6)
        results = context.Queue()
        processes = [context.Process(target=_try, args=(str(tmp_path), n, barrier, results)) for n in range(6)]
        for process in processes:
            process.start()
        answers = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        assert sum(has for _, has in answers) == 1


def test_the_claim_of_a_process_that_is_gone_does_not_hold(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert not holds(tmp_path / "claims" / "a" / "0")
    assert claim(tmp_path, "a")
    assert claim(tmp_path, "a") is None


def test_a_claim_that_is_given_up_can_be_had(tmp_path: Path) -> None:
    mine = claim(tmp_path, "a")
    assert mine
    assert claim(tmp_path, "a") is None
    mine.give_up()
    assert claim(tmp_path, "a")


def test_another_hosts_claim_holds_while_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "a" / "0"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "started": "x"}), encoding="utf-8")
    assert claim(tmp_path, "a") is None
    long_ago = time.time() - claims.STALE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    assert claim(tmp_path, "a")
