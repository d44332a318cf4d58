"""What generation is told and what it gives: lengths, steps, rules; special ids; responses; the engine it asks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_mdm.batch import IdRange, ModelInputs
from megatron_mdm.config.load import validated
from megatron_mdm.config.schema import ModelConfig, RunConfig, Section
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.generation.remask import COMMIT_SCHEDULES, REMASKING, by_chance
from megatron_mdm.models.cache import Window

# Settings of completions of reinforcement learning that differ from the defaults
ROLLOUTS: dict[str, Any] = {"temperature": 1.0, "stop_at_eos": True, "noise": "device"}


class LogitsEngine(Protocol):
    """What generation asks of an engine: engine.base.Engine, or engine.inference.InferenceEngine, which alone takes
    windows of a cache."""

    def logits(self, inputs: ModelInputs, window: Window | None = None) -> Tensor: ...


class IdsEngine(Protocol):
    """What the generation of images asks of one: logits of image tokens only, of which every engine is capable."""

    def logits(self, inputs: ModelInputs, *, ids: IdRange | None = None) -> Tensor: ...


class Batches(Protocol):
    """The setting that all generation has."""

    @property
    def batch_size(self) -> int: ...


class GenerationConfig(Section):
    """Autoregressive models use gen_length, extrapolate, temperature, top_p, top_k, batch_size and seed only."""

    gen_length: int = Field(default=128, gt=0)  # response tokens
    extrapolate: bool = False  # let prompt and response be longer than model.max_sequence_length
    block_length: int = Field(default=32, gt=0)  # blocks are finished left to right
    steps: int = Field(default=128, gt=0)  # denoising steps in all, shared evenly by the blocks
    # How many tokens each step of a block commits: linear (LLaDA), cosine (MaskGIT), epsilon (Dream)
    schedule: str = "linear"
    eps: float = Field(default=1e-3, gt=0.0, lt=1.0)  # of schedule epsilon: the last step's time
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)  # draw from the fewest tokens that hold this probability; 1: all
    top_k: int = Field(default=0, ge=0)  # draw from so many most likely tokens; 0: all
    # Which positions are committed. LLaDA: low_confidence, random; Dream: maskgit_plus, topk_margin, entropy, origin
    remasking: str = "low_confidence"
    alg_temp: float = Field(
        default=0.0, ge=0.0
    )  # Dream: positions drawn by softmax(confidence / alg_temp); 0: the best
    # Parallel decoding: every step commits all candidates at least this confident, and at least one. 0: by schedule.
    threshold: float = Field(default=0.0, ge=0.0, le=1.0)
    cfg_scale: float = Field(default=0.0, ge=0.0)  # classifier-free guidance s: l_u + (s + 1)(l_c - l_u)
    # forbidden: eos is never produced; last: eos and other ends are committed only where nothing else is left to commit
    eos: Literal["free", "forbidden", "last"] = "free"
    stop_at_eos: bool = False  # leave out the blocks behind an end token; the text is the same
    # Approximate: within a block, keys and values from the pass that began it are used again. prefix: of the prompt and
    # the finished blocks; dual: of the blocks to come, too.
    cache: Literal["none", "prefix", "dual"] = "none"
    # Where random numbers are made: on the host, V of them for each masked position; or hashed where the logits are,
    # the same on every device. With either, a response depends on the seed, the prompt's number and the settings only.
    noise: Literal["host", "device"] = "host"
    batch_size: int = Field(default=16, gt=0)  # prompts per forward pass and data-parallel rank
    seed: int = 0

    @classmethod
    def of_rollouts(cls, config: RunConfig, **changes: Any) -> GenerationConfig:
        """How completions of reinforcement learning are drawn: `rl.generation`, whose defaults are ROLLOUTS', with the
        run's seed. Raises UserError."""
        tree = {**ROLLOUTS, **config.rl.generation, "seed": config.seed, **changes}
        return validated(cls, tree, {}, "'rl.generation'")

    @model_validator(mode="after")
    def _consistent(self) -> GenerationConfig:
        if self.gen_length % self.block_length:
            raise ValueError(f"gen_length {self.gen_length} must be a multiple of block_length {self.block_length}")
        if self.steps % self.num_blocks:
            raise ValueError(f"steps {self.steps} must be a multiple of the {self.num_blocks} blocks")
        for name, table in (("remasking", REMASKING), ("schedule", COMMIT_SCHEDULES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}")
        rule = REMASKING[self.remasking]
        if self.threshold and not rule.is_probability:
            known = " or ".join(name for name, other in REMASKING.items() if other.is_probability)
            raise ValueError(f"threshold compares probabilities; it needs remasking {known}")
        if self.alg_temp and (rule.is_chance or self.threshold):
            what = "threshold takes the most confident" if self.threshold else f"remasking {self.remasking} has none"
            raise ValueError(f"alg_temp draws positions by their confidence; {what}")
        if self.eos == "last" and rule.select is by_chance:
            raise ValueError(f"eos last needs an order of positions; remasking {self.remasking} has none")
        return self

    def room(self, model: ModelConfig) -> Room:
        return Room.of(model, self.extrapolate, self.gen_length)

    @property
    def draws(self) -> bool:
        """Whether chance decides anything."""
        return bool(self.temperature or self.alg_temp or REMASKING[self.remasking].is_chance)

    @property
    def most_passes(self) -> int:
        """Forward passes of a response, at most."""
        return self.gen_length if self.threshold else self.steps

    @property
    def num_blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.num_blocks


class SpecialIds(NamedTuple):
    mask: int
    pad: int
    eos: int = -1  # −1: none
    other_ends: frozenset[int] = frozenset()  # besides eos: a response ends with the first of all these

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialIds:
        return cls(tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.other_end_ids)

    @property
    def end_ids(self) -> list[int]:
        return sorted(self.other_ends | ({self.eos} if self.eos >= 0 else set()))

    def ends(self, tokens: Tensor) -> Tensor:
        """True at the token ids, of any shape, that end a response."""
        return torch.isin(tokens, torch.tensor(self.end_ids, dtype=tokens.dtype, device=tokens.device))


class Response(NamedTuple):
    tokens: list[int]
    steps: int  # forward passes until the last of them was chosen
