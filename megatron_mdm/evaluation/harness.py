"""A run as a model of EleutherAI's lm-evaluation-harness (extra `[eval]`): its tasks, scored by this stack's ranks.

Every rank runs the harness on all requests; the requests are shared out among the data-parallel ranks inside each call,
so the harness sees a world of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.likelihood import LikelihoodConfig, negative_log_likelihoods
from megatron_mdm.evaluation.measures import Measure, Result, Source
from megatron_mdm.evaluation.perplexity import continuation
from megatron_mdm.generation.generate import generate
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from megatron_mdm.parallel.groups import ParallelContext

try:
    import lm_eval
    from lm_eval.api.model import LM
except ImportError as error:
    raise UserError(f"--harness needs lm-eval ({error}); install it with: pip install 'megatron-mdm[eval]'") from None


class HarnessConfig(LikelihoodConfig):
    """LLaDA's Monte-Carlo setting by default. num_times and num_repeats are for masked models."""

    counts: str = "systematic"
    num_times: int = Field(default=128, gt=0)
    num_repeats: int = Field(default=1, gt=0)
    gen_length: int = Field(default=128, gt=0)
    block_length: int = Field(default=32, gt=0)
    steps: int = Field(default=128, gt=0)
    num_fewshot: int = Field(default=0, ge=0)
    is_greedy: bool = True  # also say whether greedy decoding gives the continuation: one pass for each of its tokens

    def generation(self, length: int, block: int, steps: int) -> GenerationConfig:
        return GenerationConfig(
            gen_length=length,
            block_length=block,
            steps=steps,
            cfg_scale=self.cfg_scale,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def likelihood(self) -> LikelihoodConfig:
        return LikelihoodConfig(**{name: getattr(self, name) for name in LikelihoodConfig.model_fields})


class HarnessModel(LM):
    """lm_eval.api.model.LM over an inference engine. Text goes to the model as it is, without a prompt template."""

    def __init__(
        self, engine: Any, tokenizer: Tokenizer, settings: HarnessConfig, config: RunConfig, context: ParallelContext
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.settings, self.context = engine, tokenizer, settings, context
        self.method, self.max_length = config.diffusion.method, config.model.max_sequence_length
        self.special = SpecialIds.of(tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return "megatron-mdm"

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood or its lower bound, whether greedy decoding gives the continuation) of each request."""
        pairs = [self._encoded(*request.args) for request in requests]
        samples = [continuation(context, target) for context, target in pairs]
        found = negative_log_likelihoods(
            self.engine, samples, self.settings.likelihood(), self.special, self.context, self.method
        )
        greedy = self._greedy(pairs) if self.settings.is_greedy else [False] * len(pairs)
        results = [(-float(nats), same) for nats, same in zip(found.nats, greedy)]
        for request, result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of whole documents behind an eos, cut into pieces that fit the model; each piece by itself."""
        pieces, owner = [], []
        for index, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            size = self.max_length - 1
            for start in range(0, len(ids), size):
                pieces.append(continuation([self.special.eos], ids[start : start + size]))
                owner.append(index)
        totals = [0.0] * len(requests)
        if pieces:
            found = negative_log_likelihoods(
                self.engine, pieces, self.settings.likelihood(), self.special, self.context, self.method
            )
            for index, nats in zip(owner, found.nats):
                totals[index] -= float(nats)
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy responses up to the first of each request's stop strings."""
        settings = self.settings
        config = settings.generation(settings.gen_length, settings.block_length, settings.steps)
        room = self.max_length - config.gen_length
        prompts = [self._context(request.args[0])[-room:] for request in requests]
        responses = generate(self.engine, prompts, config, self.special, self.context, self.method)
        texts = []
        for request, response in zip(requests, responses):
            until = request.args[1].get("until") or []
            text = self.tokenizer.decode(response.tokens)
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _context(self, text: str) -> list[int]:
        """Never empty: without a text, an eos, as the harness's own models begin."""
        return self.tokenizer.encode(text) or [self.special.eos]

    def _encoded(self, context: str, target: str) -> tuple[list[int], list[int]]:
        """Token ids; spaces at the context's end go to the target, and the pair is encoded as one text."""
        kept = context.rstrip()
        target, context = context[len(kept) :] + target, kept
        whole, first = self.tokenizer.encode(context + target), self._context(context)
        target_ids = whole[len(first) :] if context else whole
        if not target_ids:  # the last token of the context has swallowed it
            target_ids = self.tokenizer.encode(target)
        return first[-max(1, self.max_length - len(target_ids)) :], target_ids

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether decoding one token at a time, over the whole length, gives each target."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (_, target) in enumerate(pairs):
            by_length[len(target)].append(index)
        same = [False] * len(pairs)
        for length, rows in by_length.items():
            config = self.settings.generation(length, length, length)
            prompts = [pairs[row][0] for row in rows]
            responses = generate(self.engine, prompts, config, self.special, self.context, self.method)
            for row, response in zip(rows, responses):
                same[row] = response.tokens == pairs[row][1]
        return same


def _prepare(
    source: Source, settings: HarnessConfig, config: RunConfig, tokenizer: Tokenizer
) -> Callable[[Any, ParallelContext], Result]:
    def run(engine: Any, context: ParallelContext) -> Result:
        model = HarnessModel(engine, tokenizer, settings, config, context)
        found = lm_eval.simple_evaluate(
            model=model, tasks=source.path.split(","), num_fewshot=settings.num_fewshot, limit=source.limit or None
        )
        return {"results": found["results"], "settings": settings.model_dump(mode="json")}

    return run


def _summary(result: Result) -> list[str]:
    return [
        f"{task}: {metric} {value:.4f}"
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]


HARNESS = Measure(HarnessConfig, _prepare, _summary, "harness.json", "harness_samples.jsonl")
