"""The three kinds of requests that lm-eval makes of a model, answered by this stack's ranks. Knows nothing of lm-eval.

Text goes to the model as it is, without a prompt template. Every rank is given all requests; they are distributed
across the data-parallel ranks inside each call, and every rank returns all results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import validated
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.likelihood import LikelihoodConfig, Likelihoods, negative_log_likelihoods
from megatron_mdm.evaluation.perplexity import continuation
from megatron_mdm.evaluation.trained import TrainedFor
from megatron_mdm.generation.generate import generate
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from megatron_mdm.parallel.groups import ParallelContext

DEFAULT_MAX_TOKENS = 256  # of tasks that name none: lm-eval's own
MAX_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # lm-eval's names, first one first
KNOWN = {*MAX_TOKENS, "until", "do_sample", "temperature", "top_p", "top_k"}


class HarnessConfig(LikelihoodConfig):
    """LLaDA's Monte-Carlo setting by default. num_times and num_repeats are for masked models."""

    counts: str = "systematic"
    num_times: int = Field(default=128, gt=0)
    num_repeats: int = Field(default=1, gt=0)
    gen_length: int = Field(default=0, ge=0)  # response tokens at most; 0: each task's own max_gen_toks
    block_length: int = Field(default=32, gt=0)
    steps: int = Field(default=0, ge=0)  # denoising steps of a response; 0: one for each token
    num_fewshot: int = Field(default=-1, ge=-1)  # examples in a prompt; -1: each task's own number
    is_greedy: bool = True  # also say whether greedy decoding gives the continuation: one pass for each of its tokens

    def likelihood(self) -> LikelihoodConfig:
        return LikelihoodConfig(**{name: getattr(self, name) for name in LikelihoodConfig.model_fields})

    def generation(self, length: int, block: int, steps: int, **sampling: Any) -> GenerationConfig:
        shared = {"cfg_scale": self.cfg_scale, "batch_size": self.batch_size, "seed": self.seed}
        lengths = {"gen_length": length, "block_length": block, "steps": steps}
        return validated(GenerationConfig, {**lengths, **shared, **sampling}, {}, "--harness")


class Wish(NamedTuple):
    """What a task asks of a response."""

    max_tokens: int
    sampling: tuple[tuple[str, Any], ...]  # settings of GenerationConfig; empty: greedy
    stops: tuple[str, ...]  # the text ends before the first of these


def wish(keywords: Mapping[str, Any], settings: HarnessConfig) -> Wish:
    """The wish that a task's generation_kwargs state. settings.gen_length goes before the task's own length."""
    named = [int(keywords[name]) for name in MAX_TOKENS if keywords.get(name) is not None]
    until = keywords.get("until") or []
    temperature = float(keywords.get("temperature") or 0.0)
    sampling: tuple[tuple[str, Any], ...] = ()
    if keywords.get("do_sample", True) and temperature:
        drawn = {"temperature": temperature, "top_p": keywords.get("top_p"), "top_k": keywords.get("top_k")}
        sampling = tuple((name, value) for name, value in drawn.items() if value is not None)
    stops = [until] if isinstance(until, str) else until
    return Wish(settings.gen_length or (named or [DEFAULT_MAX_TOKENS])[0], sampling, tuple(filter(None, stops)))


