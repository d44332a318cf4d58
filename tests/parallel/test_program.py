"""How programs end: which faults a launcher is to try again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.cli.launcher import exit_code
from tests.ranks import ProgramResult, run_program_ranks

PROGRAM = """
import os, sys
from megatron_mdm.parallel.groups import join_job
from megatron_mdm.parallel.program import run_program

class Panic(BaseException):
    "As pyo3_runtime.PanicException."

def main():
    joined, fault = sys.argv[1:]
    if joined == "joined":
        join_job(1.0)
    if joined == "traced":
        os.environ["MDM_TRACEBACK"] = "1"
    raise eval(fault)

run_program(main)
"""


def end(folder: Path, joined: str, fault: str) -> ProgramResult:
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    return run_program_ranks(str(program), [joined, fault])[0]


@pytest.mark.parametrize("fault", ["KeyError('x')", "RuntimeError('a\\nb')", "Panic('x')"])
def test_every_fault_before_the_ranks_join_is_a_line(fault: str, tmp_path: Path) -> None:
    """And not tried again, whatever its type."""
    result = end(tmp_path, "alone", fault)
    assert result.exit_code == 1
    line = result.stderr.strip()
    assert line.startswith(f"error: {fault.partition('(')[0]}: ")
    assert "\n" not in line
    assert "line 15)" in line
    assert "MDM_TRACEBACK=1" in line


def test_the_traceback_on_demand(tmp_path: Path) -> None:
    result = end(tmp_path, "traced", "KeyError('x')")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: KeyError: 'x'")


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("RuntimeError('Connection closed by peer')", 70),
        ("TypeError('x')", 1),
        ("RecursionError('x')", 1),
        ("Panic('x')", 1),
    ],
)
def test_later_faults_are_tried_again_where_they_may_pass(fault: str, code: int, tmp_path: Path) -> None:
    result = end(tmp_path, "joined", fault)
    assert result.exit_code == code
    assert "Traceback" in result.stderr


def test_an_internal_validation_error_keeps_its_traceback(tmp_path: Path) -> None:
    """Even before the ranks join: what a user wrote is checked where it is read."""
    result = end(tmp_path, "alone", "__import__('pydantic').TypeAdapter(int).validate_python('x')")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ValidationError" in result.stderr


def test_the_launchers_code() -> None:
    """Unknown arguments (2) are no reason to try again; ranks that were ended by others' end (-15) are none, either."""
    assert [exit_code(codes) for codes in ([1], [2, -15], [70, 1], [-9, -15], [70])] == [1, 1, 1, 75, 75]
