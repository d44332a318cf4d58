"""What is checked before training: room on the disk, one folder for all nodes, right sums, slow ranks, versions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.models.parameters import checkpoint_bytes
from megatron_mdm.parallel.cores import CoreUse, crowded_gpu_hosts
from megatron_mdm.parallel.self_test import Outcome
from megatron_mdm.training.preflight import PREFLIGHT, describe, describe_slow
from tests.ranks import run_program_ranks, run_ranks
from tests.small import small_config, small_model, write_ids


def test_every_group_is_tested_and_written_down(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 20)
    config = small_config(tmp_path, parallel={"pipeline": 2, "zero": 1}, schedule={"steps": 1})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    result = run_program_ranks("launch/train.py", ["--config", str(tmp_path / "config.yaml")], 2)[0]
    assert result.exit_code == 0, result.stderr
    assert "preflight: 2 ranks on 1 host; room for " in result.stdout
    report = json.loads((tmp_path / "run" / PREFLIGHT).read_text(encoding="utf-8"))
    groups = {"world", "pipeline", "pipeline neighbours"}  # the others are of one rank
    for rank in report["ranks"]:
        assert rank["right"] == dict.fromkeys(groups, True)
        assert set(rank["latency"]) == set(rank["transfer"]) == groups
        assert min(*rank["latency"].values(), *rank["transfer"].values(), rank["compute"]) > 0
    shapes = checkpoint_bytes(config.model)
    (stored,) = (tmp_path / "run/checkpoints").glob("step-*")
    written = sum(path.stat().st_size for path in (stored / "tensors").iterdir())
    # Padding of the vocabulary (3 of 64 rows of two tables) and headers are what the estimate leaves out.
    assert report["disk"]["checkpoint_bytes"] == shapes < written < 1.5 * shapes


def test_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path, small_disk: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 20)
    model = small_model(hidden_size=256, ffn_hidden_size=512).model_dump()
    config = small_config(tmp_path, model=model, checkpoint={"directory": str(small_disk / "run")})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    result = run_program_ranks("launch/train.py", ["--config", str(tmp_path / "config.yaml")], 2)[0]
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {small_disk / 'run'}: 0.00")
    assert "GiB are free, and a checkpoint takes" in line


def looks_for_the_folder(folder: Path) -> str:
    """On a rank: what is said where each rank's relative checkpoint.directory is a folder of its own."""
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.preflight import check_shared

    context = initialize()
    os.environ["LOCAL_RANK"] = "0"  # as the first rank of a node
    check_shared(folder, context, patience=1.0)
    mine = folder / str(context.rank)
    mine.mkdir()
    os.chdir(mine)
    Path("run").mkdir()
    with pytest.raises(UserError) as caught:
        check_shared(Path("run"), context, patience=0.5)
    return str(caught.value)


def test_folder_that_nodes_do_not_share_is_named(tmp_path: Path) -> None:
    first, second = run_ranks(looks_for_the_folder, 2, tmp_path)
    host = os.uname().nodename
    assert first == second
    assert first.startswith(f"'checkpoint.directory' run is not the same folder on {host} as on {host}; ")


def adds_up_wrong() -> str:
    """On a rank: what the self-test says where rank 1 contributes other numbers than it should."""
    from megatron_mdm.parallel import self_test
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(tensor=2))  # of 4 ranks: tensor groups 0, 1 and 2, 3; data groups 0, 2 and 1, 3
    if context.rank == 1:
        right = self_test.pattern
        self_test.pattern = lambda rank: right(rank + 1)  # a memory that returns other bits
    with pytest.raises(UserError) as caught:
        self_test.self_test(context)
    return str(caught.value)


def test_wrong_sums_name_the_group_and_its_ranks() -> None:
    messages = run_ranks(adds_up_wrong, 4)
    assert len(set(messages)) == 1
    assert messages[0].startswith("self-test: sums in the group world are wrong on rank 0 on ")


def outcomes(compute: list[float], transfer: list[float], waited: Sequence[float] = (0.0,) * 4) -> list[Outcome]:
    """Outcomes of ranks on hosts of their own, of which the last two are one."""
    hosts = ["host0", "host1", "host2", "host2"]
    cores = [CoreUse(host, [rank], True, 0.5, 1.0, waited[rank]) for rank, host in enumerate(hosts)]
    times = zip(hosts, compute, cores, transfer)
    return [
        Outcome(host, own, use, {"data": 1.0}, {"data": message}, {"data": True}) for host, own, use, message in times
    ]


def test_slow_ranks_are_named() -> None:
    even = [1.0, 1.1, 0.9, 1.0]
    assert describe_slow(outcomes(even, even)) == []
    assert describe_slow(outcomes([1.0, 1.0, 1.6, 1.0], even)) == [
        "rank 2 on host2 takes 1.6 times the median's time to compute"
    ]
    assert describe_slow(outcomes(even, [1.0, 2.0, 1.0, 1.0])) == [
        "rank 1 on host1 takes 2.0 times the median's time for all-reduces in the group data"
    ]


def test_ranks_that_waited_for_a_core_are_not_compared() -> None:
    """Those of other hosts are, with each other."""
    even = [1.0, 1.1, 0.9, 1.0]
    slow = [1.0, 1.0, 1.6, 1.0]
    assert describe_slow(outcomes(slow, even, [0.0, 0.0, 0.0, 0.3])) == []
    assert describe_slow(outcomes([9.0, 1.0, 5.0, 5.0], even, [0.0, 0.0, 0.4, 0.3])) == [
        "rank 0 on host0 takes 1.8 times the median's time to compute"
    ]
    lines = describe(outcomes(slow, even, [0.0, 0.0, 0.0, 0.3]), {"free_bytes": 9, "checkpoint_bytes": 1}, 0.1)
    reason = "rank 3 on host2 waited for a core for 30% of its time: others use them"
    assert lines[-1] == f"slow ranks are not named: {reason}"
    assert describe_slow(outcomes(slow, even, [0.3] * 4)) == []


def test_gpu_ranks_without_cores_are_warned_of() -> None:
    """As under Slurm, where a task is given one core by default."""
    uses = [CoreUse("a", [0], False, 0.1, 1.0, 0.0)] * 8 + [CoreUse("b", list(range(16)), False, 0.1, 1.0, 0.0)] * 8
    (line,) = crowded_gpu_hosts(uses)
    assert line.startswith("8 ranks on a share 1 core, though they compute on GPUs")
    assert "--cpus-per-task" in line
    assert crowded_gpu_hosts([CoreUse("a", [0], True, 0.1, 1.0, 0.0)] * 2) == []  # preflight says so in other words


def test_changed_code_is_another_code(tmp_path: Path) -> None:
    """Without a commit: one more blank in one file of a copy of the package."""
    from megatron_mdm.training.inputs import code_fingerprint, package_folder

    copy = tmp_path / "megatron_mdm"
    shutil.copytree(package_folder(), copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_fingerprint(copy) == code_fingerprint(package_folder())
    with (copy / "parallel/layout.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert code_fingerprint(copy) != code_fingerprint(package_folder())
