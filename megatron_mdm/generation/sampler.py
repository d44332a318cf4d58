"""Semi-autoregressive denoising in blocks (LLaDA's sampler), batched, on any number of data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from pydantic import model_validator
from torch import Tensor

from megatron_mdm.config.schema import Section
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.packets import logits_packet
from megatron_mdm.generation.remask import REMASKING, gumbel_argmax, tokens_per_step
from megatron_mdm.models.stages import Packet
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar


class LogitsEngine(Protocol):
    def logits(self, packet: Packet) -> Tensor: ...


class GenerationConfig(Section):
    gen_length: int = 128  # response tokens
    block_length: int = 32  # blocks are finished left to right
    steps: int = 128  # denoising steps in all, shared evenly by the blocks
    temperature: float = 0.0
    remasking: str = "low_confidence"
    batch_size: int = 16  # prompts per forward pass and data-parallel rank
    seed: int = 0

    @model_validator(mode="after")
    def _divisible(self) -> GenerationConfig:
        if self.gen_length <= 0 or self.block_length <= 0 or self.gen_length % self.block_length:
            raise ValueError(f"gen_length {self.gen_length} must be a multiple of block_length {self.block_length}")
        if self.steps <= 0 or self.steps % (self.gen_length // self.block_length):
            raise ValueError(
                f"steps {self.steps} must be a multiple of the {self.gen_length // self.block_length} blocks"
            )
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking must be one of {', '.join(REMASKING)}")
        return self


class SpecialIds(NamedTuple):
    mask: int
    pad: int


def generate(
    engine: LogitsEngine,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    special: SpecialIds,
    context: ParallelContext,
) -> list[list[int]]:
    """Responses of gen_length token ids, one per prompt, in order, on every rank. Collective.

    Prompts are sorted by length into batches; each row holds its prompt, its response and padding on the right that
    attention does not see, so a prompt's response does not depend on its batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    ranks = context.layout.data
    mine: dict[int, list[int]] = {}
    turns = range(-(-len(batches) // ranks))
    for turn in progress_bar(turns, desc="generate", unit="batch", enabled=context.is_main):
        index = turn * ranks + context.data_rank
        batch = batches[min(index, len(batches) - 1)]  # ranks without work repeat the last batch, to keep step
        responses = denoise(engine, [prompts[row] for row in batch], batch, config, special)
        if index < len(batches):
            mine.update(zip(batch, responses.tolist()))
    everyone: dict[int, list[int]] = {}
    for share in gather_objects(mine, context):
        everyone.update(share)  # type: ignore[call-overload]
    return [everyone[index] for index in range(len(prompts))]


def denoise(
    engine: LogitsEngine,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    special: SpecialIds,
) -> Tensor:
    """One batch: response ids [R, gen_length]. Randomness is a function of (seed, prompt id, step)."""
    starts = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(prompts), int(starts.max()) + config.gen_length), special.pad)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        tokens[row, len(prompt) : len(prompt) + config.gen_length] = special.mask
    lengths = starts + config.gen_length
    steps_per_block = config.steps * config.block_length // config.gen_length
    step = 0
    for block in range(config.gen_length // config.block_length):
        places = starts[:, None] + block * config.block_length + torch.arange(config.block_length)  # [R, block]
        for num_commit in tokens_per_step(config.block_length, steps_per_block):
            if num_commit:
                _commit(engine, tokens, lengths, places, num_commit, step, prompt_ids, config, special)
            step += 1
    return tokens.gather(1, starts[:, None] + torch.arange(config.gen_length))


def _commit(engine, tokens, lengths, places, num_commit, step, prompt_ids, config, special):
    """Unmask the num_commit most confident positions of the block in each row. Every row has as many masked ones."""
    still_masked = tokens.gather(1, places) == special.mask  # [R, block]
    num_rows, num_masked = len(tokens), int(still_masked[0].sum())
    where = places[still_masked].view(num_rows, num_masked)
    selected = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, where, True)
    logits = engine.logits(logits_packet(tokens, lengths, selected)).float().cpu()
    logits = logits.view(num_rows, num_masked, -1)
    logits[..., special.mask] = float("-inf")  # a mask is no answer
    uniforms = _uniforms(prompt_ids, step, num_masked, logits.shape[2], config)
    candidates = gumbel_argmax(logits, config.temperature, uniforms[1])
    confidence = REMASKING[config.remasking](logits.softmax(-1), candidates, uniforms[0])
    best = confidence.topk(num_commit, dim=1).indices
    tokens.scatter_(1, where.gather(1, best), candidates.gather(1, best))


def _uniforms(
    prompt_ids: Sequence[int], step: int, num_masked: int, vocab_size: int, config: GenerationConfig
) -> tuple[Tensor, Tensor]:
    """(order [R, m], Gumbel [R, m, V]) uniforms; what the settings do not use is left empty."""
    if config.temperature == 0.0 and config.remasking != "random":
        return torch.empty(0), torch.empty(0)
    orders, gumbels = [], []
    for prompt in prompt_ids:
        generator = stream(config.seed, Purpose.GENERATION, step, prompt)
        orders.append(torch.from_numpy(generator.random(num_masked)))
        if config.temperature > 0.0:
            gumbels.append(torch.from_numpy(generator.random((num_masked, vocab_size))))
    return torch.stack(orders), torch.stack(gumbels) if gumbels else torch.empty(0)
