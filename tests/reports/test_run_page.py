"""The page of a run and its JSON: of a finished run, of one that was killed, and with all that may be logged."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.load import dump_config
from tests.ranks import run_program_ranks
from tests.small import small_config, write_ids

NUM_STEPS = 12
DIFFUSION = {
    "t_sampler": "ppots",
    "views": 2,
    "strata": "full",
    "calibration": {"num_samples": 4, "num_times": 8, "num_masks": 2, "initial_forwards": 32},
}


def train(folder: Path, **sections: Any) -> Path:
    """A run on two ranks; its folder."""
    write_ids(folder / "train.jsonl", 40)
    write_ids(folder / "validation.jsonl", 8, seed=1)
    config = small_config(
        folder,
        data={"validation": str(folder / "validation.jsonl")},
        schedule={"steps": NUM_STEPS},
        checkpoint={"save_every": 4},
        **sections,
    )
    (folder / "mine.yaml").write_text(dump_config(config), encoding="utf-8")
    for result in run_program_ranks("launch/train.py", ["--config", str(folder / "mine.yaml")], 2):
        assert result.exit_code == 0, result.stderr
    return folder / "run"


def report(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """run.json's content and what the program prints. The picture has to be one."""
    result = run_program_ranks("tools/report.py", ["run", str(folder), *arguments])[0]
    assert result.exit_code == 0, result.stderr
    picture = Path(arguments[1]) if arguments else folder / "run.png"
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1500
    assert height > 1000
    return json.loads(picture.with_suffix(".json").read_text(), parse_constant=pytest.fail), result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    evaluation = {"every": 4, "num_samples": 4, "num_times": 2}
    return train(tmp_path_factory.mktemp("trained"), diffusion=DIFFUSION, evaluation=evaluation)


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_finished_run(trained: Path) -> None:
    page, printed = report(trained)
    facts = page["facts"]
    curves = page["curves"]
    records = records_of(trained)
    losses = [record["loss"] for record in records if "loss" in record]
    assert curves["loss"]["loss"] == losses
    assert curves["loss"]["loss_smoothed"][5] == pytest.approx(sum(losses[4:7]) / 3)
    assert len(curves["loss_by_t"]["loss_by_t"]) == NUM_STEPS
    validated = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    assert curves["validation"] == {"step": list(validated), "validation_loss": list(validated.values())}
    best = min(validated, key=lambda step: validated[step])
    assert facts["best_validation"] == {"loss": validated[best], "step": best}
    assert facts["status"] == "finished"
    assert facts["steps"] == facts["planned_steps"] == NUM_STEPS
    assert facts["newest_checkpoint"] == "step-00000012"
    assert page["marks"]["checkpoints"] == [8, 12]
    assert facts["calibration"]["efficiency"] == json.loads((trained / "calibration.json").read_text())["efficiency"]
    # Table and head 2 × 61 × 32, a final norm, and per layer two norms, q, k, v, the output and three of the MLP.
    layer = 2 * 32 + 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64
    assert facts["model"]["num_parameters"] == 2 * 61 * 32 + 32 + 2 * layer
    assert "state: finished" in printed
    assert "calibration efficiency:" in printed


def test_killed_run(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    absent = ("summary.json", "step-00000012", "calibration.*", "run.*")
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(*absent))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if json.loads(line)["step"] == 10)
    (folder / "metrics.jsonl").write_text("\n".join(lines[:place]) + "\n" + lines[place][:40])
    output = tmp_path / "elsewhere" / "page.png"
    page, printed = report(folder, "--output", str(output))
    assert page["facts"]["status"] == "unfinished"
    assert page["facts"]["steps"] == 9  # step 10's line is cut
    assert page["facts"]["planned_steps"] == NUM_STEPS
    assert page["facts"]["calibration"] is None
    assert f"page: {output}" in printed
    assert not (folder / "run.png").exists()


