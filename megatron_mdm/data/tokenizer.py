"""Text ↔ ids, and the special ids of masked diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig, ModelConfig
from megatron_mdm.data.conversation import Message, Piece, Template, TemplateSource
from megatron_mdm.data.literals import Literals
from megatron_mdm.data.templates import NEEDED_TOKENS, TEMPLATES
from megatron_mdm.data.tokenizer_files import Backend, open_tokenizer

_SHOWN = 40  # characters of a text, in a message


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer file, its special tokens, and the template of conversations."""

    backend: Backend
    num_ids: int  # special tokens that were added included
    mask_id: int
    pad_id: int
    eos_id: int
    template: Template  # of conversations
    other_end_ids: frozenset[int] = frozenset()  # besides eos_id: a response ends with the first of all these

    @cached_property
    def literals(self) -> Literals:
        """What keeps special tokens' texts in the data apart from special tokens."""
        return Literals(self.backend, self.mask_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, the whole of it and nothing else; the text of a special token is text.

        Raises UserError where the tokenizer cannot keep that.
        """
        try:
            self.literals.check(text)
        except ValueError as error:
            raise UserError(f"{text[:_SHOWN]!r}: {error}") from None
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts at once, which is faster; whoever calls it has checked them."""
        return self.backend.encode_batch(texts)

    def samples_of(self, messages: Sequence[Message], last_only: bool) -> list[list[Piece]]:
        """A conversation in the template, for encode_pieces: see Template.samples.

        Raises ValueError where the template refuses it, or a special token's text in it cannot be encoded as text.
        """
        return self.template.samples([message.mapped(self.literals.mark) for message in messages], last_only)

    def prompt_of(self, messages: Sequence[Message]) -> list[Piece]:
        """What stands before the answer to a conversation, for encode_pieces. Raises as samples_of does."""
        return self.template.prompt([message.mapped(self.literals.mark) for message in messages])

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of what a template wrote: its special tokens are control, those in the conversation are text."""
        return self.literals.encode_pieces(texts)

    def ids_of(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The ids of each piece in the text behind which it stands; its own where a token would span both."""
        encoded = self.encode_pieces([piece.text for piece in pieces])
        behind = [place for place, piece in enumerate(pieces) if piece.behind and self.reads_what_stands_before]
        before = [self.literals.since_control(pieces[place].behind) for place in behind]
        together = self.encode_pieces([text + pieces[place].text for place, text in zip(behind, before)])
        for place, context, ids in zip(behind, self.encode_pieces(before), together):
            if ids[: len(context)] == context:
                encoded[place] = ids[len(context) :]
        return encoded

    @cached_property
    def reads_what_stands_before(self) -> bool:
        """Whether a text's ids depend on what it stands behind: sentencepiece and its like put a space before the
        first word."""
        first, then, both = self.backend.encode_batch(["\n", "a", "\na"])
        return first + then != both

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, up to the first end token; mask and padding are left out."""
        without_text = (self.mask_id, self.pad_id)
        kept = (int(token) for token in self.up_to_end(ids) if token not in without_text)
        return self.backend.decode([token for token in kept if token < self.backend.num_ids])

    def up_to_end(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids before the first end token: what follows it belongs to no response."""
        return ids[: next((place for place, token in enumerate(ids) if self.is_end(token)), len(ids))]

    def is_end(self, token: int) -> bool:
        return token == self.eos_id or token in self.other_end_ids

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of ids for a person's eyes: end tokens as ⏎, ids that have no text by number."""
        text = ""
        run = list[int]()
        behind_all = -1
        for token in [*ids, behind_all]:
            if token != behind_all and not self.is_end(token) and token < self.backend.num_ids:
                run.append(int(token))
                continue
            text += self.backend.decode(run) if run else ""
            run = []
            if token != behind_all:
                text += "⏎" if self.is_end(token) else f"<{token}>"
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id stands for, spaces included: together, the text they encode. Added ids are empty."""
        return [self.backend.piece(token) if token < self.backend.num_ids else "" for token in ids]


def load_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a data section. A special token that the file lacks gets the next free id."""
    backend = open_tokenizer(data.tokenizer)
    given = {name: getattr(data, name) for name in ("mask_token", "pad_token", "eos_token")}
    known = {name: backend.token_id(token) if isinstance(token, str) else token for name, token in given.items()}
    taken = {token_id for token_id in known.values() if token_id is not None}
    num_ids = backend.num_ids
    new = dict[int | str, int]()
    ids: dict[str, int] = {}
    for name, token in given.items():
        token_id = known[name]
        if token_id is None and not data.tokenizer:
            raise UserError(f"'data.tokenizer' is empty, so 'data.{name}' must be a token id")
        if token_id is None and token not in new:
            while num_ids in taken:
                num_ids += 1
            new[token] = num_ids
            num_ids += 1
        ids[name] = new[token] if token_id is None else token_id
        text = token if isinstance(token, str) else backend.token(token)
        if token_id is not None and text is not None:
            backend.make_special(text)
    if ids["mask_token"] in (ids["pad_token"], ids["eos_token"]):
        raise UserError(f"'data.mask_token' has the id {ids['mask_token']} of another special token")
    missing = [token for token in NEEDED_TOKENS.get(data.template, ()) if backend.token_id(token) is None]
    if missing:
        raise UserError(f"'data.template' {data.template} needs the token {missing[0]}, which {data.tokenizer} lacks")
    template = TEMPLATES[data.template](TemplateSource(data.tokenizer, list(backend.special), data.template_date))
    ends = _end_ids([*template.end_tokens, *data.end_tokens], backend, data.tokenizer)
    if ids["mask_token"] in ends:
        raise UserError(f"'data.mask_token' has the id {ids['mask_token']} of a token that ends a response")
    return Tokenizer(backend, num_ids, ids["mask_token"], ids["pad_token"], ids["eos_token"], template, ends)


def _end_ids(tokens: Sequence[int | str], backend: Backend, path: str) -> frozenset[int]:
    """The ids of end tokens, given as texts or ids. Raises UserError where the tokenizer lacks one."""
    ids = {token: backend.token_id(token) if isinstance(token, str) else token for token in tokens}
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise UserError(f"'{missing[0]}' ends a response, but {path} has no such token; see 'data.end_tokens'")
    return frozenset(token_id for token_id in ids.values() if token_id is not None)


def resolve_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model section with vocab_size as a number that holds every id. Raises UserError where it cannot."""
    size = tokenizer.num_ids if model.vocab_size == "tokenizer" else model.vocab_size
    for name in ("mask", "pad", "eos"):
        token_id = getattr(tokenizer, f"{name}_id")
        if not 0 <= token_id < size:
            raise UserError(
                f"'data.{name}_token': id {token_id} is outside the vocabulary of {size} ids; "
                "correct it or raise 'model.vocab_size'"
            )
    if tokenizer.num_ids > size:
        raise UserError(f"'model.vocab_size' {size} is smaller than the tokenizer's {tokenizer.num_ids} ids")
    return model.model_copy(update={"vocab_size": size})
