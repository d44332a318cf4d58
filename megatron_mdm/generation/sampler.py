"""Semi-autoregressive denoising in blocks (LLaDA's sampler), batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_mdm.batch import Padded, padded_rows
from megatron_mdm.diffusion.randomness import Purpose
from megatron_mdm.engine.inputs import logits_inputs
from megatron_mdm.generation.candidates import draw, gumbel_noise
from megatron_mdm.generation.noise import NO_NOISE, NOISES, StepNoise
from megatron_mdm.generation.remask import COMMIT_SCHEDULES, REMASKING, Ranking, confident_enough
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, Response, SpecialIds
from megatron_mdm.models.cache import KeyValueCache, Window

Watch = Callable[[Tensor], None]  # is shown the responses [R, gen_length] after every step


def denoise(
    engine: LogitsEngine,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    special: SpecialIds,
    watch: Watch | None = None,
    *,
    purpose: Purpose = Purpose.GENERATION,
) -> list[Response]:
    """The responses to one batch of prompts, gen_length ids each. Randomness is a function of (seed, purpose, prompt
    id, block, step)."""
    canvas = _Canvas(prompts, config, special)
    noise = NOISES[config.noise](config.seed, purpose, prompt_ids)
    amounts, select = _plan(config)
    for block in range(config.num_blocks):
        places = canvas.block(block)
        for step, amount in enumerate(amounts):
            masked = canvas.tokens.gather(1, places) == special.mask  # [R, block]
            if not masked.any():
                break
            if not amount:
                continue
            logits = _guided_logits(engine, canvas, block, places, masked)
            counter = block * max(config.steps_per_block, config.block_length) + step
            num_drawn = logits.shape[1] if config.temperature else 0
            drawn = noise.at(counter, masked, num_drawn, logits.device) if config.draws else NO_NOISE
            candidates, ranking = _ranked(logits, masked, drawn, config, special)
            del logits, drawn  # or they would be there in the next forward pass, too
            canvas.commit(places, select(ranking, amount), candidates)
            canvas.steps += masked.any(1)
            if watch:
                watch(canvas.responses())
        if config.stop_at_eos and canvas.close_ended_rows(places):
            break
    return [Response(tokens, int(steps)) for tokens, steps in zip(canvas.responses().tolist(), canvas.steps)]


def _plan(config: GenerationConfig) -> tuple[list[float], Callable[[Ranking, float], Tensor]]:
    """How much each step of a block commits, and what chooses it."""
    if config.threshold:
        return [1] * config.block_length, partial(confident_enough, threshold=config.threshold)
    rule = REMASKING[config.remasking]
    steps = COMMIT_SCHEDULES[config.schedule](config.block_length, config.steps_per_block, config.eps)
    return [rule.amount(step) for step in steps], rule.select


class _Canvas:
    """The rows being denoised: prompt, response, and padding on the right that attention does not see, so that a row
    does not depend on its batch. Under guidance, R more rows hold the same responses behind a masked prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], config: GenerationConfig, special: SpecialIds) -> None:
        self.config = config
        self.special = special
        self.starts = torch.tensor([len(prompt) for prompt in prompts])
        self.lengths = self.starts + config.gen_length
        self.tokens = torch.full((len(prompts), int(self.lengths.max())), special.pad)  # [R, W]
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
            self.tokens[row, len(prompt) : len(prompt) + config.gen_length] = special.mask
        self.is_prompt = torch.arange(self.tokens.shape[1]) < self.starts[:, None]
        self.steps = torch.zeros(len(prompts), dtype=torch.int64)
        self.copies = 2 if config.cfg_scale else 1
        self.cache = KeyValueCache(self.copies * len(prompts), self.tokens.shape[1])
        self.cached_block = -1  # the block whose first pass filled the cache; −1: none yet

    def block(self, index: int) -> Tensor:
        """Places of a block's positions, [R, block]."""
        return self.starts[:, None] + index * self.config.block_length + torch.arange(self.config.block_length)

    def responses(self) -> Tensor:
        return self.tokens.gather(1, self.starts[:, None] + torch.arange(self.config.gen_length))

    def commit(self, places: Tensor, chosen: Tensor, candidates: Tensor) -> None:
        """Write the chosen candidates. All [R, block]."""
        self.tokens.scatter_(1, places, torch.where(chosen, candidates, self.tokens.gather(1, places)))

    def close_ended_rows(self, places: Tensor) -> bool:
        """Fill what lies behind a finished block with eos where the block holds an end. True: no masks are left."""
        ended = self.special.ends(self.tokens.gather(1, places)).any(1)
        self.tokens[ended[:, None] & (self.tokens == self.special.mask) & ~self.is_prompt] = self.special.eos
        return not bool((self.responses() == self.special.mask).any())

    def rows(self) -> Tensor:
        """What the model sees, [copies · R, W]."""
        if self.copies == 1:
            return self.tokens
        return torch.cat([self.tokens, self.tokens.masked_fill(self.is_prompt, self.special.mask)])

    def window(self, block: int) -> Window:
        """The positions that a block's next pass computes: all at first, later what the setting does not re-use. The
        place before the block is among them: a model with shifted logits predicts from it."""
        if self.cached_block != block:
            self.cached_block = block
            positions = torch.arange(self.tokens.shape[1]).expand(len(self.tokens), -1)
        else:
            length = self.config.block_length
            end = (block + 1) * length if self.config.cache == "dual" else self.config.gen_length
            positions = (self.starts[:, None] + torch.arange(block * length - 1, end)).clamp(min=0)
        return Window(self.cache, positions.repeat(self.copies, 1))


