"""Two evaluations on the same questions: the difference of their scores, and a paired test of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy.stats import binomtest

from megatron_mdm.config.errors import UserError
from megatron_mdm.evaluation.intervals import WILSON_Z, wilson_interval

Record = dict[str, Any]
_NAMES = ("first", "second")


class Pairs(NamedTuple):
    """How many questions were answered rightly by both, the first only, the second only, neither."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def right(self) -> tuple[int, int]:
        return self.both + self.first_only, self.both + self.second_only

    @property
    def difference(self) -> float:
        """Of the shares of right answers: the second's less the first's."""
        return (self.second_only - self.first_only) / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, by the variance of a question's own difference (−1, 0, 1)."""
        variance = (self.first_only + self.second_only) / self.total - self.difference**2
        half = WILSON_Z * (variance / self.total) ** 0.5
        return self.difference - half, self.difference + half

    @property
    def p_value(self) -> float:
        """McNemar's exact test: of the questions on which they differ, each is as likely to be right."""
        differing = self.first_only + self.second_only
        return float(binomtest(self.second_only, differing).pvalue) if differing else 1.0

    def as_json(self) -> Record:
        scores = {
            name: {
                "num_right": right,
                "exact_match": right / self.total,
                "interval": wilson_interval(right, self.total),
            }
            for name, right in zip(_NAMES, self.right)
        }
        return {
            "num_questions": self.total,
            **scores,
            **self._asdict(),
            "difference": self.difference,
            "difference_interval": self.interval,
            "p_value": self.p_value,
        }

    def __str__(self) -> str:
        first, second = (100 * right / self.total for right in self.right)
        low, high = (100 * bound for bound in self.interval)
        return (
            f"exact match on {self.total:,} questions: {first:.1f} % and {second:.1f} %: {100 * self.difference:+.1f} "
            f"points, 95 % interval {low:+.1f} to {high:+.1f}, exact McNemar p = {self.p_value:.2g} "
            f"({self.first_only} right by the first only, {self.second_only} by the second only)"
        )


def read_pairs(first: Path, second: Path) -> Pairs:
    """Of two samples.jsonl as evaluations write them, or of the runs that they are in. Raises UserError where the
    questions are not the same."""
    answers = [_read(path / "samples.jsonl" if path.is_dir() else path) for path in (first, second)]
    if [question for question, _ in answers[0]] != [question for question, _ in answers[1]]:
        raise UserError(f"{first} and {second} hold answers to other questions; evaluate both with the same --data")
    verdicts = list(zip(*([is_right for _, is_right in part] for part in answers)))
    return Pairs(*(verdicts.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))


def _read(path: Path) -> list[tuple[str, bool]]:
    """(question, whether it was answered rightly) of each line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines if line.strip()]
        found = [(json.dumps(sample.get("prompt") or sample["messages"]), bool(sample["right"])) for sample in samples]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mdm evaluate writes it") from None
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{path}: not the samples of an evaluation of right answers") from None
    if not found:
        raise UserError(f"{path}: holds no answers")
    return found


def rewards_figure(records: Sequence[Record], pairs: Pairs) -> Figure:
    """Reward and validations over the steps of a run of reinforcement learning (metrics.jsonl), and the scores before
    and after it."""
    figure = Figure(figsize=(10, 4.2))
    axes, bars = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 1]})
    for key, label, style in (
        ("reward", "reward, mean of a rollout (sampled)", "-"),
        ("exact_match", "exact match, validation (greedy)", "o-"),
    ):
        found = [(record["step"], record[key]) for record in records if key in record]
        axes.plot([step for step, _ in found], [value for _, value in found], style, markersize=4, label=label)
    axes.set(xlabel="step", ylim=(0, 1), title="training")
    axes.legend(loc="lower right")
    shares = [right / pairs.total for right in pairs.right]
    bounds = [wilson_interval(right, pairs.total) for right in pairs.right]
    errors = [
        [share - low for share, (low, _) in zip(shares, bounds)],
        [high - share for share, (_, high) in zip(shares, bounds)],
    ]
    bars.bar(["before", "after"], shares, yerr=errors, capsize=6, color=["tab:grey", "tab:blue"])
    for place, share in enumerate(shares):
        bars.annotate(f"{share:.3f}", (place, 0.02), ha="center", color="white")
    bars.set(ylim=(0, 1), title=f"{pairs.total:,} held-out questions")
    figure.tight_layout()
    return figure
