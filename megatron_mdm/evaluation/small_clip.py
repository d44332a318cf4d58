"""A small CLIP for small pictures with few captions, in transformers' format: what CLIP scores of a quickstart are made
by. Its scores say nothing beside those of a public CLIP.

A batch has one picture of each of some distinct captions; the loss is CLIP's, cross-entropy of rows and columns of the
table of scaled cosines (Radford et al. 2021).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.evaluation.clip_score import MEAN, STD, normalized

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_MOST_CAPTIONS = 64  # of a batch
_HIDDEN, _LAYERS, _HEADS, _PROJECTION = 64, 2, 4, 32
_MOST_PLACES = 77
_WARMUP = 20  # steps
_WEIGHT_DECAY = 0.01
_CLIPPING = 1.0  # norm of the gradient


@dataclass(frozen=True)
class SmallClipSettings:
    patch: int
    steps: int
    lr: float
    vocabulary: int  # tokens at most
    seed: int


def train_small_clip(
    pixels: NDArray[np.uint8],
    captions: Sequence[str],
    folder: Path,
    settings: SmallClipSettings,
    report: Callable[[float], None],
) -> None:
    """Train on square pictures [N, R, R, 3] and their captions, on the CPU, and write the folder (load_clip reads it).

    report is told each step's loss. Raises UserError for fewer than two distinct captions.
    """
    import transformers

    texts = sorted(set(captions))
    if len(texts) < 2:
        raise UserError("a CLIP needs pictures of two distinct captions at least")
    tokenizer = _tokenizer(texts, settings.vocabulary)
    ids = _padded([tokenizer(text, truncation=True, max_length=_MOST_PLACES)["input_ids"] for text in texts], tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model: Any = transformers.CLIPModel(_config(tokenizer, ids.shape[1], pixels.shape[1], settings.patch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=_WEIGHT_DECAY)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    pictures_of = [np.flatnonzero([caption == text for caption in captions]) for text in texts]
    for step in range(settings.steps):
        generator = stream(settings.seed, Purpose.DATA_ORDER, step)
        chosen = generator.permutation(len(texts))[:_MOST_CAPTIONS]
        rows = [int(generator.choice(pictures_of[text])) for text in chosen]
        for group in optimizer.param_groups:
            decay = 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
            group["lr"] = settings.lr * min(1.0, (step + 1) / _WARMUP) * decay
        output = model(input_ids=ids[chosen], pixel_values=normalized(torch.from_numpy(pixels[rows]), mean, std))
        target = torch.arange(len(chosen))
        table = output.logits_per_image
        loss = (functional.cross_entropy(table, target) + functional.cross_entropy(table.t(), target)) / 2.0
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIPPING)
        optimizer.step()
        report(loss.item())
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """CLIP's, with merges learnt from these texts: their words become tokens as far as the vocabulary has room."""
    import transformers

    plain = transformers.CLIPTokenizer()  # for the way it divides a text
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = plain.backend_tokenizer.normalizer
    model.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # whose order would be another each time
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    learnt: Any = json.loads(model.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    words = {token: place for place, token in enumerate(sorted(learnt["vocab"]))}
    # The last two ids, as OpenAI's are the last of theirs.
    words |= {_BOS: len(words), _EOS: len(words) + 1}
    return transformers.CLIPTokenizer(vocab=words, merges=merges)


def _padded(rows: Sequence[Sequence[int]], tokenizer: Any) -> Tensor:
    """[texts, longest], eos behind each: attention is causal, and the first eos is what counts."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[tokenizer.eos_token_id] * (longest - len(row))] for row in rows])


def _config(tokenizer: Any, places: int, resolution: int, patch: int) -> Any:
    import transformers

    if resolution % patch:
        raise UserError(f"pictures of {resolution} pixels are not divided by patches of {patch}")
    sizes = {
        "hidden_size": _HIDDEN,
        "intermediate_size": 4 * _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": places,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    return transformers.CLIPConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "image_size": resolution, "patch_size": patch},
        projection_dim=_PROJECTION,
    )
