"""Forward passes through every engine, and what DeepSpeed is told of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import ImageVocabulary, RunConfig
from megatron_mdm.engine.deepspeed_config import deepspeed_config
from megatron_mdm.models.parameters import FINAL_NORM
from tests.ranks import run_ranks
from tests.small import MASK, PAD, VOCAB, small_config, small_model, write_ids

SOME_IDS = [(20, 33), (3, 5), (40, 21)]  # of both tensor-parallel ranks, which hold 32 rows each, of one, of the other
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


def forward_only(config: RunConfig) -> dict[str, Any]:
    """On a rank: logits of a padded batch, row statistics of two micro-batches, with row gradients and without,
    generated responses and images, and the tokens' losses, which a training step's rows are summed from."""
    from megatron_mdm.batch import Full, ModelInputs, Padded
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.engine.inputs import logits_inputs, packed
    from megatron_mdm.generation.generate import generate
    from megatron_mdm.generation.image_sampler import denoise_images
    from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
    from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (3, 11), generator=generator)
    selected = torch.rand(3, 11, generator=generator) < 0.5
    lengths = torch.tensor([11, 7, 9])
    selected &= torch.arange(11)[None, :] < lengths[:, None]
    logits = engine.logits(logits_inputs(tokens, Padded(lengths), selected))
    parts = [engine.logits(logits_inputs(tokens, Padded(lengths), selected), ids=ids) for ids in SOME_IDS]
    inputs = ModelInputs(tokens, Padded(lengths), selected, tokens, selected.float(), torch.ones(3))
    whole = inputs._replace(pattern=Full())
    rows = [*engine.evaluate([inputs, whole], row_gradients=True), *engine.evaluate([whole])]
    statistics = [torch.stack(list(micro_batches)).numpy() for micro_batches in rows]
    settings = GenerationConfig(gen_length=8, block_length=4, steps=4, batch_size=2)
    responses = generate(engine, PROMPTS, settings, SpecialIds(MASK, PAD), context)
    parts = [part.numpy() for part in parts]
    vocabulary = ImageVocabulary(task=20, bos=21, eos=1, image_begin=22, image_end=23, first_id=25, num_codes=20)
    draw = partial(denoise_images, image=ImageTokens(vocabulary, 9))
    images = generate(engine, PROMPTS, ImageSampling(steps=3, batch_size=2), SpecialIds(MASK, PAD), context, draw)
    weighted = inputs._replace(token_weight=torch.randn(3, 11, generator=generator) * selected)
    narrow = ModelInputs(
        tokens[:, :8], Full(), selected[:, :8], tokens[:, :8], weighted.token_weight[:, :8], torch.ones(3)
    )
    scored = [weighted, packed(weighted), narrow]
    losses = engine.token_losses(scored)
    by_inference = inference_engine(config, context).token_losses(scored)
    trained = engine.train_batch(scored, 1e-3).statistics
    return {
        "token losses": [each.numpy() for each in losses],
        "by inference": [each.numpy() for each in by_inference],
        "row losses": [row_losses(each, engine.input_layout(of)).numpy() for each, of in zip(losses, scored)],
        "trained": [rows.loss.numpy() for rows in trained],
        "logits": logits.numpy(),
        "parts": parts,
        "statistics": statistics,
        "responses": responses,
        "images": images,
    }


def inference_engine(config: RunConfig, context: Any) -> Any:
    """The run's initial model without an optimizer."""
    from megatron_mdm.engine.inference import InferenceEngine, PipelinedInferenceEngine, build_stage
    from megatron_mdm.models.layers import build_model

    parallel = config.parallel.model_copy(update={"sequence": False})  # which inference does without
    arguments = config.model, parallel, context, config.seed
    dtype = config.precision.dtype
    if config.parallel.pipeline > 1:
        return PipelinedInferenceEngine(build_stage(*arguments, 11), config.model, dtype, context)
    return InferenceEngine(build_model(*arguments), dtype)


