"""The benchmark runs; its numbers are nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import run_program_ranks

PROGRAM = "tools/benchmarks/__main__.py"


def test_quick_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    arguments = ["vocab", "precision", "method", "--quick", "--threads", "1", "--output", str(output)]
    (result,) = run_program_ranks(PROGRAM, ["steps", *arguments])
    assert result.exit_code == 0, result.stderr
    assert "relative difference" in result.stdout  # ours and the plain loop compute the same loss
    suites = json.loads(output.read_text(encoding="utf-8"))["suites"]
    assert suites.keys() == {"vocab", "precision", "method"}
    assert all(ratio["ratio"] > 0 for results in suites.values() for result in results for ratio in result["ratios"])


def test_unknown_suite(tmp_path: Path) -> None:
    (result,) = run_program_ranks(PROGRAM, ["steps", "vocabulary"])
    assert result.exit_code == 2
    assert "no such suite: vocabulary" in result.stderr


def test_the_list_of_benchmarks() -> None:
    (known,), (unknown,) = run_program_ranks(PROGRAM, ["--help"]), run_program_ranks(PROGRAM, ["step"])
    assert known.exit_code == 0
    for path in Path("tools/benchmarks").glob("*.py"):
        if "def main(" in path.read_text(encoding="utf-8") and path.name != "__main__.py":
            assert f"  {path.stem} " in known.stdout
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith("error: no such benchmark: step\n")


def test_lengths_need_data_and_tokenizer(tmp_path: Path) -> None:
    (result,) = run_program_ranks(PROGRAM, ["steps", "vocab", "--gsm8k", str(tmp_path / "absent.jsonl")])
    assert result.exit_code == 2
    assert "--gsm8k and --tokenizer go together" in result.stderr
