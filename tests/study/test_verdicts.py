"""Verdicts and tables from studies that are made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.evaluation.intervals import Interval
from megatron_mdm.study.report import write_report
from megatron_mdm.study.scores import Scores
from megatron_mdm.study.tables import Table, all_tables, as_csv, as_latex, as_markdown
from megatron_mdm.study.verdicts import FAILS, HOLDS, UNKNOWN, above, below, rankings, verdicts

CLAIMS = {"standard": "s", "ppots": "p", "mirror": "m", "both": "b", "clipped": "c", "causal": "a", "ours": ["o"]}
PARTS = [
    {"name": "samples", "methods": ["s"]},
    {"name": "compute", "methods": ["s"], "budget": "compute"},
]


def run(task: str, method: str, seed: int, score: float, part: str = "samples", error: float = 0.01) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "lr_factor": 1.0,
        "batch_factor": 1.0,
        "pace": "",
        "steps": 10,
        "best_validation_loss": 0.5,
        "score": score,
        "standard_error": error,
        "parts": [part],
        "variance_of_loss_eq_23": 2.0,
        "variance_of_estimator": 1.0,
        "seconds": {"steps": 10.0, "calibration": 1.0, "evaluation": 1.0},
        "curves": {
            "efficiency": {"step": [5], "validation_efficiency": [0.9]},
            "validation": {"step": [5, 10], "validation_loss": [1.0 - score, 0.5]},
        },
        "calibration": None,
    }


def study(scores: dict[str, dict[str, list[float]]], part: str = "samples", **record: Any) -> Scores:
    """scores: by task and method, of seeds 0, 1, …"""
    runs = [
        run(task, method, seed, value, part)
        for task, methods in scores.items()
        for method, values in methods.items()
        for seed, value in enumerate(values)
    ]
    task = {"bases": {"first": ""}, "measure": "gsm8k", "test": "t"}
    lengths = {"short": 5.0, "long": 50.0}
    settings = {
        "folder": "f",
        "config": "c",
        "tasks": {name: {**task, "response_tokens": lengths.get(name, 0.0)} for name in scores},
        "methods": {name: {} for name in "spmbcao"},
        "parts": PARTS,
        "claims": CLAIMS,
    }
    return Scores({"settings": settings, "runs": runs, "failed": [], "num_asked": len(runs), "variance": [], **record})


def verdict_of(scores: Scores, begins: str, task: str = "x") -> list[str]:
    return [found.verdict for found in verdicts(scores) if found.claim.startswith(begins) and found.task == task]


@pytest.mark.parametrize(
    ("interval", "expected"), [((1, 0.5, 2), HOLDS), ((-1, -2, -0.5), FAILS), ((1, -1, 3), UNKNOWN)]
)
def test_a_verdict_follows_from_the_interval(interval: tuple[float, float, float], expected: str) -> None:
    assert above(Interval(*interval)) == expected
    assert below(Interval(*(-value for value in (interval[0], interval[2], interval[1]))), 0.0) == expected


def test_the_papers_figures_on_gsm8k_hold() -> None:
    """Standard 50.64 to 53.68, both 58.61 to 62.02, with some 1.3 points of error from 1,319 questions."""
    values = {"x": {"s": [0.5064, 0.5321, 0.5368], "b": [0.5861, 0.6096, 0.6202]}}
    scores = study(values)
    assert verdict_of(scores, "the worst seed of P-POTS + MIRROR") == [HOLDS]
    assert verdict_of(scores, "P-POTS + MIRROR's spread over seeds is less") == [UNKNOWN]  # of three seeds each


def test_synergy_and_clipped() -> None:
    gains = {"s": [0.50, 0.51], "p": [0.52, 0.53], "m": [0.51, 0.52], "b": [0.70, 0.71], "c": [0.60, 0.61]}
    found = study({"x": gains})
    assert verdict_of(found, "P-POTS and MIRROR together") == [HOLDS]
    assert verdict_of(found, "Clipped is between") == [HOLDS, HOLDS]
    less = study({"x": {**gains, "b": [0.51, 0.52], "c": [0.60, 0.61]}})
    assert verdict_of(less, "Clipped is between") == [HOLDS, FAILS]


def test_mirror_helps_long_responses_more() -> None:
    tasks = {"short": {"s": [0.50, 0.51], "m": [0.50, 0.51]}, "long": {"s": [0.50, 0.51], "m": [0.80, 0.81]}}
    assert verdict_of(study(tasks), "MIRROR helps long", "") == [HOLDS]
    assert verdict_of(study({"long": tasks["long"]}), "MIRROR helps long", "") == []


def test_equal_compute_is_asked_of_its_own_runs() -> None:
    values = {"x": {"s": [0.50, 0.501], "b": [0.48, 0.481], "o": [0.55, 0.551]}}
    found = study(values, "compute")
    assert verdict_of(found, "b is better than Standard at equal compute") == [FAILS]
    assert verdict_of(found, "o is better than Standard at equal compute") == [HOLDS]
    assert verdict_of(found, "the best of ours is better than Standard at") == [HOLDS]
    assert verdict_of(study(values), "o is better") == []


def test_a_lower_validation_loss_is_better() -> None:
    """Losses of the runs made here are 1 less the score."""
    found = study({"x": {"s": [0.50, 0.501], "o": [0.55, 0.551]}}, "compute")
    for each in found.runs:
        each["best_validation_loss"] = 1.0 - each["score"]
    assert verdict_of(found, "the best of ours is better than Standard in validation loss") == [HOLDS]


def test_the_best_of_ours_is_one_of_those_with_the_most_runs() -> None:
    found = study({"x": {"s": [0.50, 0.501], "o": [0.55, 0.551], "m": [0.9]}}, "compute")
    claims = found.settings.claims.model_copy(update={"ours": ["m", "o"]})
    found.settings = found.settings.model_copy(update={"claims": claims})
    (verdict,) = (
        each for each in verdicts(found) if each.claim.startswith("the best of ours is better than Standard at")
    )
    assert (verdict.quantity, verdict.verdict) == ("gain of o, bound to bound", HOLDS)


def test_ranks_are_of_variance_times_passes() -> None:
    rows = [
        {"name": name, "passes": passes, "gradient": [ratio, ratio, ratio]}
        for name, passes, ratio in (("s", 1, 1.0), ("m", 2, 0.6), ("o", 1, 0.8), ("p", 1, 0.9))
    ]
    scores = {"x": {"s": [0.5], "m": [0.4], "o": [0.7], "p": [0.6]}}
    (ranking,) = rankings(study(scores, variance=[{"task": "x", "rows": rows}]))
    assert ranking.variance == [1.0, 1.2, 0.8, 0.9]
    assert ranking.correlation.estimate == pytest.approx(1.0)


def test_everything_is_written_from_the_record_alone(tmp_path: Path) -> None:
    scores = study({"x": {"s": [0.5, 0.52], "b": [0.6, 0.61]}})
    record = {
        "settings": scores.settings.model_dump(mode="json"),
        "runs": scores.runs,
        "failed": [{"task": "x", "method": "m", "seed": 1, "error": "a | b"}],
        "num_asked": 5,
        "variance": [],
    }
    written = {str(path.relative_to(tmp_path)) for path in write_report(record, tmp_path)}
    assert {"tables.md", "tables/claims.tex", "tables/scores_samples.csv", "pictures/scores.png"} <= written
    page = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "4 of 5 runs are done, 1 have failed" in page
    assert "| s | 51.00 (50.00 to 52.00) ± 12.71 [2] |" in page
    assert "a ∣ b" in page
    runs = (tmp_path / "tables" / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert runs[2] == "x,s,1,1.0,1.0,,10,0.52,0.01,0.5,10.0,1.0,1.0"


def test_forms_of_a_table() -> None:
    table = Table("t", "A title", ("a_b", "c"), [("50 %", "1–2 ± 3")], "A note.")
    assert as_markdown(table).split("\n")[2:5] == ["| a_b | c |", "| --- | --- |", "| 50 % | 1–2 ± 3 |"]
    assert r"a\_b & c \\" in as_latex(table)
    assert r"50 \% & 1--2 $\pm$ 3 \\" in as_latex(table)
    assert as_csv(table) == "a_b,c\n50 %,1–2 ± 3\n"


def test_a_method_without_runs_has_a_dash() -> None:
    tables = all_tables(study({"x": {"s": [0.5, 0.6]}, "y": {"s": [0.5], "m": [0.4]}}))
    (scores,) = (table for table in tables if table.name == "scores_samples")
    assert scores.rows[1] == ("m", "–", "40.00 [1]")
