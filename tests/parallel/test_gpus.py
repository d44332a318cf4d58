"""Where a machine has GPUs that torch does not find, nothing trains on the CPU unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.gpus import check_gpus, check_number, gpus
from megatron_mdm.parallel.peaks import Peak, peak_of
from tests.ranks import run_program_ranks

LISTED = """#!/usr/bin/env bash
echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'
echo '  MIG 1g.10gb     Device  0: (UUID: MIG-1)'
echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)'
"""
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds this machine's GPUs")


@pytest.fixture
def two_gpus(tmp_path: Path) -> str:
    """A PATH with a stand-in for nvidia-smi."""
    program = tmp_path / "nvidia-smi"
    program.write_text(LISTED, encoding="utf-8")
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_gpus_are_known_by_their_device_files(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert gpus(tmp_path) == [str(tmp_path / "nvidia0"), str(tmp_path / "nvidia1")]


@without_cuda
def test_gpus_that_torch_does_not_find_are_an_error(two_gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpus()
    monkeypatch.setenv("PATH", two_gpus)
    with pytest.raises(
        UserError, match=r"^this machine has 2 NVIDIA GPUs \(.* …\), but torch .* CUDA_VISIBLE_DEVICES= "
    ):
        check_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on purpose
    check_gpus()


@without_cuda
def test_ranks_do_not_train_on_the_cpu_unasked(two_gpus: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import os\nos.environ['PATH'] = {two_gpus!r}\nos.environ.pop('CUDA_VISIBLE_DEVICES', None)\n"
        "from megatron_mdm.parallel.groups import initialize\n"
        "from megatron_mdm.parallel.program import run_program\n"
        "run_program(initialize)\n",
        encoding="utf-8",
    )
    for result in run_program_ranks(str(program), [], 2):
        assert result.exit_code == 1
        assert "error: this machine has 2 NVIDIA GPUs" in result.stderr
        assert result.stderr.count("\n") == 1


def test_more_ranks_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    check_number(0, 1)
    with pytest.raises(
        UserError, match=r"^rank 1 of .* has no GPU: torch sees 1 there \(CUDA_VISIBLE_DEVICES=MIG-1,MIG-2\)"
    ):
        check_number(1, 1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", Peak(312, 156, 19.5)),
        ("NVIDIA H100 80GB HBM3", Peak(989, 494.7, 66.9)),
        ("NVIDIA H100 PCIe", Peak(756, 378, 51.2)),
        ("NVIDIA H100 NVL", Peak(835.5, 417.5, 60)),
        ("NVIDIA H200", Peak(989, 494.7, 66.9)),
        ("NVIDIA H200 NVL", Peak(835.5, 417.5, 60)),
        ("NVIDIA B200", Peak(2250, 1125, 75)),
        ("NVIDIA GB200", Peak(2500, 1250, 80)),
        ("NVIDIA L40S", Peak(362, 183, 91.6)),
        ("Tesla V100-PCIE-16GB", Peak(112, 14, 14)),
        ("NVIDIA A10G", Peak(0, 0, 0)),
        ("NVIDIA GeForce RTX 4090", Peak(0, 0, 0)),
    ],
)
def test_peaks_are_those_of_the_device(name: str, peak: Peak) -> None:
    assert peak_of(name) == peak
