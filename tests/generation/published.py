"""The samplers of LLaDA and Dream, rewritten from what their authors published: dense, rows of one length at a time.

Each takes logits_of, tokens [R, S] → logits [R, S, V] (Dream's already shifted), and the prompts [R, L], and gives the
responses [R, gen_length]. One thing is not theirs: the mask is never a candidate, though its probability counts; where
top_p and top_k keep nothing else, the most likely other token is. Noise is given from outside, for each step and row:
(uniforms [n], uniforms [n, V]) of the n masked positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
Noise = Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]  # (step, row, masked positions)


def llada(
    logits_of: LogitsOf,
    prompts: torch.Tensor,
    settings: dict[str, Any],
    mask: int,
    noise: Noise,
    logits_inf: tuple[int, ...] = (),
    confidence_inf: tuple[int, ...] = (),
) -> torch.Tensor:
    """generate.py of ML-GSAI/LLaDA, of which MMaDA's mmu_generate is a copy. logits_inf, confidence_inf: the ids of its
    options logits_eos_inf and confidence_eos_eot_inf. settings' threshold is Fast-dLLM's."""
    gen_length = settings["gen_length"]
    block_length = settings["block_length"]
    num_blocks = gen_length // block_length
    steps = settings["steps"] // num_blocks
    start = prompts.shape[1]
    scale = settings.get("cfg_scale", 0.0)
    x = torch.cat([prompts, torch.full((len(prompts), gen_length), mask)], 1)
    for block in range(num_blocks):
        inside = slice(start + block * block_length, start + (block + 1) * block_length)
        counts = [block_length // steps + (step < block_length % steps) for step in range(steps)]
        for step in range(block_length if settings.get("threshold") else steps):
            masked = x == mask
            masked[:, : inside.start] = masked[:, inside.stop :] = False
            if not masked.any():
                break
            logits = logits_of(x)
            if scale:
                blind = x.clone()
                blind[:, :start] = mask
                unconditional = logits_of(blind)
                logits = unconditional + (scale + 1) * (logits - unconditional)
            logits[..., list(logits_inf)] = -torch.inf
            x0, order = candidates_and_order(
                logits, masked, mask, settings.get("temperature", 0.0), noise, block * max(steps, block_length) + step
            )
            if settings.get("remasking") == "random":
                confidence = order
            else:
                scored = logits.double()
                scored[..., list(confidence_inf)] = -torch.inf
                confidence = scored.softmax(-1).gather(-1, x0[..., None])[..., 0]
            confidence[~masked] = -torch.inf
            for row in range(len(x)):
                count = 1 if settings.get("threshold") else counts[step]
                chosen = confidence[row].argsort(descending=True, stable=True)[:count]
                if settings.get("threshold"):
                    sure = (confidence[row] >= settings["threshold"]).nonzero()[:, 0]
                    chosen = torch.cat([chosen, sure])
                chosen = chosen[masked[row, chosen]]
                x[row, chosen] = x0[row, chosen]
    return x[:, start:]


def dream(
    logits_of: LogitsOf, prompts: torch.Tensor, settings: dict[str, Any], mask: int, noise: Noise, eps: float = 1e-3
) -> torch.Tensor:
    """diffusion_generate of HKUNLP/Dream, generation_utils.py; settings' remasking is its alg."""
    start = prompts.shape[1]
    steps = settings["steps"]
    alg = settings["remasking"]
    temperature = settings.get("temperature", 0.0)
    alg_temp = settings.get("alg_temp", 0.0)
    x = torch.cat([prompts, torch.full((len(prompts), settings["gen_length"]), mask)], 1)
    timesteps = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        masked = x == mask
        whole = logits = logits_of(x).double()
        t = timesteps[step]
        s = timesteps[step + 1]
        if temperature > 0:
            logits = logits / temperature
        if settings.get("top_p"):
            logits = top_p_logits(logits, settings["top_p"])
        if settings.get("top_k"):
            worst = logits.topk(settings["top_k"]).values[..., -1:]
            logits = logits.masked_fill(logits < worst, -torch.inf)
        probs = logits.softmax(-1)
        x0, order = candidates_and_order(logits, masked, mask, 1.0 if temperature > 0 else 0.0, noise, step)
        only_mask = logits.isfinite().sum(-1) == logits[..., mask].isfinite()
        x0[only_mask] = whole.index_fill(-1, torch.tensor([mask]), -torch.inf)[only_mask].argmax(-1)
        if alg == "origin":
            transfer = masked & (order < (1 - s / t if step < steps - 1 else 1))
            x[transfer] = x0[transfer]
            continue
        if alg == "topk_margin":
            best = probs.sort(-1, descending=True).values
            confidence = best[..., 0] - best[..., 1]
        elif alg == "entropy":
            confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
        else:
            confidence = probs.gather(-1, x0[..., None])[..., 0]
        for row in range(len(x)):
            places = masked[row].nonzero()[:, 0]
            count = int(len(places) * (1 - s / t)) if step < steps - 1 else len(places)
            if alg_temp:  # torch.multinomial without replacement: the greatest of probability / exponential number
                scores = (confidence[row, places] / alg_temp).softmax(0) / -torch.log(order[row, places])
            else:
                scores = confidence[row, places]
            chosen = places[scores.argsort(descending=True, stable=True)[:count]]
            x[row, chosen] = x0[row, chosen]
    return x[:, start:]


def top_p_logits(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    values, ids = logits.sort(-1, descending=True)
    removed = values.softmax(-1).cumsum(-1) > top_p
    removed[..., 1:] = removed[..., :-1].clone()
    removed[..., 0] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, ids, removed), -torch.inf)


def candidates_and_order(
    logits: torch.Tensor, masked: torch.Tensor, mask: int, temperature: float, noise: Noise, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, S] ids drawn from exp(logits / temperature) without the mask, [R, S] uniforms)."""
    logits = logits.double().clone()
    logits[..., mask] = -torch.inf
    order = torch.zeros(logits.shape[:2], dtype=torch.float64)
    for row in range(len(logits)):
        uniforms, gumbels = noise(step, row, int(masked[row].sum()))
        order[row, masked[row]] = torch.from_numpy(uniforms)
        if temperature:
            logits[row, masked[row]] -= temperature * torch.log(-torch.log(torch.from_numpy(gumbels)))
    return logits.argmax(-1), order
