"""Which token sees which: every kernel against plain attention under the pattern's mask, and a pattern of our own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mdm.batch import AttentionPattern, Full, ModelInputs, Padded, Segments, padded_rows
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.engine.inputs import packed, padded_to_multiple
from megatron_mdm.models.attention import (
    EXECUTORS,
    Rows,
    SegmentBySegment,
    Visibility,
    executor,
    fused,
    variable_length,
)
from tests.models.test_layers import llama_of
from tests.ranks import run_ranks
from tests.small import VOCAB, small_config, small_model

# of which attention on CPUs keeps the scores, and does not
SHORT = 12
LONG = 150


@dataclass(frozen=True, eq=False)
class Prefix(AttentionPattern):
    """A row's first tokens see each other, every later one itself and those before it; positions are not the places."""

    prefixes: Tensor  # [R] int64

    def mask(self, length: int) -> Tensor:
        places = torch.arange(length)
        return (places <= places[:, None]) | (places < self.prefixes[:, None, None, None])

    def positions(self, length: int) -> Tensor:
        return 3 * torch.arange(length) + self.prefixes[:, None]


PATTERNS: dict[str, AttentionPattern] = {
    "full": Full(),
    "causal": Full(causal=True),
    "padded": Padded(torch.tensor([9, SHORT])),
    "padded causally": Padded(torch.tensor([9, SHORT]), causal=True),
    "rows of segments": Segments(torch.tensor([[4, 5, 0], [3, 2, 7]])),
    "prefix": Prefix(torch.tensor([4, 7])),
}
OF_ONE_ROW: dict[str, AttentionPattern] = {
    f"segments{' causally' * causal} of {length}": Segments(torch.tensor([[3, length - 8, 5]]), causal=causal)
    for causal in (False, True)
    for length in (SHORT, LONG)
}


def inputs_of(pattern: AttentionPattern, num_rows: int, length: int) -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, VOCAB, (2, num_rows, length), generator=generator)
    selected = torch.rand(num_rows, length, generator=generator) < 0.5
    weight = torch.rand(num_rows, length, generator=generator) * selected
    return ModelInputs(tokens, pattern, selected, labels, weight, torch.rand(num_rows, generator=generator))


