"""Panels of a page that runs of reinforcement learning have in place of others: rewards, lengths, the policy."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from megatron_mdm.reports.run_panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Page,
    array,
    has_values,
    line,
    not_logged,
    step_axis,
)


def rewards(axes: Axes, page: Page) -> None:
    """Of rollouts, and of greedy answers to held-out prompts."""
    curve, answers = page["curves"]["reward"], page["curves"]["answers"]
    title = "reward of completions"
    if not curve["step"] and not answers["step"]:
        return not_logged(axes, title)
    line(axes, curve["step"], curve["reward"], color=BLUE, linewidth=1.5, label="mean")
    line(axes, curve["step"], curve["best_of_group"], color=BLUE, linewidth=0.8, alpha=0.4, label="best of a group")
    line(axes, curve["step"], curve["frac_reward_zero_std"], color=GREY, linewidth=0.8, label="groups of equal rewards")
    if has_values(answers["exact_match"]):
        steps, low, high = (array(answers[key]) for key in ("step", "exact_match_low", "exact_match_high"))
        axes.fill_between(steps, low, high, color=ORANGE, alpha=0.15, linewidth=0)
        axes.plot(steps, array(answers["exact_match"]), "o-", color=ORANGE, markersize=4, label="held out, exact match")
    elif has_values(answers["validation_reward"]):
        axes.plot(
            answers["step"], array(answers["validation_reward"]), "o-", color=ORANGE, markersize=4, label="held out"
        )
    axes.set_title(title)
    axes.legend(loc="best", ncols=2)
    step_axis(axes, page)
    return None


def lengths(axes: Axes, page: Page) -> None:
    curve = page["curves"]["lengths"]
    title = "length of completions"
    if not curve["step"]:
        return not_logged(axes, title)
    line(axes, curve["step"], curve["completions/mean_length"], color=BLUE, linewidth=1.5, label="mean")
    line(axes, curve["step"], curve["completions/max_length"], color=BLUE, linewidth=0.8, alpha=0.4, label="longest")
    axes.set(title=title, ylabel="tokens", ylim=(0, None))
    step_axis(axes, page)
    axes.legend(loc="lower left")
    _share(axes, curve["step"], {"without an end": (curve["completions/clipped_ratio"], ORANGE)})
    return None


def policy(axes: Axes, page: Page) -> None:
    curve = page["curves"]["policy"]
    title = "divergence, clipped ratios"
    if not curve["step"]:
        return not_logged(axes, title)
    line(axes, curve["step"], curve["kl"], color=BLUE, linewidth=1.1, label="KL to the reference")
    if has_values(curve["entropy"]):
        line(axes, curve["step"], curve["entropy"], color=GREEN, linewidth=1.1, label="cross-entropy of masked tokens")
    axes.set(title=title, ylabel="nats per token")
    step_axis(axes, page)
    axes.legend(loc="upper left")
    _share(axes, curve["step"], {"clipped": (curve["clip_ratio/region_mean"], ORANGE)})
    return None


def _share(axes: Axes, steps: list[int], shares: dict[str, tuple[list[Any], str]]) -> None:
    """Shares on an axis of their own."""
    twin = axes.twinx()
    twin.grid(visible=False)
    for label, (values, colour) in shares.items():
        line(twin, steps, values, color=colour, linewidth=1.1, label=label)
        twin.set_ylabel(f"share {label}", color=colour)
    twin.set_ylim(0, 1)