def row_losses(losses: torch.Tensor, inputs: Any) -> torch.Tensor:
    """Σ token_weight · CE of rows, in the order in which the head sums: along S of [S, R], padding included."""
    wide = torch.nn.functional.pad(losses, (0, inputs.token_weight.shape[1] - losses.shape[1]))
    return (wide.t().contiguous() * inputs.token_weight.t()).sum(0)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"zero": 3}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2}),
        (4, {"pipeline": 4}),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    ],
    ids=str,
)
def test_forward_passes_equal_one_process(num_ranks: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(num_layers=4, init_std=0.2, logit_shift=num_ranks == 4).model_dump()
    expected = run_ranks(forward_only, 1, small_config(tmp_path, model=model, parallel={"zero": 0}))[0]
    assert [bool(statistics[-1].any()) for statistics in expected["statistics"]] == [True, True, False]
    for result in run_ranks(forward_only, num_ranks, small_config(tmp_path, model=model, parallel=parallel)):
        np.testing.assert_allclose(result["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        for part, (first, count) in zip(result["parts"], SOME_IDS):
            np.testing.assert_allclose(part, expected["logits"][:, first : first + count], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(result["statistics"], expected["statistics"]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        for name in ("token losses", "by inference"):
            for ours, theirs in zip(result[name], expected["token losses"], strict=True):
                np.testing.assert_array_equal(ours == 0, theirs == 0)
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(result["row losses"], result["trained"], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert result["responses"] == expected["responses"]
        assert result["images"] == expected["images"]


def logits_of_a_zeroed_norm(config: RunConfig) -> np.ndarray:
    from megatron_mdm.batch import Full, ModelInputs
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.parallel.groups import initialize

    engine = restored_engine(None, config, initialize(), 0)
    tokens = torch.tensor([[5, 6, 7]])
    scored = ModelInputs(tokens, Full(), tokens > 0, tokens, (tokens > 0).float(), torch.ones(1))
    engine.train_batch([scored] * 2, 1e-3)  # which leaves parameters gathered
    inputs = logits_inputs(tokens, Full(), tokens > 0)
    assert engine.logits(inputs).any()

    def without_the_norm(part: Any) -> torch.Tensor:
        return torch.zeros_like(part.values) if (part.name, part.kind) == (FINAL_NORM, "weight") else part.values

    engine.optimizer_state.load(without_the_norm)
    return engine.logits(inputs).numpy()


def test_zero3_reads_weights_also_into_parameters_that_are_gathered(tmp_path: Path) -> None:
    config = small_config(tmp_path, parallel={"zero": 3})
    assert not any(logits.any() for logits in run_ranks(logits_of_a_zeroed_norm, 2, config))


def test_the_norm_is_measured_where_nothing_is_clipped(tmp_path: Path) -> None:
    """By our clipping, which DeepSpeed has to call, in fp32 without ZeRO; else by DeepSpeed."""
    for parallel, dtype, clipping, expected in (
        ({"zero": 0}, "fp32", 0.0, 1e30),
        ({"zero": 0}, "fp32", 0.5, 0.5),
        ({"zero": 1}, "fp32", 0.0, 0.0),
        ({"zero": 0}, "bf16", 0.0, 0.0),
    ):
        optimizer = {"gradient_clipping": clipping}
        precision = {"dtype": dtype}
        config = small_config(tmp_path, parallel=parallel, precision=precision, optimizer=optimizer)
        assert deepspeed_config(config, 1)["gradient_clipping"] == expected


def losses_of(config: RunConfig) -> list[float]:
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
    return [trainer.train_step(step).loss for step in range(8)]


def test_sharded_initialisation_draws_each_shard(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 20)
    model = small_model(initialization="sharded").model_dump()
    config = small_config(tmp_path, model=model, parallel={"tensor": 2})
    first, second = run_ranks(losses_of, 2, config)
    assert first == second
    assert np.isfinite(first).all()
    assert first != run_ranks(losses_of, 1, small_config(tmp_path, model=model))[0]
