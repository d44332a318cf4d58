"""The checks of launch/gpu_check.sh as tests: on a machine with a GPU, `bash launch/test.sh gpu`.

Each runs in a process of its own, since CUDA does not survive a fork.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.gpu_check.checks import CHECKS
from tools.gpu_check.report import line_of, table
from tools.gpu_check.runner import run_check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, tmp_path: Path) -> None:
    check = CHECKS[name]
    command = [sys.executable, "-m", "tools.gpu_check.child", name, "cuda", str(tmp_path)]
    record = run_check(name, check.what, command, check.seconds, tmp_path)
    print(f"{line_of(record)}\n{table([record])}")
    assert record.verdict == "passed", line_of(record)
