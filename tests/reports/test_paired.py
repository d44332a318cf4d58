"""Two evaluations on the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import binom

from megatron_mdm.cli.report import report_pair
from megatron_mdm.config.errors import UserError
from megatron_mdm.reports.paired import Pairs, read_pairs, rewards_figure


def write(path: Path, *right: bool, first: int = 0) -> Path:
    samples = [{"prompt": f"question {first + number}", "right": is_right} for number, is_right in enumerate(right)]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def test_pairs_are_counted_and_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.jsonl", *[True] * 40, *[True] * 5, *[False] * 20, *[False] * 35)
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/samples.jsonl", *[True] * 40, *[False] * 5, *[True] * 20, *[False] * 35)
    pairs = read_pairs(first, tmp_path / "run")
    assert pairs == Pairs(both=40, first_only=5, second_only=20, neither=35)
    assert pairs.right == (45, 60)
    assert pairs.difference == pytest.approx(0.15)
    assert pairs.p_value == pytest.approx(2 * binom.cdf(5, 25, 0.5))
    # A question's difference is -1, 0 or 1: of mean 0.15 and variance 0.25 - 0.15²
    half = 1.96 * ((0.25 - 0.15**2) / 100) ** 0.5
    assert pairs.interval == pytest.approx((0.15 - half, 0.15 + half))
    assert Pairs(3, 0, 0, 4).p_value == 1.0
    report_pair(first, tmp_path / "run", None, tmp_path / "pair")
    written = json.loads((tmp_path / "pair.json").read_text())
    assert written["second"]["exact_match"] == 0.6
    assert written["p_value"] == pairs.p_value
    line = capsys.readouterr().out
    assert "exact match on 100 questions: 45.0 % and 60.0 %: +15.0 points" in line
    assert rewards_figure([{"step": 1, "reward": 0.5}, {"step": 2, "exact_match": 0.5}], pairs).axes[1].patches


def test_other_questions_and_files_that_are_no_samples_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", True, False)
    with pytest.raises(UserError, match="hold answers to other questions"):
        read_pairs(first, write(tmp_path / "b.jsonl", True, False, first=1))
    with pytest.raises(UserError, match=r"nowhere/samples\.jsonl|nowhere: cannot be read"):
        read_pairs(first, tmp_path / "nowhere")
    for content, message in (("", "holds no answers"), ("{}\n", "not the samples"), ("x\n", "not the samples")):
        (tmp_path / "c.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_pairs(first, tmp_path / "c.jsonl")
