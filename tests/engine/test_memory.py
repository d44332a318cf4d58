"""Bytes of real allocations on real ranks against what the layout predicts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.communication import MicroBatchShape
from megatron_mdm.engine.memory import RankMemory, rank_memory
from megatron_mdm.models import attention, kernel_memory
from megatron_mdm.models.extensions import EXTENSIONS, Extension
from megatron_mdm.models.parameters import parameter_table
from megatron_mdm.parallel.layout import Layout
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

# tokens of a sample; elements of DeepSpeed's buckets, negligible here
LENGTH = 64
BUCKET = 1000
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, parallel, precision
    "dp2_zero0": (2, {"zero": 0}, {"dtype": "fp32"}),
    "dp2_zero1": (2, {"zero": 1}, {"dtype": "bf16"}),
    "dp2_zero1_fp32_gradients": (2, {"zero": 1}, {"dtype": "bf16", "gradients": "fp32"}),
    "dp2_zero2": (2, {"zero": 2}, {"dtype": "bf16"}),
    "dp2_zero2_fp32_gradients": (2, {"zero": 2}, {"dtype": "bf16", "gradients": "fp32"}),
    "dp2_zero3": (2, {"zero": 3}, {"dtype": "fp32"}),
    "tp2": (2, {"zero": 0, "tensor": 2}, {"dtype": "fp32"}),
    "tp2_sp": (2, {"zero": 1, "tensor": 2, "sequence": True}, {"dtype": "bf16"}),
    "pp2": (2, {"zero": 0, "pipeline": 2}, {"dtype": "fp32"}),
    "pp2_dp2_zero1": (4, {"zero": 1, "pipeline": 2}, {"dtype": "bf16"}),
    "tp2_pp2_sp": (4, {"zero": 0, "tensor": 2, "pipeline": 2, "sequence": True}, {"dtype": "fp32"}),
    "full_every_second": (1, {"zero": 0, "recompute": "full", "recompute_interval": 2}, {"dtype": "bf16"}),
    "packed_views": (1, {"zero": 0}, {"dtype": "bf16"}),
    "padded": (1, {"zero": 0}, {"dtype": "fp32"}),
    "selective": (1, {"zero": 0, "recompute": "selective"}, {"dtype": "bf16"}),
    "frozen_tables": (1, {"zero": 1}, {"dtype": "bf16"}),
    "lora": (1, {"zero": 2}, {"dtype": "bf16"}),
    "lora_of_queries_and_values": (2, {"zero": 3}, {"dtype": "fp32"}),
    "tp2_sp_lora": (2, {"zero": 1, "tensor": 2, "sequence": True}, {"dtype": "bf16"}),
    "lora_dropout": (1, {"zero": 1, "recompute": "selective"}, {"dtype": "bf16"}),
    "lora_nf4": (1, {"zero": 2}, {"dtype": "bf16"}),
    "tp2_nf4_recompute": (2, {"zero": 1, "tensor": 2, "recompute": "full"}, {"dtype": "bf16"}),
    "pp2_lora_recompute": (2, {"zero": 1, "pipeline": 2, "recompute": "full"}, {"dtype": "bf16"}),
}


# of DeepSpeed's optimizers, beside the inner one's own
STATES = (
    "all_grad_tensors",
    "averaged_gradients",
    "grad_partitions_flat_buffer",
    "fp32_partitioned_groups_flat",
    "fp32_groups_gradients_flat",
)


GROUPED = {"num_kv_heads": 2, "qk_norm": True, "qkv_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16, "targets": ["all-linear", "embedding", "head"]}},
    "lora_dropout": {"lora": {"rank": 16, "targets": ["query", "output", "down"], "dropout": 0.1}},
    "lora_of_queries_and_values": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}},
    "lora_nf4": {"lora": {"rank": 8, "base": "nf4"}},
    "tp2_nf4_recompute": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"], "base": "nf4"}},
    "tp2_sp_lora": {"lora": {"rank": 16, "dropout": 0.1}, **GROUPED},
    "pp2_lora_recompute": {"lora": {"rank": 16}},
    "tp2": GROUPED,
    "selective": GROUPED,
    "dp2_zero2": GROUPED,
    "frozen_tables": {"extensions": {"frozen_tables": {}}, "vocab_size": 32_768},
}
EXTENSIONS["frozen_tables"] = Extension(
    lambda rows, _: {name: replace(row, trained=not row.is_vocabulary) for name, row in rows.items()}, lambda *_: None
)

PACKED = {"batch": {"global_size": 12, "micro_size": 2, "mode": "packed"}, "diffusion": {"views": 2}}
SECTIONS: dict[str, dict[str, Any]] = {"packed_views": PACKED}


class Counted(NamedTuple):
    """Bytes on one rank."""

    states: int  # peak of weights, gradients and optimizer states
    saved: int  # peak of what autograd keeps, but for parameters
    peak: int  # of all tensors
    micro_batches: list[MicroBatchShape]
    pipeline_rank: int


class LiveBytes(TorchDispatchMode):
    """Follows the storage of every tensor that an operation takes or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[Any, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        reference, before = self.sizes.get(key, (None, 0))
        if reference is None:
            reference = weakref.ref(storage, lambda _: self._forget(key))
        self.sizes[key] = (reference, size)
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)[1]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Follows what autograd keeps."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.owners: Counter[int] = Counter()
        self.now = self.peak = 0
        super().__init__(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor)