def _guided_logits(engine: LogitsEngine, canvas: _Canvas, block: int, places: Tensor, masked: Tensor) -> Tensor:
    """Logits [N, V] float32 of the block's masked positions, row by row, after guidance."""
    tokens = canvas.rows()
    lengths = canvas.lengths.repeat(canvas.copies)
    selected = torch.zeros_like(canvas.tokens, dtype=torch.bool).scatter_(1, places, masked).repeat(canvas.copies, 1)
    if canvas.config.cache == "none":
        logits = engine.logits(logits_inputs(tokens, padded_rows(lengths, tokens.shape[1]), selected)).float()
    else:
        window = canvas.window(block)
        seen = tokens.gather(1, window.positions)
        chosen = selected.gather(1, window.positions)
        chosen[:, 0] &= window.positions[:, 0] != window.positions[:, 1]  # an empty prompt has no place before it
        logits = engine.logits(logits_inputs(seen, Padded(lengths), chosen), window).float()
    if canvas.copies == 2:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (canvas.config.cfg_scale + 1.0) * (conditional - unconditional)
    if canvas.config.eos == "forbidden" and canvas.special.eos >= 0:
        logits[:, canvas.special.eos] = float("-inf")
    return logits


def _ranked(
    logits: Tensor, masked: Tensor, drawn: StepNoise, config: GenerationConfig, special: SpecialIds
) -> tuple[Tensor, Ranking]:
    """Candidates [R, block] and their ranking. logits [N, V] of the masked positions."""
    found = draw(logits, config.temperature, config.top_p, config.top_k, special.mask, drawn.tokens)
    ends = torch.zeros(len(logits), dtype=torch.bool)
    if config.eos == "last":
        ends = special.ends(found.tokens).cpu()
        found = found.without(*special.end_ids)
    scores = REMASKING[config.remasking].confidence(found, drawn.orders).double().cpu()
    if config.alg_temp:
        scores = scores / config.alg_temp + gumbel_noise(drawn.orders)
    ranking = Ranking(_placed(scores, masked, float("-inf")), masked, _placed(ends, masked, False))
    return _placed(found.tokens.cpu(), masked, 0), ranking


def _placed(values: Tensor, masked: Tensor, elsewhere: float) -> Tensor:
    """values [N] of the masked positions → [R, block]."""
    return torch.full(masked.shape, elsewhere, dtype=values.dtype).masked_scatter_(masked, values)
