"""What gets its name is on the disk by then: a machine that loses power keeps old files or whole new ones."""

from __future__ import annotations

import mmap
import runpy
import sys
from pathlib import Path

import pytest

from megatron_mdm.checkpoint.direct_writer import DirectWriter, write_memory
from megatron_mdm.config.files import write_atomically
from megatron_mdm.config.load import dump_config
from tests.disk import Disk
from tests.ranks import run_ranks
from tests.small import small_config, write_ids


def test_atomic_writes(tmp_path: Path) -> None:
    with Disk() as disk:
        write_atomically(tmp_path / "new" / "a.json", "x" * 100_000)
        write_atomically(tmp_path / "new" / "a.json", "y")
    assert disk.named == [str(tmp_path / "new" / "a.json")] * 2
    assert not disk.too_early
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize("size", [1, 5000, 17 * 2**20])
def test_large_files_are_on_the_disk_when_they_are_written(size: int, tmp_path: Path) -> None:
    data = mmap.mmap(-1, size)  # begins at a page
    with Disk() as disk:
        writer = DirectWriter(tmp_path / "pieces")
        writer.write(memoryview(data))
        writer.finish()
        assert disk.synced == {(tmp_path / "pieces").stat().st_ino: size}
        writer.close()
        write_memory(tmp_path / "whole", [memoryview(data)])
        assert disk.synced[(tmp_path / "whole").stat().st_ino] == size


def watched_training(config: str) -> Disk:
    sys.argv = ["launch/train.py", "--config", config]
    with Disk() as disk:
        runpy.run_path("launch/train.py", run_name="__main__")
    return disk


def test_a_run(tmp_path: Path) -> None:
    """Every file of a checkpoint and of the run's folder, and the folders that hold their names."""
    write_ids(tmp_path / "train.jsonl", 20)
    config = small_config(tmp_path, schedule={"steps": 2}, checkpoint={"save_every": 1})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (disk,) = run_ranks(watched_training, 1, str(tmp_path / "config.yaml"))
    names = {Path(name).relative_to(tmp_path / "run").as_posix() for name in disk.named if str(tmp_path) in name}
    assert {"config.yaml", "checkpoints/step-00000001", "checkpoints/step-00000002", "summary.json"} <= names
    assert not disk.too_early