class _Kept:
    def __init__(self, count: SavedBytes, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        is_parameter = isinstance(tensor, torch.nn.Parameter) or storage._cdata in parameter_storages(count.module)
        self.count = count
        self.tensor = tensor
        self.key = storage._cdata
        self.size = 0 if is_parameter or count.owners[self.key] else storage.nbytes()
        count.owners[self.key] += 1
        count.now += self.size
        count.peak = max(count.peak, count.now)

    def __del__(self) -> None:
        self.count.owners[self.key] -= 1
        self.count.now -= self.size


def state_bytes(engine: Any) -> int:
    """Storages of weights, gradients and optimizer states, each once, as DeepSpeed's optimizers hold them."""
    tensors: list[Tensor] = list(engine.module.buffers())  # of which only matrices in 4 bits count
    for parameter in engine.module.parameters():
        tensors.append(getattr(parameter, "ds_tensor", parameter.data))  # ZeRO 3: its part, not what is gathered
        tensors += [parameter.grad] if parameter.grad is not None else []
    wrapper = engine.optimizer
    for name in STATES:
        tensors += tensor_leaves(getattr(wrapper, name, []))
    tensors += [parameter.grad_accum for parameter in engine.module.parameters() if has_accumulator(parameter)]
    inner = wrapper
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    tensors += [tensor for group in inner.param_groups for tensor in group["params"]]
    tensors += tensor_leaves([list(state.values()) for state in inner.state.values()])
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def has_accumulator(parameter: Any) -> bool:
    return getattr(parameter, "grad_accum", None) is not None


def tensor_leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):  # of DeepSpeed's own kind of list
        tree = [list(values) for values in tree.values() if values is not None]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def parameter_storages(module: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage()._cdata for parameter in module.parameters()}


