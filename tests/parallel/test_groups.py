"""Groups are made once, and only those that are used; a rank alone communicates with nobody."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mdm.config.schema import ParallelConfig, RunConfig
from megatron_mdm.parallel.communicators import LARGER_BYTES, PAIR_BYTES, communicator_bytes, groups_of, num_neighbours
from megatron_mdm.parallel.groups import why_not_joined
from megatron_mdm.parallel.layout import Layout
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

BUILT = Layout(tensor=2, pipeline=2)


def collectives_alone() -> list[list[float]]:
    """On one rank: what each collective leaves."""
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.parallel.single_rank import SINGLE

    context = initialize()
    assert dist.get_backend(context.data_group) == SINGLE
    found = []
    one = torch.tensor([1.0, 2.0])

    def keep(call: Any, *outputs: torch.Tensor) -> None:
        for is_async in (False, True):
            for output in outputs:
                output.zero_()
            work = call(is_async)
            if is_async:
                assert work.wait() is not False
                assert work.is_completed()
            found.extend(output.tolist() for output in outputs)

    for group in (None, context.tensor_group):
        mine = one.clone()
        dist.all_reduce(mine, group=group)
        dist.all_reduce(mine, op=dist.ReduceOp.AVG, group=group)
        dist.reduce(mine, 0, group=group)
        dist.broadcast(mine, 0, group=group)
        found.append(mine.tolist())
        out = torch.empty(2)
        keep(lambda later, g=group, o=out: dist.all_gather_into_tensor(o, one, group=g, async_op=later), out)
        keep(lambda later, g=group, o=out: dist.reduce_scatter_tensor(o, one, group=g, async_op=later), out)
        keep(lambda later, g=group, o=out: dist.all_to_all_single(o, one, group=g, async_op=later), out)
        keep(lambda later, g=group, o=out: dist.all_gather([o], one, group=g, async_op=later), out)
        keep(lambda later, g=group, o=out: dist.reduce_scatter(o, [one], group=g, async_op=later), out)
        keep(lambda later, g=group, o=out: dist.gather(one, [o], 0, group=g, async_op=later), out)
        keep(lambda later, g=group, o=out: dist.scatter(o, [one], 0, group=g, async_op=later), out)
        with dist.distributed_c10d._coalescing_manager(group, torch.device("cpu")):
            dist.all_gather_into_tensor(out.zero_(), one, group=group)
        found.append(out.tolist())
        objects: list[Any] = [None]
        dist.all_gather_object(objects, [1.0, 2.0], group=group)
        found += objects
        dist.barrier(group)
    return found


def test_a_rank_alone_has_what_it_gives() -> None:
    (found,) = run_ranks(collectives_alone, 1)
    assert len(found) == 2 * (1 + 7 * 2 + 2)
    assert found == [[1.0, 2.0]] * len(found)


def groups_of_an_engine(config: RunConfig) -> tuple[list[tuple[int, ...]], int]:
    """On a rank: the groups that it is in once there is an engine, and how many were made by then on all ranks."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel)
    restored_engine(None, config, context, 0)
    initialize(ParallelConfig(tensor=2))  # whose groups of four ranks are there
    world = dist.distributed_c10d._world
    return [tuple(ranks) for ranks in world.pg_group_ranks.values() if context.rank in ranks], world.group_count


def test_a_pipeline_makes_each_group_once(tmp_path: Path) -> None:
    """By themselves, megatron-core and DeepSpeed make 85 for 8 ranks in three axes, 21 of several ranks for each."""
    write_ids(tmp_path / "train.jsonl", 20)
    parallel = {"tensor": 2, "pipeline": 2, "zero": 1}
    model = small_model(tie_embeddings=True).model_dump()
    config = small_config(tmp_path, model=model, parallel=parallel)
    for rank, (groups, made) in enumerate(run_ranks(groups_of_an_engine, 4, config)):
        several = Counter(group for group in groups if len(group) > 1)
        assert set(several) == groups_of(BUILT, rank, tied=True)
        # All ranks twice: once more over gloo, for saving.
        assert several == {group: 1 + (len(group) == 4) for group in several}
        assert groups.count((rank,)) == 1
        assert made == 1 + 4 + 1  # the job's; two of each of two axes; gloo's


@pytest.mark.parametrize(
    ("layout", "sizes", "neighbours"),
    [
        (Layout(), [], 0),
        (Layout(data=8), [8], 0),  # which is the job's
        (Layout(tensor=2, data=4), [2, 4, 8], 0),
        (Layout(tensor=2, pipeline=2, data=2), [2, 2, 2, 4, 8], 1),
        (Layout(pipeline=4), [2, 4], 1),  # the first and the last stage share the embedding
    ],
    ids=str,
)
def test_communicators_of_a_rank(layout: Layout, sizes: list[int], neighbours: int) -> None:
    assert sorted(map(len, groups_of(layout, 0, tied=True))) == sizes
    assert num_neighbours(layout, 0) == neighbours
    expected = sum(PAIR_BYTES if size == 2 else LARGER_BYTES for size in [*sizes, *[2] * neighbours])
    assert communicator_bytes(layout, 0, tied=True) == expected


def test_fp8_adds_a_communicator_where_a_stage_is_no_group_of_one_axis() -> None:
    layout = Layout(tensor=2, pipeline=2, data=2)
    of_stage = groups_of(layout, 0, tied=True, fp8=True) - groups_of(layout, 0, tied=True)
    assert [len(group) for group in of_stage] == [4]
    for layout in (Layout(tensor=2, data=4), Layout(tensor=2, pipeline=4), Layout(data=2, pipeline=4)):
        assert groups_of(layout, 0, tied=True, fp8=True) == groups_of(layout, 0, tied=True)


def test_middle_stages_have_two_neighbours_and_no_embedding() -> None:
    layout = Layout(pipeline=4)
    assert communicator_bytes(layout, 1, tied=True) == LARGER_BYTES + 2 * PAIR_BYTES
    assert communicator_bytes(layout, 3, tied=False) == LARGER_BYTES + PAIR_BYTES


def test_what_nccl_says_is_said_whole() -> None:
    said = (
        "NCCL error in: ProcessGroupNCCL.cpp:1\nncclSystemError: System call failed.\nLast error:\nno socket interface"
    )
    line = why_not_joined(dist.DistBackendError(said))
    assert "\n" not in line
    assert "has not found the other ranks" not in line
    assert " ".join(said.split()) in line
    assert "has not found the other ranks" in why_not_joined(dist.DistNetworkError("timed out\nafter 1 s"))
