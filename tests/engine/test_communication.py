"""Bytes counted at the level of torch.distributed against what the layout predicts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.communication import MicroBatchShape, step_communication
from megatron_mdm.parallel.layout import Layout
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_zero0": (2, {"zero": 0}),
    "dp2_zero1": (2, {"zero": 1}),
    "dp2_zero2": (2, {"zero": 2}),
    "dp2_zero3": (2, {"zero": 3}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_recompute": (2, {"tensor": 2, "recompute": "full"}),
    "tp2_sp_recompute": (2, {"tensor": 2, "sequence": True, "recompute": "full", "recompute_interval": 2}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tp2_dp2_zero3": (4, {"tensor": 2, "zero": 3}),
    "tp2_recompute_lora": (2, {"tensor": 2, "recompute": "full"}),
    "tp2_sp_lora": (2, {"tensor": 2, "sequence": True, "recompute": "full", "recompute_interval": 2}),
    "dp2_zero3_lora": (2, {"zero": 3}),
}
LORA = {  # of the layouts whose name ends with it
    "tp2_recompute_lora": {"rank": 16},
    "tp2_sp_lora": {"rank": 16, "targets": ["query", "value", "down", "up", "embedding"]},
    "dp2_zero3_lora": {"rank": 8},
}
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
    "broadcast_": "broadcast",
}


class CountBytes(TorchDispatchMode):
    """Sees every operation of torch.distributed as it is dispatched: (ranks of the group, collective) → bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[tuple[int, ...], str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in COLLECTIVES:
            group = next(self._groups(args))
            largest = max(self._bytes(argument) for argument in args)
            self.bytes[tuple(dist.get_process_group_ranks(group)), COLLECTIVES[name]] += largest
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _groups(arguments: Any) -> Any:
        for argument in arguments:
            try:
                yield dist.ProcessGroup.unbox(argument)
            except (TypeError, RuntimeError):
                continue

    def _bytes(self, argument: Any) -> int:
        if hasattr(argument, "element_size"):
            return argument.numel() * argument.element_size()
        return sum(map(self._bytes, argument)) if isinstance(argument, list | tuple) else 0


def counted_step(config: RunConfig) -> tuple[dict[Any, int], dict[str, tuple[int, ...]], list[MicroBatchShape], int]:
    """On a rank: bytes of the second step, the groups by axis, this rank's micro-batches and stage."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
    trainer.train_step(0)
    with CountBytes() as counter:
        trainer.train_step(1)
    groups = {"data": context.data_group, "tensor": context.tensor_group, "pipeline": context.pipeline_group}
    shapes = [
        MicroBatchShape(*noised.noisy.shape, int(noised.masked.sum()))
        for noised in (trainer.source.noise(batch, 1) for batch in trainer.source.loader.batch(1).micro_batches)
    ]
    ranks = {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in groups.items()}
    return dict(counter.bytes), ranks, shapes, context.pipeline_rank


class Joined(TorchDispatchMode):
    """The sizes of what is put together from several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("cat", "flatten_dense_tensors"):
            self.sizes.add(result.numel())
        return result


def joined_in_a_step(config: RunConfig) -> tuple[int, set[int]]:
    """On a rank: elements of its parameters; sizes that were put together in a step."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
    with Joined() as joined:
        trainer.train_step(0)
    return sum(parameter.numel() for parameter in trainer.engine.engine.module.parameters()), joined.sizes


@pytest.mark.parametrize(("num_ranks", "pipeline"), [(1, 1), (2, 2), (2, 1)])
def test_gradients_are_put_together_for_partners_only(num_ranks: int, pipeline: int, tmp_path: Path) -> None:
    """In ZeRO 0, DeepSpeed copies all gradients into one tensor, also for a sum over a single rank."""
    write_ids(tmp_path / "train.jsonl", 20)
    config = small_config(tmp_path, parallel={"zero": 0, "pipeline": pipeline})
    for num_elements, sizes in run_ranks(joined_in_a_step, num_ranks, config):
        assert (num_elements in sizes) == (num_ranks > pipeline)


def group_of(axis: str, ranks: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """DeepSpeed's stages send over the group of all ranks."""
    everyone = {rank for group in ranks.values() for rank in group}
    return tuple(range(4 if len(everyone) > 2 else 2)) if axis == "pipeline" else ranks[axis]


@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_bytes_are_those_of_a_real_step(name: str, tmp_path: Path) -> None:
    num_ranks, parallel = LAYOUTS[name]
    write_ids(tmp_path / "train.jsonl", 20)
    model = small_model(num_layers=4, num_kv_heads=4, hidden_size=64, ffn_hidden_size=128, lora=LORA.get(name, {}))
    config = small_config(tmp_path, model=model.model_dump(), parallel=parallel)
    layout = Layout.of(num_ranks, config.parallel)
    for counted, ranks, shapes, pipeline_rank in run_ranks(counted_step, num_ranks, config):
        predicted = step_communication(config, layout, pipeline_rank, shapes)
        assert predicted
        for (axis, collective), expected in predicted.items():
            assert counted[group_of(axis, ranks), collective] == pytest.approx(expected, rel=0.05), (axis, collective)
        # Nothing large is left out of the prediction.
        explained = {(group_of(axis, ranks), collective) for axis, collective in predicted}
        several = {group for group, _ in counted if len(group) > 1}
        rest = sum(size for key, size in counted.items() if key[0] in several and key not in explained)
        assert rest < 0.05 * sum(predicted.values())
