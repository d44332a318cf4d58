"""Left-to-right decoding of a causal model with cached keys and values: the baseline's generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mdm.batch import Padded
from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.inputs import logits_inputs
from megatron_mdm.generation.candidates import draw
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, Response, SpecialIds
from megatron_mdm.models.cache import KeyValueCache, Window


def decode_greedily(
    engine: LogitsEngine,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    special: SpecialIds,
    watch: Callable[[Tensor], None] | None = None,
) -> list[Response]:
    """The responses to one batch of prompts; each ends with its first end token or after gen_length tokens.

    The prompts are read in one forward pass; then each pass computes one position of every row, whose place differs
    from row to row, and the cache holds what stands before it. At a temperature above 0, tokens are drawn instead; the
    randomness is a function of (seed, prompt id, step).
    """
    if not all(prompts):
        raise UserError("an autoregressive model needs at least one token to begin with; a prompt is empty")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    num_rows = len(prompts)
    width = int(lengths.max())
    tokens = torch.full((num_rows, width), special.pad)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    cache = KeyValueCache(num_rows, width + config.gen_length)
    positions = torch.arange(width).expand(num_rows, -1)
    last = positions == lengths[:, None] - 1
    responses = torch.full((num_rows, config.gen_length), special.eos)
    running = torch.ones(num_rows, dtype=torch.bool)
    for step in range(config.gen_length):
        pattern = Padded(lengths + step, causal=True)
        logits = engine.logits(logits_inputs(tokens, pattern, last), Window(cache, positions)).float()
        uniforms = _uniforms(prompt_ids, step, logits.shape[1], config)
        found = draw(logits, config.temperature, config.top_p, config.top_k, special.mask, uniforms.__getitem__)
        chosen = found.tokens.cpu()
        responses[:, step] = chosen
        if watch:
            watch(responses)
        running &= ~special.ends(chosen)
        if not running.any():
            break
        tokens = responses[:, step, None]
        last = torch.ones(num_rows, 1, dtype=torch.bool)
        positions = (lengths + step)[:, None]
    ended = special.ends(responses)
    kept = torch.where(ended.any(1), ended.int().argmax(1) + 1, config.gen_length).tolist()
    return [Response(response[:length], length) for response, length in zip(responses.tolist(), kept)]


def _uniforms(prompt_ids: Sequence[int], step: int, vocab_size: int, config: GenerationConfig) -> Tensor:
    """Uniform numbers that draw the next tokens, [R, V]; empty where nothing is drawn."""
    if config.temperature == 0.0:
        return torch.empty(0)
    generators = (stream(config.seed, Purpose.GENERATION, step, prompt) for prompt in prompt_ids)
    return torch.stack([torch.from_numpy(generator.random(vocab_size)) for generator in generators])
