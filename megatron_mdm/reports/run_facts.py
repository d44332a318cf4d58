"""The facts of a run as lines of text, for its page and the screen."""

from __future__ import annotations

from typing import Any


def fact_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text), in the order in which they are read; facts: those of run_summary.run_page."""
    model, method, best, calibration = (facts[key] for key in ("model", "method", "best_validation", "calibration"))
    size = "" if model["num_parameters"] is None else f"{short(model['num_parameters'])} parameters, "
    lines = [
        ("state", facts["status"] + (f": {facts['reason']}" if facts["reason"] else "")),
        ("steps", f"{facts['steps']:,} of {_planned(facts)}"),
        ("tokens", "not logged" if facts["tokens"] is None else f"{short(facts['tokens'])}, without padding"),
        ("model", f"{size}{model['num_layers']} layers × {model['hidden_size']:,}"),
        ("layout", _layout(facts["layout"])),
        ("batch", f"{facts['batch']['global_size']:,} samples a step, {facts['precision']}"),
        ("method", method["text"]),
        ("last loss", "not logged" if facts["last_loss"] is None else f"{facts['last_loss']:.4f} (smoothed)"),
        ("best validation", "no validation" if best is None else _best(best)),
    ]
    if "rollouts" in facts:  # of reinforcement learning
        lines.append(("rollouts", facts["rollouts"]))
    if calibration:
        efficiency = calibration["efficiency"]
        uniform = calibration["efficiency_of_uniform"]
        lines.append(("calibration", f"efficiency {_three(efficiency)}, uniform {_three(uniform)}"))
    lines.append(("faults", _faults(facts)))
    lines.append(("checkpoint", facts["newest_checkpoint"] or "none"))
    return lines


def short(value: float) -> str:
    """A number in three digits and a letter: 1,234,567 → 1.23 M."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:g}"


def _planned(facts: dict[str, Any]) -> str:
    if facts["planned_steps"] is not None:
        return f"{facts['planned_steps']:,}"
    return f"{facts['planned_epochs']:g} epochs"


def _layout(layout: dict[str, Any]) -> str:
    ranks = "ranks not logged" if layout["ranks"] is None else f"{layout['ranks']:,} ranks"
    data = "" if layout["data"] is None else f" × data {layout['data']:,}"
    return f"{ranks}: tensor {layout['tensor']} × pipeline {layout['pipeline']}{data}, ZeRO {layout['zero']}"


def _best(best: dict[str, Any]) -> str:
    return f"{best['loss']:.4f}" + ("" if best["step"] is None else f" at step {best['step']:,}")


def _faults(facts: dict[str, Any]) -> str:
    counts = [
        (facts["skipped_steps"], "skipped step"),
        (facts["spikes"], "spike"),
        (facts["rewinds"], "rewind"),
        (facts["straggler_reports"], "straggler"),
    ]
    found = [f"{count:,} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return ", ".join(found) or "none"


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
