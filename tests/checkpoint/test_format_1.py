"""Checkpoints carry a format: what earlier code wrote is read, what later code wrote is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from megatron_mdm.checkpoint.lazy_tensors import read
from megatron_mdm.checkpoint.manifest import FORMAT, MANIFEST, entry_of, find_fault, format_of, write_manifest
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.checkpoint.store import STATE
from megatron_mdm.config.errors import UserError
from megatron_mdm.models.parameters import EMBEDDING, FINAL_NORM, parameter_table
from tests.ranks import ProgramResult, run_program_ranks

SAMPLE = Path(__file__).parent / "format_1"
STEP = "step-00000003"


def test_tensors_are_found_by_their_earlier_names() -> None:
    run = NativeCheckpoint.open(SAMPLE / "run")
    assert format_of(run.path) == 1
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert run.lazy_tensors(kind).keys() == parameter_table(run.config.model).keys()
    with safe_open(run.path / "tensors/stage-01.tensor-00-of-02.part-000.safetensors", "pt") as file:
        assert read(run.lazy_tensors()[FINAL_NORM]).equal(file.get_tensor("3.final_norm.weight/weight"))
    with safe_open(run.path / "tensors/stage-00.tensor-01-of-02.part-000.safetensors", "pt") as file:
        second = file.get_tensor("0.word_embeddings.weight/exp_avg")  # from row 32 on, with 3 rows of padding
    whole = read(run.lazy_tensors("exp_avg")[EMBEDDING])
    assert whole.shape == (61, 16)
    assert whole[32:].equal(second[:29])


def resume(run: Path, tensor: int) -> list[ProgramResult]:
    """On another layout than that of the sample, TP2 × PP2."""
    arguments = ["--config", str(run / "config.yaml"), "--resume", f"data.train={SAMPLE / 'train.jsonl'}"]
    layout = ["parallel.pipeline=1", f"parallel.tensor={tensor}"]
    return run_program_ranks("launch/train.py", [*arguments, *layout], tensor)


def records(lines: list[str]) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in map(json.loads, lines) if "loss" in record}


@pytest.mark.parametrize("tensor", [1, 2])
def test_training_resumes(tensor: int, tmp_path: Path) -> None:
    """And is in the present format from there on."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLE / "run", run)
    results = resume(run, tensor)
    assert [result.exit_code for result in results] == [0] * tensor, results[0].stderr
    assert "resumed from" in results[0].stdout
    found = records((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    for expected in json.loads((SAMPLE / "expected.json").read_text(encoding="utf-8"))[3:]:
        for key in ("loss", "grad_norm"):
            assert found[expected["step"]][key] == pytest.approx(expected[key], rel=1e-5), (expected["step"], key)
    assert format_of(run / "checkpoints/step-00000006") == FORMAT


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line on every rank. Where a changed bit makes a later format, it is damage."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLE / "run", run)
    checkpoint = run / "checkpoints" / STEP
    files = [checkpoint / STATE, *(checkpoint / "tensors").iterdir()]
    entries = {str(path.relative_to(checkpoint)): entry_of(path) for path in files}
    write_manifest(checkpoint, entries)
    assert find_fault(checkpoint) is None
    manifest = checkpoint / MANIFEST
    later = FORMAT + 1
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace(f'"format": {FORMAT}', f'"format": {later}'), encoding="utf-8")
    assert find_fault(checkpoint) == f"{MANIFEST} is missing or unreadable"

    with monkeypatch.context() as context:
        context.setattr("megatron_mdm.checkpoint.manifest.FORMAT", later)
        write_manifest(checkpoint, entries)
    message = f"{STEP}: is in format {later}, of a later megatron-mdm; this one reads formats up to {FORMAT}"
    with pytest.raises(UserError, match=message):
        NativeCheckpoint.open(run)
    results = resume(run, 2)
    assert [result.exit_code for result in results] == [1, 1]
    assert results[0].stderr.splitlines()[-1] == f"error: {run}/checkpoints/{message}"
    assert "Traceback" not in results[0].stderr + results[1].stderr
