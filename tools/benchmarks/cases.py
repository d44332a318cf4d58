"""What the benchmark `steps` trains: models, sample lengths, batches, and this stack's trainer for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mdm.config.schema import DataConfig, DiffusionConfig, RunConfig
from megatron_mdm.config.sections.diffusion import IsadConfig
from megatron_mdm.data.columns import prompt_and_response
from megatron_mdm.data.loader import PrefetchLoader, TrainLoader
from megatron_mdm.data.records import read_records
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.sft import SftDataset, encode_prompt
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS, CENTRES
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.zero import ZeroEngine
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.build import layout_ahead
from megatron_mdm.training.loop import Trainer
from megatron_mdm.training.source import SupervisedSource

NUM_SAMPLES = 1024  # in a benchmark's data set
NUM_SPECIAL = 5  # ids 0 (padding) … 4 (mask) never occur in clean samples
MASK_ID = 4
PAD_ID = 0
SEED = 42


@dataclass(frozen=True)
class Case:
    """A model with its data: everything but the method."""

    name: str
    vocab_size: int
    dtype: str  # fp32 or bf16
    lengths: str  # "gsm8k", "short" (about 48 tokens), or "equal" (128 tokens, 64 of them the response)
    global_size: int
    micro_size: int
    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 688
    num_heads: int = 4
    mode: str = "bucketed"  # batch.mode
    lora_rank: int = 0  # of adapters; 0: every parameter is trained

    def small(self) -> Case:
        """The same case at a size for a smoke test."""
        return replace(
            self,
            vocab_size=min(self.vocab_size, 4096),
            global_size=8,
            micro_size=8,
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
        )

    def config(self, zero: int) -> RunConfig:
        """The run configuration, with the standard method."""
        model = {
            name: getattr(self, name)
            for name in ("vocab_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_heads")
        }
        sections: dict[str, Any] = {
            "model": {
                **model,
                "num_kv_heads": self.num_heads,
                "max_sequence_length": 512,
                "lora": {"rank": self.lora_rank},
            },
            "data": {"train": self.lengths, "mask_token": MASK_ID, "pad_token": PAD_ID, "max_length": 512},
            "parallel": {"zero": zero},
            "batch": {"global_size": self.global_size, "micro_size": self.micro_size, "mode": self.mode},
            "optimizer": {"lr": 1e-4},
            "schedule": {"name": "constant", "steps": 10**6},
            "precision": {"dtype": self.dtype},
            "checkpoint": {"directory": "unused"},
            "seed": SEED,
        }
        return RunConfig.model_validate(sections)


@dataclass(frozen=True)
class Method:
    """How t and the masks are drawn: fields of the section 'diffusion'."""

    t_sampler: str = "uniform"
    views: int = 1
    multisample: int = 1
    strata: str = "none"
    masking: str = "bernoulli"
    isad: bool = False  # two delimiters in each response
    syrm: bool = False  # every tenth token of the prompt is syntax

    def diffusion(self) -> DiffusionConfig:
        fields = {key: value for key, value in vars(self).items() if key not in ("isad", "syrm")}
        return DiffusionConfig(**fields, isad=IsadConfig(delimiters=(NUM_SPECIAL,) if self.isad else ()))

    def marked(self, sample: Sample) -> Sample:
        """The sample as ISAD or SyRM would have marked it."""
        place = np.arange(len(sample.tokens))
        length = len(sample.tokens)
        delimiters = (place == length - 3) | (place == length - 4) if self.isad else sample.delimiters
        return sample._replace(delimiters=delimiters, eligible=sample.eligible | (self.syrm & (place % 10 == 0)))

    @property
    def rows_per_sample(self) -> int:
        return self.views * self.multisample


@dataclass(frozen=True)
class LengthSource:
    """Where GSM8K's lengths come from; `used` says which."""

    data: Path | None
    tokenizer: Path | None

    @property
    def used(self) -> str:
        if self.data and self.tokenizer:
            return f"the first {NUM_SAMPLES} samples of {self.data}, tokens of {self.tokenizer}"
        return "a log-normal with median 140 and 99th percentile 315, like GSM8K's (or give --gsm8k, --tokenizer)"

    def gsm8k(self) -> NDArray[np.int64]:
        """[N, 2]: tokens of prompt and response (eos included)."""
        if not (self.data and self.tokenizer):
            total = np.random.default_rng(SEED).lognormal(np.log(140.0), np.log(315 / 140) / 2.326, NUM_SAMPLES)
            total = total.clip(16, 433).astype(np.int64)
            prompt = (0.45 * total).astype(np.int64)
            return np.stack([prompt, total - prompt], 1)
        section = DataConfig(train="", tokenizer=str(self.tokenizer), eos_token="<|endoftext|>", max_length=512)
        tokenizer = load_tokenizer(section)
        lengths = []
        for _, (_, record) in zip(range(NUM_SAMPLES), read_records(str(self.data))):
            question, response = prompt_and_response(record, section)
            lengths.append((len(encode_prompt(question, tokenizer)), len(tokenizer.encode(response)) + 1))
        return np.array(lengths, dtype=np.int64)


