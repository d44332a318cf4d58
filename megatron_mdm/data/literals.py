"""Texts of special tokens that stand in the data: there they are text, and control only where a template writes them.

`mark` puts a character that no text has before each of them; a template carries it through; `encode_pieces` takes what
is marked for text and what is not for the special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_mdm.data.tokenizer_files import Backend, Special

MARK = "\ufdd0"  # one of Unicode's noncharacters, which are for a program's own use


class Literals:
    """Which texts are special tokens to one tokenizer, and how they are kept as text."""

    def __init__(self, backend: Backend, mask_id: int) -> None:
        self.backend = backend
        self.unwanted = {special.id for special in backend.special.values()} - {backend.unknown_id} | {mask_id}
        names = _any_of(list(backend.special))
        never = r"(?!)"
        self._starts = re.compile(f"(?={names})" if names else never)
        self._control = re.compile(f"(?<!{MARK})({names})" if names else never)
        # Some tokenizers give a special token's id for its text whatever they are told: it is a piece of theirs. Then
        # every text is tried.
        tried = [*backend.special, *filter(None, [backend.token(mask_id)])]
        self.must_try = any(not self.unwanted.isdisjoint(ids) for ids in backend.encode_batch(tried))
        # Others find special tokens in normalised text, where the pattern does not see them.
        self.normalizes = any(special.normalized for special in backend.special.values())

    def mark(self, content: str) -> str:
        """A content as a template is to be given it. Raises ValueError where a special token in it cannot be text."""
        if MARK in content:
            raise ValueError(f"holds the noncharacter U+{ord(MARK):04X}")
        self.check(content)
        marked = self._starts.sub(MARK, content)
        if self.normalizes and not self.unwanted.isdisjoint(self.backend.encode_batch([content], True)[0]):
            marked = marked if MARK in marked else MARK + marked
        return marked

    def check(self, text: str) -> None:
        """Raise ValueError where the tokenizer would make a special token of a part of the text."""
        if not self.must_try:
            return
        found = self.unwanted.intersection(self.backend.encode_batch([text])[0])
        if found:
            token = self.backend.token(min(found))
            raise ValueError(
                f"the text holds '{token}', which the tokenizer takes for its special token {min(found)}; rewrite it"
            )

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of what a template wrote. Special tokens are control, but text where they are marked."""
        parsed = [self.backend.parses_special and MARK not in text for text in texts]
        whole = iter(self.backend.encode_batch([t for t, easy in zip(texts, parsed) if easy], parse_special=True))
        return [next(whole) if easy else self._encode_split(text) for text, easy in zip(texts, parsed)]

    def since_control(self, text: str) -> str:
        """The end of what a template wrote, from its last control token on; the whole text where there is none."""
        places = [found.start() for found in self._control.finditer(text)]
        return text[places[-1] if places else 0 :]

    def _encode_split(self, text: str) -> list[int]:
        parts = self._control.split(text)  # text, special token, text, …
        specials = [self.backend.special[token] for token in parts[1::2]]
        ids: list[int] = []
        for index, part in enumerate(parts[::2]):
            before = specials[index - 1] if index else Special(-1)
            after = specials[index] if index < len(specials) else Special(-1)
            part = part.lstrip() if before.strips_right else part
            part = part.rstrip() if after.strips_left else part
            ids += self.backend.encode_batch([part.replace(MARK, "")])[0] if part else []
            ids += [after.id] if after.id >= 0 else []
        return ids


def _any_of(tokens: Sequence[str]) -> str:
    """A pattern for any of the tokens, the longest first, that reads common beginnings once: trying hundreds of tokens
    at every place would take longer than tokenising."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[:1], []).append(token[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in rests.items() if first]
    if not branches or (len(branches) == 1 and "" not in rests):
        return "".join(branches)
    return f"(?:{'|'.join(branches)})" + "?" * ("" in rests)
