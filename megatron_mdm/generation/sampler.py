"""Semi-autoregressive denoising in blocks (LLaDA's sampler), batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.packets import logits_packet
from megatron_mdm.generation.remask import COMMIT_SCHEDULES, REMASKING, gumbel_argmax
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
) -> list[Response]:
    """One batch: responses of gen_length ids. Randomness is a function of (seed, prompt id, block, step)."""
    canvas = _Canvas(prompts, config, special)
    steps_per_block = config.steps // config.num_blocks
    counts = COMMIT_SCHEDULES[config.schedule](config.block_length, steps_per_block)
    most = config.block_length if config.threshold else steps_per_block
    for block in range(config.num_blocks):
        places = canvas.block(block)
        for step in range(most):
            masked = canvas.tokens.gather(1, places) == special.mask  # [R, block]
            if not masked.any():
                break
            if not config.threshold and not counts[step]:
                continue
            logits = _guided_logits(engine, canvas, block, places, masked)
            counter = block * max(steps_per_block, config.block_length) + step
            candidates, confidence = _candidates(logits, masked, prompt_ids, counter, config, special)
            chosen = _most_confident(confidence, masked, counts[step] if not config.threshold else 1)
            if config.threshold:
                chosen |= confidence >= config.threshold
            canvas.commit(places, chosen, candidates)
            canvas.steps += masked.any(1)
            if watch:
                watch(canvas.responses())
        if config.stop_at_eos and canvas.close_rows_with_eos(places):
            break
    return [Response(tokens, int(steps)) for tokens, steps in zip(canvas.responses().tolist(), canvas.steps)]


class _Canvas:
    """The rows being denoised: prompt, response, and padding on the right that attention does not see, so that a row
    does not depend on its batch. Under guidance, R more rows hold the same responses behind a masked prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], config: GenerationConfig, special: SpecialIds) -> None:
        self.config, self.special = config, special
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
        """[R, block]: places of a block's positions."""
        return self.starts[:, None] + index * self.config.block_length + torch.arange(self.config.block_length)

    def responses(self) -> Tensor:
        return self.tokens.gather(1, self.starts[:, None] + torch.arange(self.config.gen_length))

    def commit(self, places: Tensor, chosen: Tensor, candidates: Tensor) -> None:
        """All [R, block]."""
        self.tokens.scatter_(1, places, torch.where(chosen, candidates, self.tokens.gather(1, places)))

    def close_rows_with_eos(self, places: Tensor) -> bool:
        """Fill what lies behind a finished block with eos where the block holds one. True: no masks are left."""
        ended = (self.tokens.gather(1, places) == self.special.eos).any(1)
        self.tokens[ended[:, None] & (self.tokens == self.special.mask) & ~self.is_prompt] = self.special.eos
        return not bool((self.responses() == self.special.mask).any())

    def rows(self) -> Tensor:
        """[copies · R, W]: what the model sees."""
        if self.copies == 1:
            return self.tokens
        return torch.cat([self.tokens, self.tokens.masked_fill(self.is_prompt, self.special.mask)])

    def window(self, block: int) -> Window:
        """The first pass of a block computes every position, later ones only what the setting does not re-use. The
        place before the block is among them: a model with shifted logits predicts from it."""
        if self.cached_block != block:
            self.cached_block = block
            positions = torch.arange(self.tokens.shape[1]).expand(len(self.tokens), -1)
        else:
            length = self.config.block_length
            end = (block + 1) * length if self.config.cache == "dual" else self.config.gen_length
            positions = (self.starts[:, None] + torch.arange(block * length - 1, end)).clamp(min=0)
        return Window(self.cache, positions.repeat(self.copies, 1), self.lengths.repeat(self.copies))


def _guided_logits(engine: LogitsEngine, canvas: _Canvas, block: int, places: Tensor, masked: Tensor) -> Tensor:
    """Logits [N, V] float32 of the block's masked positions, row by row, after guidance."""
    tokens, lengths = canvas.rows(), canvas.lengths.repeat(canvas.copies)
    selected = torch.zeros_like(canvas.tokens, dtype=torch.bool).scatter_(1, places, masked).repeat(canvas.copies, 1)
    if canvas.config.cache == "none":
        logits = engine.logits(logits_packet(tokens, lengths, selected)).float()
    else:
        window = canvas.window(block)
        seen, chosen = tokens.gather(1, window.positions), selected.gather(1, window.positions)
        chosen[:, 0] &= window.positions[:, 0] != window.positions[:, 1]  # an empty prompt has no place before it
        logits = engine.logits(logits_packet(seen, lengths, chosen), window).float()
    if canvas.copies == 2:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (canvas.config.cfg_scale + 1.0) * (conditional - unconditional)
    logits[:, canvas.special.mask] = float("-inf")  # a mask is no answer
    if canvas.config.eos == "forbidden" and canvas.special.eos >= 0:
        logits[:, canvas.special.eos] = float("-inf")
    return logits


def _candidates(
    logits: Tensor,
    masked: Tensor,
    prompt_ids: Sequence[int],
    counter: int,
    config: GenerationConfig,
    special: SpecialIds,
) -> tuple[Tensor, Tensor]:
    """(candidates, confidence) [R, block]; confidence is −inf where nothing is masked. logits [N, V]."""
    orders, gumbels = _uniforms(prompt_ids, counter, masked, logits.shape[1], config)
    chosen = gumbel_argmax(logits, config.temperature, gumbels)
    confident = REMASKING[config.remasking](logits, chosen, orders).cpu()
    chosen = chosen.cpu()
    if config.eos == "last":
        confident = confident - 2.0 * (chosen == special.eos)  # below every other, in the same order
    candidates = torch.zeros(masked.shape, dtype=torch.int64).masked_scatter_(masked, chosen)
    confidence = torch.full(masked.shape, float("-inf")).masked_scatter_(masked, confident)
    return candidates, confidence


def _most_confident(confidence: Tensor, masked: Tensor, count: int) -> Tensor:
    """[R, block] bool: the count most confident positions of each row, as far as it has masked ones."""
    best = confidence.topk(count, dim=1).indices
    return torch.zeros_like(masked).scatter_(1, best, True) & masked


def _uniforms(
    prompt_ids: Sequence[int], counter: int, masked: Tensor, vocab_size: int, config: GenerationConfig
) -> tuple[Tensor, Tensor]:
    """(order [N], Gumbel [N, V]) uniforms of the masked positions; what the settings do not use is left empty."""
    if config.temperature == 0.0 and config.remasking != "random":
        return torch.empty(0), torch.empty(0)
    orders, gumbels = [], []
    for row, prompt in enumerate(prompt_ids):
        generator = stream(config.seed, Purpose.GENERATION, counter, prompt)
        num_masked = int(masked[row].sum())
        orders.append(torch.from_numpy(generator.random(num_masked)))
        if config.temperature > 0.0:
            gumbels.append(torch.from_numpy(generator.random((num_masked, vocab_size))))
    return torch.cat(orders), torch.cat(gumbels) if gumbels else torch.empty(0)
