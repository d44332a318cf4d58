"""The program that checks a GPU, on the CPU at small sizes: its checks, and what it makes of those that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_mdm.models.attention import ANY, EXECUTORS, Rows, fused
from tests.ranks import run_program_ranks, run_ranks
from tools.gpu_check import checks, report, runner, trace, varlen, versions
from tools.gpu_check.head import OF_TRAINING, WITH_TRITON
from tools.gpu_check.outcome import Outcome, Setting

PROGRAM = "tools/gpu_check/__main__.py"
ELSEWHERE = {"watchdog"}  # tests/parallel/test_watchdog.py; it starts a process that imports all
PRETENDED = ("varlen", "padded", "resume")
GPU_ONLY = {"compiled", "shapes", "trace"}


def run_checks(folder: Path) -> dict[str, Outcome]:
    """On a rank: every check but those of ELSEWHERE, as their processes run them."""
    names = [name for name in checks.CHECKS if name not in ELSEWHERE]
    return {name: checks.run_here(name, Setting("cpu", True, folder / name)) for name in names}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    (found,) = run_ranks(run_checks, 1, tmp_path_factory.mktemp("gpu_check"))
    return found


def run_pretended(folder: Path) -> dict[str, Outcome]:
    """On a rank: some checks on a CUDA device that is pretended (tests/cuda), in 16 bit."""
    from tests.cuda.pretended import install

    install()
    return {name: checks.run_here(name, Setting("cuda", True, folder / name)) for name in PRETENDED}


@pytest.mark.parametrize("name", [name for name in checks.CHECKS if name not in ELSEWHERE])
def test_checks_pass_on_the_cpu(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert not outcome.faults
    assert bool(outcome.skipped) == (name in GPU_ONLY)
    assert outcome.figures or outcome.skipped
    json.dumps(outcome.figures, allow_nan=False)


def test_figures_are_those_of_the_subject(outcomes: dict[str, Outcome]) -> None:
    errors = outcomes["varlen"].figures["relative error"]
    assert {"MHA, bfloat16", "MHA, causal, bfloat16", "GQA, bfloat16", "GQA, causal, bfloat16"} < errors.keys()
    assert 0 < errors["GQA, causal, bfloat16"]["gradients of keys"] < 2.0**-7
    head = outcomes["head"].figures
    assert head.keys() == {OF_TRAINING, "16 rows", "64 rows", WITH_TRITON}
    assert head["16 rows"]["error of the head's gradient"] > 0
    assert outcomes["quickstart"].figures["fp32, loss"] == outcomes["quickstart"].figures["CPU, fp32, loss"]
    assert outcomes["resume"].figures["weights and moments are the same bits"]
    assert outcomes["speed"].figures["125m"].keys() > {"tokens/s", "step time, MIRROR / standard"}


def test_checks_on_a_pretended_gpu(tmp_path: Path) -> None:
    (outcomes,) = run_ranks(run_pretended, 1, tmp_path)
    assert not [fault for outcome in outcomes.values() for fault in outcome.faults]
    attention = outcomes["varlen"].figures["relative error"]
    assert "GQA, causal, float16" in attention
    assert "ms, forward and backward, by the kernel for any lengths" in attention["of one length, MHA, bfloat16"]
    assert "peak MiB" in outcomes["padded"].figures["GQA"]["the layers' choice"]
    assert outcomes["resume"].figures["weights and moments are the same bits"]


def test_attention_that_crosses_segments_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(EXECUTORS, ("segments", "cpu", ANY), Rows(fused))
    faults = varlen.check(Setting("cpu", True, tmp_path)).faults
    assert any("more than rounding" in fault for fault in faults)


def test_missing_arguments_are_named() -> None:
    name = "torch.nn.functional.scaled_dot_product_attention"
    assert versions.missing_arguments(name, ("scale", "colour")) == ["colour"]
    assert versions.missing_arguments("torch.nn.no_such_function", ("scale",)) == ["scale"]


def test_gaps_between_kernels() -> None:
    spans = [(50_000, 70_000), (0, 20_000), (10_000, 35_000), (72_000, 100_000)]
    gaps = trace.gaps_between(spans)
    assert gaps == trace.Gaps(busy=pytest.approx(0.83), num_long=1, longest=15_000, total=17_000)
    assert trace.gaps_between([]).busy == 0.0


def run(folder: Path, code: str, seconds: float = 20.0) -> runner.Record:
    return runner.run_check("name", "what it is about", [sys.executable, "-c", code], seconds, folder)


def test_a_check_that_crashes_or_never_ends_is_reported(tmp_path: Path) -> None:
    crashed = run(tmp_path / "crashed", "print('begun'); raise RuntimeError('no kernel image')")
    assert (crashed.verdict, crashed.figures) == ("failed", {})
    assert "exit code 1: RuntimeError: no kernel image" in crashed.faults[0]
    pid = tmp_path / "pid"
    other = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    hangs = run(
        tmp_path / "hangs",
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {other!r}]); time.sleep(60)",
        seconds=1.0,
    )
    assert hangs.verdict == "failed"
    assert "killed after 1 s, its limit" in hangs.faults[0]
    silent = run(tmp_path / "silent", "")
    assert silent.verdict == "failed"  # it left no outcome
    assert not is_running(int(pid.read_text(encoding="utf-8")))


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"


def test_verdicts_and_the_report(tmp_path: Path) -> None:
    made = {
        "good": Outcome({"ms": 1.23456789, "by rows": {"128": [1, 2]}}),
        "bad": Outcome({"error": 0.5}, ["the error is 0.5"]),
        "absent": Outcome({}, skipped="there is none here"),
    }
    records = []
    for name, outcome in made.items():
        path = str(tmp_path / name / "outcome.json")
        code = f"open({path!r}, 'w').write({json.dumps(vars(outcome))!r})"
        records.append(runner.run_check(name, f"about {name}", [sys.executable, "-c", code], 20.0, tmp_path / name))
    assert [record.verdict for record in records] == ["passed", "failed", "skipped"]
    assert "FAILED: the error is 0.5" in report.line_of(records[1])
    assert report.line_of(records[2]).endswith("about absent: there is none here")
    lines = report.table(records).splitlines()
    assert any(line.split() == ["ms", "1.2346"] for line in lines)
    assert any(line.split() == ["by", "rows,", "128", "1,", "2"] for line in lines)
    assert lines[-1] == "1 passed, 1 failed, 1 skipped"
    report.write(tmp_path / "gpu_check.json", {"device": "cpu"}, records)
    written = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert written["checks"]["bad"]["faults"] == ["the error is 0.5"]
    assert written["checks"]["good"]["figures"]["ms"] == 1.23456789


def test_all_checks_end_within_ten_minutes() -> None:
    assert sum(check.seconds for check in checks.CHECKS.values()) <= 590
    for name in checks.CHECKS:
        assert Path(f"tools/gpu_check/{name}.py").is_file()


def test_the_program(tmp_path: Path) -> None:
    output = tmp_path / "gpu_check.json"
    arguments = ["--device", "cpu", "--quick", "--output", str(output), "--folder", str(tmp_path / "work")]
    (result,) = run_program_ranks(PROGRAM, ["versions", *arguments])
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "passed  versions" in result.stdout
    assert json.loads(output.read_text(encoding="utf-8"))["checks"]["versions"]["figures"]["torch"] == torch.__version__


def test_without_a_gpu_it_says_what_is_missing() -> None:
    (result,) = run_program_ranks(PROGRAM, [])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: torch")
    assert "--device cpu --quick" in result.stderr
    (result,) = run_program_ranks(PROGRAM, ["varlin"])
    assert result.exit_code == 2
    assert "no such check: varlin" in result.stderr
