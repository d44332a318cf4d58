"""Semi-autoregressive denoising in blocks (LLaDA's sampler), batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.packets import logits_packet
from megatron_mdm.generation.remask import REMASKING, gumbel_argmax, tokens_per_step
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, SpecialIds


def denoise(
    engine: LogitsEngine,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    special: SpecialIds,
) -> list[list[int]]:
    """One batch: responses of gen_length ids. Randomness is a function of (seed, prompt id, step).

    Each row holds its prompt, its response and padding on the right that attention does not see.
    """
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
    return tokens.gather(1, starts[:, None] + torch.arange(config.gen_length)).tolist()


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
