"""A run's log on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.training.metrics import MetricsLog


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's own thread
def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(small_disk: Path) -> None:
    log = MetricsLog(small_disk, tensorboard=True, is_main=True, first_step=0)
    log.write(1, {"loss": 1.0})
    filler = small_disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
    except OSError:
        pass
    for step in range(2, 1002):  # more than fits into what is left of a block
        log.write(step, {"loss": 1.0 / step, "a_long_name_of_something_else_that_is_logged": 0.5})
    filler.unlink()
    log.write(1002, {"loss": 0.0})
    assert [record["step"] for record in log.records()] == list(range(1, 1003))
    log.close()


def test_a_run_without_records_has_none(tmp_path: Path) -> None:
    """One that is shorter than logging.every, and validates nothing."""
    assert MetricsLog(tmp_path, tensorboard=False, is_main=True, first_step=0).records() == []
