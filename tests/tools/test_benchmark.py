"""The benchmark runs; its numbers are nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import run_program_ranks


def test_quick_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    arguments = ["vocab", "precision", "method", "--quick", "--threads", "1", "--output", str(output)]
    (result,) = run_program_ranks("tools/benchmark.py", arguments)
    assert result.exit_code == 0, result.stderr
    assert "relative difference" in result.stdout  # ours and the plain loop compute the same loss
    suites = json.loads(output.read_text(encoding="utf-8"))["suites"]
    assert suites.keys() == {"vocab", "precision", "method"}
    assert all(ratio["ratio"] > 0 for results in suites.values() for result in results for ratio in result["ratios"])


def test_unknown_suite(tmp_path: Path) -> None:
    (result,) = run_program_ranks("tools/benchmark.py", ["vocabulary"])
    assert result.exit_code == 2
    assert "no such suite: vocabulary" in result.stderr
