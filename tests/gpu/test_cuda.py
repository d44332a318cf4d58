"""A run on a GPU trains as on the CPU. Written without one at hand: see README.md's first lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mdm.config.load import dump_config
from tests.small import small_config, write_ids

pytestmark = pytest.mark.gpu
SAME_LOSS = 1e-5  # between layouts, too: sums of fp32 numbers, added in another order
METHOD = {"views": 2, "strata": "full"}


def trained(folder: Path, dtype: str, devices: str | None) -> dict[str, list[float]]:
    """Losses and gradient norms of ten steps of one rank; devices: CUDA_VISIBLE_DEVICES, "" for the CPU."""
    run = folder / f"run-{dtype}-{devices}"
    config = small_config(
        folder, diffusion=METHOD, precision={"dtype": dtype}, checkpoint={"directory": str(run)}, parallel={"zero": 1}
    )
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": os.getcwd()}
    if devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = devices
    command = [sys.executable, "launch/torchrun.py", "--nproc-per-node", "1", "launch/train.py", "--config", str(path)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: [record[key] for record in records if key in record] for key in ("loss", "grad_norm")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ids(tmp_path / "train.jsonl", 30)
    return tmp_path


def test_losses_on_a_gpu_equal_those_on_the_cpu(folder: Path) -> None:
    on_gpu, on_cpu = trained(folder, "fp32", None), trained(folder, "fp32", "")
    assert len(on_gpu["loss"]) == 10
    for key, values in on_cpu.items():
        np.testing.assert_allclose(on_gpu[key], values, rtol=SAME_LOSS, atol=SAME_LOSS, err_msg=key)


def test_bf16_trains_on_a_gpu(folder: Path) -> None:
    assert np.isfinite(trained(folder, "bf16", None)["loss"]).all()