def test_summary_of_an_interrupted_part_does_not_speak_for_the_run(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(trained, folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": 6, "stopped_early": "stopped by SIGTERM"}))
    assert report(folder)[0]["facts"]["status"] == "unfinished"
    (folder / "summary.json").write_text(json.dumps({**summary, "stopped_early": "stopped by SIGTERM"}))
    facts = report(folder)[0]["facts"]
    assert (facts["status"], facts["reason"]) == ("stopped early", "stopped by SIGTERM")


def test_run_that_a_fault_ended(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "failed"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("summary.json"))
    path = folder / "checkpoints" / "step-00000012" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "train": {**state["train"], "failure": "5 steps in a row", "num_skipped": 5}}))
    facts = report(folder)[0]["facts"]
    assert (facts["status"], facts["reason"], facts["skipped_steps"]) == ("stopped early", "5 steps in a row", 5)


def test_everything_logged(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logged"
    shutil.copytree(trained, folder)
    times = {"data": 0.01, "forward": 0.2, "backward": 0.4, "optimizer": 0.1, "pipeline": 0.0, "other": 0.04}
    lines = []
    for record in records_of(trained):
        if "loss" in record:
            record |= {f"time_{part}": seconds for part, seconds in times.items()}
            record |= {"time_step": 0.75, "mfu": 0.4, "tokens_per_second": 1000.0}
        lines.append(record)
    for step, busy in ((4, [0.5, 0.5, 0.7, 0.5]), (8, [0.6, 0.5, 0.9, 0.5])):
        ranks = {"time_busy_by_rank": busy, "time_communication_by_rank": [1.0 - seconds for seconds in busy]}
        lines.append({"step": step, **ranks, "memory_gib_by_rank": [1.0, 2.0, 3.0, 4.0], "slowest_rank": 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    faults = [
        {"step": 3, "kind": "skipped", "loss": "nan", "grad_norm": "inf", "sample_ids": [1], "in_a_row": 1},
        {"step": 7, "kind": "spike", "loss": "9.0", "grad_norm": "1.0", "score": 12.0, "sample_ids": [2]},
        {"step": 7, "kind": "rewind", "to_step": 4, "batches": [4, 6]},
        {"step": 8, "kind": "straggler", "rank": 2, "host": "node-1", "busy": 0.9, "median": 0.55},
    ]
    (folder / "faults.jsonl").write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    page, printed = report(folder)
    facts = page["facts"]
    ranks = page["ranks"]
    marks = page["marks"]
    assert ranks["busy"] == [0.6, 0.5, 0.9, 0.5]
    assert (ranks["step"], ranks["slowest_rank"], ranks["num_samples"]) == (8, 2, 2)
    assert ranks["busy_spread"][2] == pytest.approx([0.72, 0.88])  # 10th and 90th percentile of 0.7 and 0.9
    assert ranks["memory_gib"] == [1.0, 2.0, 3.0, 4.0]
    assert facts["layout"] == {"ranks": 4, "tensor": 1, "pipeline": 1, "data": 4, "zero": 1}
    assert facts["tokens"] == max(record.get("tokens", 0) for record in records_of(trained)) > 0
    assert page["curves"]["step_time"]["time_backward"] == [0.4] * NUM_STEPS
    assert page["curves"]["throughput"]["mfu"] == [0.4] * NUM_STEPS
    assert (marks["skipped"], marks["spikes"]) == ([3], [7])
    assert marks["rewinds"] == [{"step": 7, "to_step": 4, "batches": [4, 6]}]
    assert [mark["rank"] for mark in marks["stragglers"]] == [2]
    assert "faults: 1 skipped step, 1 spike, 1 rewind, 1 straggler" in printed


def test_autoregressive_run_without_validation(tmp_path: Path) -> None:
    model = {"attention": "causal"}
    page, printed = report(train(tmp_path, objective={"name": "autoregressive"}, model=model))
    assert page["facts"]["method"]["objective"] == page["facts"]["method"]["name"] == "autoregressive"
    assert page["facts"]["best_validation"] is None
    assert page["curves"]["validation"]["step"] == []
    assert "best validation: no validation" in printed


def test_folders_of_no_run(tmp_path: Path) -> None:
    for error in ("not a run's folder (no config.yaml)", "nothing is logged yet"):
        result = run_program_ranks("tools/report.py", ["run", str(tmp_path)])[0]
        assert result.exit_code == 1
        assert error in result.stderr
        assert len(result.stderr.splitlines()) == 1
        (tmp_path / "config.yaml").write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
