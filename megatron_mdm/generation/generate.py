"""From prompts to responses on any number of data-parallel ranks, by the decoder that the model was trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import Batches, IdsEngine, LogitsEngine, Response, SpecialIds
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar

# (engine, prompts of one batch, their ids, settings, special ids, watch) → responses
Decoder = Callable[..., list[Response]]


def generate(
    engine: LogitsEngine | IdsEngine,
    prompts: Sequence[Sequence[int]],
    config: Batches,
    special: SpecialIds,
    context: ParallelContext,
    decode: Decoder = denoise,
    shows_progress: bool = True,
) -> list[Response]:
    """Responses of at most gen_length token ids, one per prompt, in order, on every rank. Collective."""
    everyone: dict[int, Response] = {}
    ids = range(len(prompts))
    for share in generate_by_turns(engine, prompts, ids, config, special, context, decode, shows_progress):
        everyone.update(share)
    return [everyone[index] for index in range(len(prompts))]


def generate_by_turns(
    engine: LogitsEngine | IdsEngine,
    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    prompt_ids: Sequence[int],
    config: Batches,
    special: SpecialIds,
    context: ParallelContext,
    decode: Decoder = denoise,
    shows_progress: bool = True,
) -> Iterator[dict[int, Response]]:
    """The responses to the prompts of these ids, turn by turn: after one batch on every data-parallel rank, theirs by
    prompt id, on every rank. Collective. prompts: by id; ids are any numbers, of which randomness is a function.

    Prompts are sorted by length into batches; a prompt's response does not depend on its batch.
    """
    order = sorted(prompt_ids, key=lambda index: len(prompts[index]))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    ranks = context.layout.data
    turns = range(-(-len(batches) // ranks))
    for turn in progress_bar(turns, desc="generate", unit="batch", enabled=shows_progress and context.is_main):
        index = turn * ranks + context.data_rank
        batch = batches[min(index, len(batches) - 1)]  # ranks without work repeat the last batch, to keep step
        responses = decode(engine, [prompts[row] for row in batch], batch, config, special)
        share: dict[int, Response] = {}
        for answered in gather_objects(dict(zip(batch, responses)), context):
            share.update(answered)
        yield share
