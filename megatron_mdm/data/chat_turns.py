"""Which part of a rendered chat template the target tokens are: each answer and the token that ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_mdm.data.chat_template import ChatTemplate
from megatron_mdm.data.conversation import ASSISTANT, USER, Message, Piece, last_answer, of_one_text

_MARK = "\ue000"  # stands for an answer; no template writes it
_ANCHOR = 32  # characters by which two texts are aligned
_SHORTEST = ([Message(USER, "a")], [Message("system", "a"), Message(USER, "a")])
_NO_END = (
    "the tokenizer's chat template puts no special token behind an answer, so that a response ends only at "
    "'data.eos_token', if that is trained on (data.eos_padding), or at gen_length"
)
_UNKNOWN_END = (
    "the tokenizer's chat template refuses a short conversation, so that what ends an answer in it is not known; name "
    "the token in 'data.end_tokens'"
)


class _Turn(NamedTuple):
    text: str  # of the conversation up to this turn
    targets: list[tuple[int, int]]  # places [first, end) of this turn


@dataclass(frozen=True)
class ChatTurns:
    """A chat template whose answers are targets, each behind the text that stands before it when it is generated."""

    chat: ChatTemplate
    special: re.Pattern[str]  # the tokenizer's special tokens
    tail: str = ""  # what follows an answer at the end of a conversation
    # Of a template that does not listen to add_generation_prompt: what follows an answer inside one, and a prompt. What
    # ends an answer is then told from the opening of the next one.
    following: str = ""
    prompt_text: str = ""
    end_tokens: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, chat: ChatTemplate, special_tokens: Sequence[str]) -> ChatTurns:
        longest_first = sorted(filter(str.strip, special_tokens), key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        for asked in _SHORTEST:
            try:
                return cls._probed(chat, special, asked)
            except ValueError:  # the template refuses it
                continue
        return cls(chat, special, warnings=(_UNKNOWN_END,))

    @classmethod
    def _probed(cls, chat: ChatTemplate, special: re.Pattern[str], asked: Sequence[Message]) -> ChatTurns:
        """The template's turns, with what a short conversation shows of how it ends an answer."""
        answered = [*asked, Message(ASSISTANT, _MARK)]
        text = chat(answered, False)
        prompt = chat(asked, True)
        header, _, _ = text.partition(_MARK)
        tail = text.rpartition(_MARK)[2]
        turns = cls(chat, special, tail, _following(chat, answered, text), prompt)
        end = special.search(turns._end(tail))
        warnings = []
        if end is None:
            warnings.append(_NO_END)
        elif chat.marks_answers:
            place = len(text) - len(tail) + tail.find(end[0])
            if not any(first <= place < last for first, last in chat.with_answers(answered)[1]):
                warnings.append(
                    f"the {{% generation %}} block of the tokenizer's chat template leaves out {end[0]}, which ends an "
                    "answer: the model is not trained to end a response"
                )
        if not chat.marks_answers and not text.startswith(prompt):
            missing = prompt[_num_shared(prompt, header) :]
            warnings.append(
                f"the tokenizer's chat template ends a prompt for generation with {missing!r}, which does not stand "
                "before the answers in a conversation: they are trained on without it"
            )
        return replace(turns, end_tokens=(end[0],) if end else (), warnings=tuple(warnings))

    @property
    def date(self) -> str:
        return self.chat.day.isoformat() if self.chat.names_the_date else ""

    @property
    def fingerprint(self) -> str:
        return self.chat.fingerprint

    def samples(self, messages: Sequence[Message], last_only: bool) -> list[list[Piece]]:
        last = last_answer(messages)
        answers = [place for place in range(last + 1) if messages[place].role == ASSISTANT]
        samples: list[list[Piece]] = []
        said = ""
        for place in answers[-1:] if last_only else answers:
            turn = self._turn(messages[:place], messages[place])
            if not samples or not turn.text.startswith(said):
                samples.append([])  # earlier turns read otherwise here: this answer is a sample of its own
                said = ""
            done = len(said)
            for first, end in turn.targets:
                samples[-1] += [Piece(turn.text[done:first], False), Piece(turn.text[first:end], True)]
                done = end
            said = turn.text[:done]
        return list(map(of_one_text, samples))

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        return [Piece(self.chat(messages, True), False)]

    def _turn(self, history: Sequence[Message], answer: Message) -> _Turn:
        if self.chat.marks_answers:
            return self._marked_turn(history, answer)
        text = self.chat([*history, answer], False)
        prompt = self.chat(history, True) if history else ""
        content_end = len(text) - len(self.tail)
        if not history or not text.startswith(prompt) or not text.endswith(self.tail) or content_end < len(prompt):
            return self._odd_turn(history, answer, text, prompt)
        return _Turn(text, [(len(prompt), content_end + len(self._end(self.tail)))])

    def _marked_turn(self, history: Sequence[Message], answer: Message) -> _Turn:
        """The turn whose targets {% generation %} blocks mark."""
        text, spans = self.chat.with_answers([*history, answer])
        earlier = len(self.chat.with_answers(history)[1]) if history else 0
        own = spans[earlier:] or spans[-1:]  # some mark the last answer only
        targets = [span for span in own if span[0] < span[1]]
        if not targets:
            raise ValueError("the chat template's {% generation %} blocks hold nothing of an answer")
        return _Turn(text, targets)

    def _odd_turn(self, history: Sequence[Message], answer: Message, text: str, prompt: str) -> _Turn:
        """A turn whose prompt for generation is no prefix, or whose ending depends on the answer: where the answer is
        shows when another text stands in its place."""
        marked = self.chat([*history, answer._replace(content=_MARK)], False)
        header, found, _ = marked.partition(_MARK)
        tail = marked.rpartition(_MARK)[2]
        if not found:
            raise ValueError("the chat template leaves out what the assistant says")
        first = min(_num_shared(prompt, header), _num_shared(prompt, text)) if history else len(header)
        if history and first < _num_shared(self.chat(history, False), prompt):
            # What stands before the answer reads otherwise without it: the target stands behind what generation sees.
            if not text.startswith(header):
                raise ValueError("the chat template writes an answer and what precedes it in one")
            text = prompt + text[_end_of_prompt(prompt, header) :]
            first = len(prompt)
        end = len(text) - len(tail) + len(self._end(tail))
        if not text.endswith(tail):  # it depends on what the answer says
            ends = [text.rfind(token, first) + len(token) for token in self.end_tokens if token in text[first:]]
            end = max(ends, default=len(text))
        return _Turn(text, [(first, end)])

    def _end(self, tail: str) -> str:
        """The part of what follows an answer that ends it: up to the first special token."""
        token = self.special.search(tail)
        if token and not (self.following and self.prompt_text.endswith(tail[token.start() :])):
            return tail[: token.end()]
        if not self.following:
            return tail
        # What is last in it opens the next answer, as a prompt does. What is first is there in a conversation, too.
        common = tail[: _num_shared(tail, self.following)]
        if token and token.start() < len(common):
            return tail[: token.end() if token.end() <= len(common) else token.start()]
        return common


def _following(chat: ChatTemplate, answered: Sequence[Message], text: str) -> str:
    """What a template that does not listen to add_generation_prompt writes behind an answer inside a conversation."""
    try:
        if chat(answered, True) == text:
            return chat([*answered, Message(USER, "a")], False).rpartition(_MARK)[2]
    except ValueError:  # it refuses a second question
        pass
    return ""


def _num_shared(one: str, other: str) -> int:
    """The number of characters that both begin with."""
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))


def _end_of_prompt(prompt: str, header: str) -> int:
    """The place in a header before an answer where the prompt for generation ends, by their last characters."""
    for size in range(min(_ANCHOR, len(prompt)), 0, -1):
        place = header.rfind(prompt[-size:])
        if place >= 0:
            return place + size
    return len(header)
