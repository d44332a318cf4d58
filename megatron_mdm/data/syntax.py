"""Where given texts or ids stand in a sample: answer delimiters (ISAD) and syntax of the prompt (SyRM)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import IsadConfig, SyrmConfig
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.data.tokenizer import Tokenizer

# SyRM's presets, as regular expressions: tags of HTML tables; bars and row breaks of pipe-linearised tables.
PRESETS: dict[str, str] = {
    "none": "",
    "html_table": r"</?(?:table|thead|tbody|tr|td|th)\b[^>]*>",
    "pipe_table": r"\||\n(?=\s*\|)|(?<=\|)\s*\n",
}
Finder = Callable[[NDArray[np.int32]], NDArray[np.bool_]]


def mark_delimiters(data: SftDataset, config: IsadConfig, tokenizer: Tokenizer) -> SftDataset:
    """The samples with eligible delimiters marked (ISAD). Raises UserError where no sample has any."""
    if not config.delimiters:
        return data
    find = finder(config.delimiters, "", tokenizer)
    marked = [sample._replace(delimiters=find(sample.tokens) & sample.eligible) for sample in data.samples]
    if not any(sample.delimiters.any() for sample in marked):
        raise UserError(f"'diffusion.isad.delimiters' {list(config.delimiters)}: none of them is in any response")
    return data.with_samples(marked)


def add_syntax(data: SftDataset, config: SyrmConfig, tokenizer: Tokenizer) -> SftDataset:
    """The samples with the prompt's syntax tokens eligible, too (SyRM): P = |response ∪ syntax|.

    The loss is then α L_response + (1 − α) L_syntax with α = P_response / P: biased towards syntax by a bounded amount.
    Raises UserError where samples have no prompt, or none has syntax in it.
    """
    if not config.enabled:
        return data
    if all(sample.eligible.all() for sample in data.samples):
        raise UserError("'diffusion.syrm' masks syntax of the prompt, but the samples have no prompt; remove it")
    find = finder(config.tokens, PRESETS[config.preset], tokenizer)
    found = [find(sample.tokens) & ~sample.eligible for sample in data.samples]
    if not any(places.any() for places in found):
        raise UserError("'diffusion.syrm': none of its tokens is in any prompt; check 'preset' and 'tokens'")
    return data.with_samples(
        [sample._replace(eligible=sample.eligible | places) for sample, places in zip(data.samples, found)]
    )


def finder(tokens: Sequence[int | str], pattern: str, tokenizer: Tokenizer) -> Finder:
    """tokens [S] → True where a token is one of the ids, or shares a character with an occurrence of one of the texts
    or of the pattern, however the tokenizer cuts it."""
    ids = np.array([token for token in tokens if isinstance(token, int)], dtype=np.int64)
    texts = [re.escape(token) for token in tokens if isinstance(token, str)]
    expression = re.compile("|".join([*texts, *([pattern] if pattern else [])])) if texts or pattern else None

    def find(sample: NDArray[np.int32]) -> NDArray[np.bool_]:
        found = np.isin(sample, ids)
        if expression is not None:
            pieces = tokenizer.pieces(sample.tolist())
            ends = np.cumsum([len(piece) for piece in pieces])
            for match in expression.finditer("".join(pieces)):
                first, last = np.searchsorted(ends, [match.start(), match.end() - 1], side="right")
                found[first : last + 1] = True
        return found

    return find