def counted_step(config: RunConfig) -> Counted:
    """On a rank: the second step."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    live = LiveBytes()
    with live:
        trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
        trainer.train_step(0)
        engine = trainer.engine.engine
        states = [0]
        block = next(module for name, module in engine.module.named_modules() if name.endswith("layer"))
        block.register_forward_pre_hook(lambda *_: states.append(state_bytes(engine)))
        step = engine._take_model_step
        engine._take_model_step = lambda *a, **k: (states.append(state_bytes(engine)), step(*a, **k))[1]
        live.peak = live.now
        trainer.train_step(1)
        peak = live.peak
        saved = SavedBytes(engine.module)
        with saved:  # apart, since it keeps tensors a little longer
            trainer.train_step(2)
    return Counted(max(states), saved.peak, peak, list(shapes(trainer)), context.pipeline_rank)


def shapes(trainer: Any) -> Iterator[MicroBatchShape]:
    for step in (1, 2):
        for noised in (trainer.source.noise(batch, step) for batch in trainer.source.loader.batch(step).micro_batches):
            rows, length = noised.noisy.shape
            if trainer.engine.input_layout.pack:
                rows, length = 1, rows * length
            yield MicroBatchShape(rows, length, int(noised.masked.sum()))


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request: Any, tmp_path_factory: Any) -> list[tuple[RunConfig, Counted, RankMemory]]:
    num_ranks, parallel, precision = LAYOUTS[request.param]
    if "nf4" in request.param and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (nf4)")
    folder: Path = tmp_path_factory.mktemp(request.param)
    shortest = LENGTH - 1 if request.param == "padded" else LENGTH
    write_ids(folder / "train.jsonl", 60, length=(shortest, LENGTH + 1))
    sizes = {"num_layers": 4, "num_kv_heads": 4, "hidden_size": 128, "ffn_hidden_size": 256}
    model = small_model(**{**sizes, **MODELS.get(request.param, {})})
    config = small_config(
        folder,
        model=model.model_dump(),
        parallel=parallel,
        precision=precision,
        deepspeed={"zero_optimization": {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}},
        **{"batch": {"global_size": 24, "micro_size": 4}, **SECTIONS.get(request.param, {})},
    )
    layout = Layout.of(num_ranks, config.parallel)
    results = []
    for counted in run_ranks(counted_step, num_ranks, config):
        greatest = max(counted.micro_batches, key=lambda shape: shape.selected)
        number = len(counted.micro_batches) // 2
        predicted = rank_memory(config, layout, counted.pipeline_rank, greatest, number, "cpu")
        results.append((config, counted, predicted))
    return results


def test_predicted_memory_is_that_of_a_real_step(case: list[tuple[RunConfig, Counted, RankMemory]]) -> None:
    for config, counted, predicted in case:
        assert counted.states == pytest.approx(predicted.states, rel=0.03)
        kept = predicted.activations
        if config.parallel.recompute == "full":  # what runs again is kept by the checkpoint, not by autograd
            kept -= predicted.recomputed
        assert counted.saved == pytest.approx(kept, rel=0.15)
        assert counted.peak == pytest.approx(predicted.total, rel=0.15)


def peaks_while_building(configs: list[RunConfig]) -> list[int]:
    """On a rank: the most bytes that were alive at a time."""
    from megatron_mdm.engine.build import build_engine
    from megatron_mdm.parallel.groups import initialize

    peaks = []
    for config in configs:
        context = initialize(config.parallel)
        with LiveBytes() as live:
            build_engine(config, context)
        peaks.append(live.peak)
    return peaks


@pytest.mark.parametrize("base", ["model", "nf4"])
def test_frozen_weights_are_in_fp32_one_layer_at_a_time(base: str, tmp_path: Path) -> None:
    """While an engine is built there are what it holds in the end, and a layer in fp32 with a tensor that is drawn."""
    if base == "nf4" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (nf4)")
    sizes = {"num_layers": 12, "hidden_size": 128, "ffn_hidden_size": 256}
    config = small_config(
        tmp_path,
        model=small_model(**sizes, lora={"rank": 2, "base": base}).model_dump(),
        parallel={"zero": 1},
        precision={"dtype": "bf16"},
        deepspeed={"zero_optimization": {"reduce_bucket_size": BUCKET}},
    )
    held = rank_memory(config, Layout.of(1, config.parallel), 0, MicroBatchShape(1, 1, 1), 1, "cpu")
    layer = sum(row.size for row in parameter_table(config.model).values() if 1 in row.layers)
    ((peak,),) = run_ranks(peaks_while_building, 1, [config])
    assert peak <= held.states + 2 * 4 * layer


BUCKETS: dict[str, tuple[dict[str, Any], bool]] = {  # parallel, whether communication overlaps
    "ZeRO 1, overlapping": ({"zero": 1}, True),
    "ZeRO 3, overlapping": ({"zero": 3}, True),
    "pipeline": ({"zero": 1, "pipeline": 2}, False),
}
NO_BUCKET = {"zero_optimization": {"reduce_bucket_size": 0}}
ODD_BUCKET = 300_007  # elements: no other tensor has as many


class LiveBuckets(LiveBytes):
    """Follows DeepSpeed's buckets alone."""

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() == 4 * ODD_BUCKET:
            super()._follow(storage)


def bucket_bytes(configs: list[RunConfig]) -> list[int]:
    """On a rank: the peak of each configuration's buckets in a step."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    peaks = []
    for given in configs:
        config, data = inputs.resolve(given)
        context = initialize(config.parallel)
        with LiveBuckets() as live:
            trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
            trainer.train_step(0)
        peaks.append(live.peak)
    return peaks


def test_as_many_buckets_are_counted_as_deepspeed_allocates(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 40)
    configs = [
        small_config(
            tmp_path,
            parallel=parallel,
            deepspeed={"zero_optimization": {"reduce_bucket_size": ODD_BUCKET, "overlap_comm": overlaps}},
        )
        for parallel, overlaps in BUCKETS.values()
    ]
    allocated = run_ranks(bucket_bytes, 2, configs)[0]
    for name, config, found in zip(BUCKETS, configs, allocated, strict=True):
        layout = Layout.of(2, config.parallel)
        counted = [
            memory.buffers + memory.step
            for memory in (
                rank_memory(asked, layout, 0, MicroBatchShape(2, 24, 24), 3, "cuda")
                for asked in (config, config.model_copy(update={"deepspeed": NO_BUCKET}))
            )
        ]
        assert counted[0] - counted[1] == found, name


def test_a_pipeline_holds_no_more_micro_batches_than_there_are(tmp_path: Path) -> None:
    """The first of four stages: at most four, also their messages."""
    config = small_config(tmp_path, model=small_model(num_layers=4).model_dump(), parallel={"pipeline": 4, "zero": 0})
    shape = MicroBatchShape(2, 64, 128)
    layout = Layout(pipeline=4)
    one, three, four, nine = (rank_memory(config, layout, 0, shape, number, "cpu") for number in (1, 3, 4, 9))
    assert 3 * one.activations == three.activations < four.activations == nine.activations
    message = 2 * 64 * config.model.hidden_size * 4
    assert [memory.buffers / message for memory in (one, three, four, nine)] == [2, 4, 5, 5]  # one more is on its way


def test_attention_changes_its_kernel_where_the_formula_says() -> None:
    assert kernel_memory.EXPLICIT_LENGTH == attention.EXPLICIT_LENGTH