def attended(pattern: AttentionPattern, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """(contexts of the pattern's kernel, of plain attention under its mask), [length, rows, 4 · 8] float64, without the
    padding; two key heads for four of queries."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(length, num_rows, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    )
    visible = Visibility(inputs_of(pattern, num_rows, length))
    found = executor(pattern.kind, "cpu", torch.float64)(query, key, value, visible, None)
    key, value = (x.repeat_interleave(2, dim=2) for x in (key, value))
    scores = torch.einsum("srhd,trhd->rhst", query, key) / 8**0.5
    mask = pattern.mask(length)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = torch.einsum("rhst,trhd->srhd", scores.softmax(-1), value).flatten(2)
    inside = (torch.arange(length)[:, None] < pattern.row_lengths(num_rows, length))[..., None]
    return found * inside, expected.nan_to_num() * inside


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_of_rows(name: str, length: int) -> None:
    found, expected = attended(PATTERNS[name], 2, length)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OF_ONE_ROW)
def test_kernels_of_segments(name: str) -> None:
    found, expected = attended(OF_ONE_ROW[name], 1, int(OF_ONE_ROW[name].row_lengths(1, 0)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_kernels_are_chosen_by_pattern_device_and_type() -> None:
    assert executor("segments", "cuda", torch.bfloat16) is variable_length
    assert executor("segments", "cuda", torch.float32) == SegmentBySegment(fused)
    assert executor("causal", "cuda", torch.float16) == Rows(fused, causal=True)
    assert executor("of another package", "cuda", torch.float16) == EXECUTORS["dense", "any", "any"]


@pytest.mark.parametrize("name", PATTERNS)
def test_what_some_queries_see_are_rows_of_the_mask(name: str) -> None:
    """In any order, as a window of a cache asks."""
    pattern = PATTERNS[name]
    queries = torch.tensor([[5, 0, 8], [11, 3, 3]])
    mask = pattern.mask(SHORT)
    whole = torch.ones(2, 1, SHORT, SHORT, dtype=torch.bool) if mask is None else mask.expand(2, 1, SHORT, SHORT)
    expected = torch.stack([whole[row, :, queries[row]] for row in range(2)])
    assert torch.equal(pattern.mask_of(queries, SHORT).expand_as(expected), expected)


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    pattern = PATTERNS[name]
    inputs = inputs_of(pattern, 2, SHORT)._replace(positions=pattern.positions(SHORT))
    wider = padded_to_multiple(inputs, 5)
    assert wider.tokens.shape == wider.token_weight.shape == (2, 15)
    mask = wider.pattern.mask(15)
    narrow = pattern.mask(SHORT)
    before = torch.ones(1, 1, SHORT, SHORT, dtype=torch.bool) if narrow is None else narrow
    seen = mask.expand(2, 1, 15, 15)
    assert torch.equal(seen[:, :, :SHORT, :SHORT], before.expand(2, 1, SHORT, SHORT))
    inside = torch.arange(SHORT) < pattern.row_lengths(2, SHORT)[:, None]
    assert not seen[:, 0, :SHORT, SHORT:][inside].any()
    assert seen.any(-1).all()  # a query that sees nothing would give no number
    positions = wider.pattern.positions(15)
    wanted = pattern.positions(SHORT)
    assert wanted is None or torch.equal(positions[:, :SHORT], wanted)
    assert wanted is None or torch.equal(wider.positions[:, :SHORT], wanted)


def test_rows_are_padded_only_where_their_lengths_say_so() -> None:
    assert padded_rows(torch.tensor([4, 4]), 4, causal=True).kind == "causal"
    assert padded_rows(torch.tensor([4, 4]), 4).kind == "full"
    assert padded_rows(torch.tensor([4, 3]), 4).kind == "padded"


def test_a_pattern_without_padding_of_its_own_cannot_be_packed() -> None:
    with pytest.raises(UserError, match=r"attention pattern Prefix cannot be packed; use 'batch\.mode' padded"):
        packed(inputs_of(PATTERNS["prefix"], 2, SHORT))


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), *OF_ONE_ROW.values()], ids=lambda pattern: pattern.kind)
def test_inputs_can_be_written_and_read(pattern: AttentionPattern) -> None:
    inputs = inputs_of(pattern, 2, SHORT)._replace(positions=torch.arange(SHORT)[None])
    tensors = inputs.as_tensors()
    again = ModelInputs.from_tensors(tensors)
    assert type(again.pattern) is type(pattern)
    assert again.pattern.causal is pattern.causal
    assert not again.is_packed
    written = again.as_tensors()
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def run_prefix(config: RunConfig) -> dict[str, Any]:
    """On a rank: logits, losses and three training steps under Prefix; parameters before them, where they are whole."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    first, second = prefix_inputs()
    parameters = {}
    if context.layout.world_size == 1:
        parameters = {name: weight.detach().numpy().copy() for name, weight in engine.engine.module.named_parameters()}
    results = {
        "logits": engine.logits(first).numpy().copy(),
        "losses": [rows.loss.numpy().copy() for rows in engine.evaluate([first, second])],
    }
    steps = [engine.train_batch([first, second], 1e-3) for _ in range(3)]
    results["trained"] = [[rows.loss.numpy().copy() for rows in step.statistics] for step in steps]
    results["norms"] = [step.grad_norm for step in steps]
    return {**results, "inference": inferred(config, context), "parameters": parameters}


def inferred(config: RunConfig, context: Any) -> list[Any]:
    """Losses without an optimizer, under Prefix and of rows of segments."""
    from megatron_mdm.engine.inference import InferenceEngine, PipelinedInferenceEngine, build_stage
    from megatron_mdm.models.layers import build_model

    parallel = config.parallel.model_copy(update={"sequence": False})
    if context.layout.pipeline > 1:
        stages = build_stage(config.model, parallel, context, 3, 16)
        engine: Any = PipelinedInferenceEngine(stages, config.model, "fp32", context)
    else:
        engine = InferenceEngine(build_model(config.model, parallel, context, 3), "fp32")
    batches = [*prefix_inputs(), inputs_of(PATTERNS["rows of segments"], 2, SHORT)]
    return [rows.loss.numpy().copy() for rows in engine.evaluate(batches)]


def prefix_inputs() -> tuple[ModelInputs, ModelInputs]:
    return inputs_of(Prefix(torch.tensor([3, 7])), 2, 11), inputs_of(Prefix(torch.tensor([1, 4])), 2, 11)


def expected_logits(model: ModelConfig, parameters: dict[str, Tensor], inputs: ModelInputs) -> Tensor:
    """[R, S, V], by transformers' Llama under the pattern's mask, at its positions."""
    hidden = ~inputs.pattern.mask(inputs.tokens.shape[1])
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    positions = inputs.pattern.positions(inputs.tokens.shape[1])
    with torch.no_grad():
        return llama_of(model, parameters)(inputs.tokens, attention_mask=mask, position_ids=positions).logits


def test_a_pattern_of_our_own_is_trained_on_any_layout(tmp_path: Path) -> None:
    model = small_model(init_std=0.2)
    one = run_ranks(run_prefix, 1, small_config(tmp_path, model=model.model_dump(), parallel={"zero": 0}))[0]
    parameters = {name: torch.from_numpy(value) for name, value in one["parameters"].items()}
    for inputs, found in zip(prefix_inputs(), one["losses"]):
        logits = expected_logits(model, parameters, inputs)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs.labels, reduction="none")
        np.testing.assert_allclose(found, (losses * inputs.token_weight).sum(1), rtol=1e-5)
    first = prefix_inputs()[0]
    expected = expected_logits(model, parameters, first)[first.selected]
    np.testing.assert_allclose(one["logits"], expected, rtol=1e-5, atol=1e-5)
    for parallel in ({"pipeline": 2}, {"tensor": 2, "sequence": True}):
        for result in run_ranks(run_prefix, 2, small_config(tmp_path, model=model.model_dump(), parallel=parallel)):
            np.testing.assert_allclose(result["logits"], one["logits"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)
            np.testing.assert_allclose(result["inference"], one["inference"], rtol=1e-5)
            np.testing.assert_allclose(result["trained"], one["trained"], rtol=1e-5)
            np.testing.assert_allclose(result["norms"], one["norms"], rtol=1e-4)