def generation_for(asked: Wish, settings: HarnessConfig, max_length: int) -> GenerationConfig:
    """Generation in whole blocks of at least the tokens that are asked for. Raises UserError where they leave a model
    of max_length tokens no room for a prompt, or the blocks cannot share the steps evenly."""
    block = min(settings.block_length, asked.max_tokens)
    blocks = -(-asked.max_tokens // block)
    if blocks * block >= max_length:
        raise UserError(
            f"--harness: {asked.max_tokens} response tokens in blocks of {block} leave no room for a prompt in "
            f"'model.max_sequence_length' {max_length}; set a smaller gen_length, which goes before the task's own"
        )
    steps = settings.steps or blocks * block
    if steps % blocks:
        raise UserError(f"--harness: steps {steps} is no multiple of the {blocks} blocks of {asked.max_tokens} tokens")
    return settings.generation(blocks * block, block, steps, **dict(asked.sampling))


class Requests:
    """An inference engine with what it takes to answer texts."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Tokenizer,
        settings: HarnessConfig,
        config: RunConfig,
        objective: TrainedFor,
        context: ParallelContext,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.context = context
        self.objective = objective
        self.max_length = config.model.max_sequence_length
        self.longest = Room.of(config.model, settings.extrapolate).longest  # prompt and what is behind it
        self.special = SpecialIds.of(tokenizer)
        self.num_cut = 0  # prompts, since it was said last

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The log-likelihood, or its lower bound, of each (context, continuation), and whether greedy decoding gives
        the continuation. Collective."""
        encoded = [self._encoded(*pair) for pair in pairs]
        self._say_what_was_cut(len(pairs))
        found = self._nats([continuation(before, target) for before, target in encoded])
        greedy = self._are_greedy(encoded) if self.settings.is_greedy else [False] * len(pairs)
        return [(-float(nats), same) for nats, same in zip(found.nats, greedy)]

    def document_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihoods of whole documents behind an eos, cut into pieces that fit the model and are scored by
        themselves. Collective."""
        pieces = []
        owner = []
        for index, text in enumerate(texts):
            ids = self.tokenizer.encode(text)
            size = self.max_length - 1
            for start in range(0, len(ids), size):
                pieces.append(continuation([self.special.eos], ids[start : start + size]))
                owner.append(index)
        totals = [0.0] * len(texts)
        if pieces:
            for index, nats in zip(owner, self._nats(pieces).nats):
                totals[index] -= float(nats)
        return totals

    def responses(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The response to each (prompt, generation_kwargs). Collective."""
        wishes = [wish(keywords, self.settings) for _, keywords in prompts]
        if unknown := {name for _, keywords in prompts for name in keywords} - KNOWN:
            self._say(f"the tasks' generation settings {', '.join(sorted(unknown))} have no meaning here")
        texts = [""] * len(prompts)
        for rows in _alike([(asked.max_tokens, asked.sampling) for asked in wishes]):
            config = generation_for(wishes[rows[0]], self.settings, self.longest)
            before = [self._fitting(self._context(prompts[row][0]), config.gen_length) for row in rows]
            for row, response in zip(rows, self._generated(before, config)):
                text = self.tokenizer.decode(response[: wishes[row].max_tokens])
                texts[row] = min((text.split(stop)[0] for stop in wishes[row].stops), key=len, default=text)
        self._say_what_was_cut(len(prompts))
        return texts

    def _nats(self, samples: list[Any]) -> Likelihoods:
        settings = self.settings.likelihood()
        scoring = self.objective.scoring
        return negative_log_likelihoods(self.engine, samples, settings, self.special, self.context, scoring)

    def _generated(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        decode = self.objective.decoder
        responses = generate(self.engine, prompts, config, self.special, self.context, decode)
        return [response.tokens for response in responses]

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether decoding one token at a time, over the whole length, gives each target."""
        same = [False] * len(pairs)
        for rows in _alike([len(target) for _, target in pairs]):
            length = len(pairs[rows[0]][1])
            config = self.settings.generation(length, length, length)
            for row, response in zip(rows, self._generated([pairs[row][0] for row in rows], config)):
                same[row] = response == pairs[row][1]
        return same

    def _encoded(self, before: str, target: str) -> tuple[list[int], list[int]]:
        """Token ids; spaces at the context's end go to the target, and the pair is encoded as one text."""
        kept = before.rstrip()
        target = before[len(kept) :] + target
        before = kept
        whole = self.tokenizer.encode(before + target)
        first = self._context(before)
        target_ids = whole[len(first) :] if before else whole
        if not target_ids:  # the last token of the context has swallowed it
            target_ids = self.tokenizer.encode(target)
        return self._fitting(first, len(target_ids)), target_ids

    def _context(self, text: str) -> list[int]:
        """Ids of a context; without a text, an eos, as the harness's own models begin."""
        return self.tokenizer.encode(text) or [self.special.eos]

    def _fitting(self, ids: list[int], behind: int) -> list[int]:
        """The end of a context that leaves the model room for so many tokens behind it."""
        room = self.longest - behind
        if room < 1:
            raise UserError(
                f"--harness: {behind} tokens to score do not fit 'model.max_sequence_length' {self.max_length}"
            )
        self.num_cut += len(ids) > room
        return ids[-room:]

    def _say(self, what: str) -> None:
        if self.context.is_main:
            print(f"harness: {what}", flush=True)

    def _say_what_was_cut(self, total: int) -> None:
        if self.num_cut:
            self._say(f"{self.num_cut} of {total} prompts cut at their beginning to fit {self.max_length} tokens")
        self.num_cut = 0


def _alike(keys: Sequence[Any]) -> Iterator[list[int]]:
    """The rows of each key, in the order in which keys first come: the same on every rank."""
    rows: dict[Any, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return iter(rows.values())
