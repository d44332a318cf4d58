"""Shared fixtures, and what the tiers of launch/test.sh need. Every file a test needs is made here or by the test."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.get("MDM_TEST_GPU"):  # which `bash launch/test.sh gpu` sets
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from megatron_mdm.parallel import platform

platform.quiet_libraries()

MARKERS = {
    "alone": "measures time, or acts at an instant: nothing else may run on the machine",
    "gpu": "needs a CUDA device",
}
# Begun first where files are shared out among processes, so that none of these is left over at the end.
LONGEST = (
    "training/test_layouts.py",
    "launch/test_two_nodes.py",
    "launch/test_launchers.py",
    "training/test_resume.py",
    "diffusion/test_estimators.py",
    "cuda/test_layouts.py",
    "engine/test_memory.py",
    "training/test_faults.py",
    "training/test_methods.py",
    "training/test_lora.py",
    "engine/test_precisions.py",
    "engine/test_communication.py",
    "cli/test_wheel.py",
    "launch/test_pipeline.py",
    "tools/test_benchmark.py",
    "test_unchanged.py",
)


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = Path(__file__).parent
        place = {folder / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
    if not torch.cuda.is_available():
        reason = "needs a CUDA device; on a machine that has one: bash launch/test.sh gpu"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB of its own: room for one small checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