def dataset(case: Case, source: LengthSource) -> SftDataset:
    """Samples of random tokens with the case's lengths: the time of a step does not depend on what they are."""
    generator = np.random.default_rng(SEED)
    if case.lengths == "gsm8k":
        lengths = source.gsm8k()
    elif case.lengths == "short":
        lengths = generator.integers((16, 12), (33, 33), size=(NUM_SAMPLES, 2))
    else:
        lengths = np.full((NUM_SAMPLES, 2), 64)
    samples = [
        Sample.of(generator.integers(NUM_SPECIAL, case.vocab_size, prompt + response, dtype=np.int32), int(prompt))
        for prompt, response in lengths
    ]
    return SftDataset(samples, 0, case.lengths)


def trainer(
    method: Method, data: SftDataset, engine: Engine | None, config: RunConfig, context: ParallelContext
) -> Trainer:
    """The stack's own trainer, as training/run.py builds it. Trainers of several methods may share an engine.

    A forward pass has as many rows with every method: two views of half the samples.
    """
    batch = config.batch
    loader = TrainLoader(
        data.with_samples([method.marked(sample) for sample in data.samples]),
        batch=batch.model_copy(update={"micro_size": max(1, batch.micro_size // method.rows_per_sample)}),
        views=method.rows_per_sample,
        data_rank=context.data_rank,
        data_size=context.layout.data,
        pad_id=PAD_ID,
        seed=config.seed,
    )
    diffusion = method.diffusion()
    density = _symmetric_density() if diffusion.t_sampler in CALIBRATED_SAMPLERS else np.empty(0)
    objective = objective_of(config.model_copy(update={"diffusion": diffusion}))
    noise = objective.noise(density, MASK_ID)
    layout = layout_ahead(config)
    source = SupervisedSource(context, PrefetchLoader(loader) if layout else loader, objective, noise, layout)
    # Without an engine it only makes batches, for the plain loop.
    return Trainer(config, context, source, cast(Engine, engine), config.schedule.steps)


def whole_model(trainer: Trainer) -> torch.nn.Module:
    """The model that a trainer of one process trains."""
    assert isinstance(trainer.engine, ZeroEngine)
    model: torch.nn.Module = trainer.engine.engine.module
    return model


def source_of(trainer: Trainer) -> SupervisedSource:
    """Where the benchmarks' trainers, which are all supervised, take their batches from."""
    assert isinstance(trainer.source, SupervisedSource)
    return trainer.source


def _symmetric_density() -> NDArray[np.float64]:
    """1 + 0.5 cos(2πt): not uniform, but of mean 1/2, so that as many rows reach the head as under uniform t."""
    return 1.0 + 0.5 * np.cos(2.0 * np.pi * CENTRES)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
