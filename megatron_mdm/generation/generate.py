"""From prompts to responses on any number of data-parallel ranks, by the decoder of the model's training method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mdm.generation.autoregressive import decode_greedily
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, SpecialIds
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar

# (engine, prompts of one batch, their ids, settings, special ids) → responses
Decoder = Callable[..., list[list[int]]]
DECODERS: dict[str, Decoder] = {"masked": denoise, "autoregressive": decode_greedily}  # by diffusion.method


def generate(
    engine: LogitsEngine,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    special: SpecialIds,
    context: ParallelContext,
    method: str = "masked",
) -> list[list[int]]:
    """Responses of at most gen_length token ids, one per prompt, in order, on every rank. Collective.

    Prompts are sorted by length into batches; a prompt's response does not depend on its batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    ranks = context.layout.data
    mine: dict[int, list[int]] = {}
    turns = range(-(-len(batches) // ranks))
    for turn in progress_bar(turns, desc="generate", unit="batch", enabled=context.is_main):
        index = turn * ranks + context.data_rank
        batch = batches[min(index, len(batches) - 1)]  # ranks without work repeat the last batch, to keep step
        responses = DECODERS[method](engine, [prompts[row] for row in batch], batch, config, special)
        if index < len(batches):
            mine.update(zip(batch, responses))
    everyone: dict[int, list[int]] = {}
    for share in gather_objects(mine, context):
        everyone.update(share)  # type: ignore[call-overload]
    return [everyone[index] for index in range(len(prompts))]
