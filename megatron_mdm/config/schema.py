"""The sections of a run's configuration. Frozen; unknown keys are refused; every value is required or has a default."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_mdm.config.sections.diffusion import (
    CalibrationConfig,
    ClippingConfig,
    DiffusionConfig,
    EmaConfig,
    IsadConfig,
    SyrmConfig,
)
from megatron_mdm.config.sections.image import ImageConfig, ImageVocabulary
from megatron_mdm.config.sections.lora import LoraConfig
from megatron_mdm.config.sections.objective import ObjectiveConfig
from megatron_mdm.config.sections.rl import RewardConfig, RlConfig
from megatron_mdm.config.sections.section import Section

__all__ = [
    "CalibrationConfig",
    "ClippingConfig",
    "DiffusionConfig",
    "EmaConfig",
    "ImageConfig",
    "ImageVocabulary",
    "IsadConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "RewardConfig",
    "RlConfig",
    "Section",
    "SyrmConfig",
]


class ModelConfig(Section):
    """A Llama-style transformer, bidirectional or causal: RMSNorm, rotary positions, SwiGLU, optional q/k/v biases."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    head_dim: int = Field(default=0, ge=0)  # of queries, keys and values; 0: hidden_size / num_heads
    qkv_bias: bool = False  # Qwen2, Dream
    qk_norm: bool = False  # RMSNorm of each head's query and key before rotation: Qwen3
    # The state at position i − 1 predicts the token at i (at position 0, its own), as in Dream.
    logit_shift: bool = False
    max_sequence_length: int = Field(gt=0)
    vocab_size: int | Literal["tokenizer"] = "tokenizer"  # "tokenizer": as many rows as the tokenizer has ids
    vocab_divisor: int = Field(default=128, gt=0)  # rows per tensor-parallel rank are padded to a multiple of this
    rope_theta: float = Field(default=10000.0, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    # full: initial weights are the same on every layout; sharded: each tensor-parallel rank draws its part only
    initialization: Literal["full", "sharded"] = "full"
    tie_embeddings: bool = False
    attention: Literal["bidirectional", "causal"] = "bidirectional"  # causal: what objective.name autoregressive sets
    # Kernels of the layers; auto: torch's. Transformer Engine's need CUDA and have not been run with this code.
    kernels: Literal["auto", "torch", "transformer_engine"] = "auto"
    # What computes losses and their gradients from logits; auto: torch's kernels. Triton's own, with less than half of
    # the memory traffic, needs CUDA; the head alone took 0.79 of the time with it on an H100.
    loss_kernel: Literal["auto", "torch", "triton"] = "auto"
    # The layers' matrix products in FP8, by a recipe of Transformer Engine: tensorwise scales by the magnitudes of the
    # tensors themselves, delayed by those of passes before. It has never run on a GPU (models/README.md).
    fp8: bool | Literal["tensorwise", "delayed"] = False
    # Training passes: every block is compiled (torch.compile, a minute at the start), and micro-batches are padded to
    # batch.micro_tokens, so that all have one shape. Needs batch.mode packed.
    compile: bool = False
    z_loss: float = Field(default=0.0, ge=0)  # weight of (log Σ exp logits)² beside each cross-entropy
    # What code outside the package adds to the model, by the name it is registered under, each with keys of its own
    # (models/extensions.py).
    extensions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    # Initial weights: a Hugging Face checkpoint's folder, or a run's; empty: random ones.
    init_from: str = ""
    lora: LoraConfig = LoraConfig()  # fine-tuning with low-rank adapters: the weights of init_from stay as they are
    # Of that checkpoint's config.json: fields to read as if they were absent, though they may change what it computes.
    ignore_fields: tuple[str, ...] = ()

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @field_validator("fp8")
    @classmethod
    def _recipe(cls, value: bool | str) -> bool | str:
        if value is True:
            raise ValueError("must be false, 'tensorwise' or 'delayed'")
        return value

    @field_validator("vocab_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError("must be positive, or 'tokenizer'")
        return value


Column = Literal[
    "prompt", "response", "system", "messages", "role", "content", "input_ids", "prompt_length", "spans", "labels"
]


class DataConfig(Section):
    """Samples with a prompt and a response, a corpus, or prompts. See megatron_mdm/data/README.md."""

    # sft: JSON lines, parquet, or the name of a `datasets` set. corpus: prefixes of Megatron's .bin/.idx files.
    # prompts: sft's files, for reinforcement learning: the model answers them itself, rewards read their columns.
    format: Literal["sft", "corpus", "prompts"] = "sft"
    train: str | dict[str, float]  # several files or prefixes with weights make a blend
    validation: str = ""  # empty: cut validation_fraction off the training data
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    tokenizer: str = ""  # sentencepiece .model or Hugging Face tokenizer.json; empty: the data are token ids
    mask_token: int | str = "<mask>"  # a token's text, or its id; a text the tokenizer lacks gets a new id
    pad_token: int | str = "<pad>"
    eos_token: int | str = "</s>"
    max_length: int = Field(gt=1)
    too_long: Literal["drop", "truncate", "error"] = "drop"
    on_error: Literal["stop", "skip"] = "stop"  # a bad sample, document or shard; what is skipped is counted
    # Where a response ends, besides eos_token and the template's end of turn: texts of tokens, or ids.
    end_tokens: tuple[int | str, ...] = ()
    # sft
    # Columns of other names than the known ones (data/columns.py), such as {prompt: query, response: reply}, and the
    # data's names of roles, such as {agent: assistant}.
    columns: dict[Column, str] = Field(default_factory=dict)
    roles: dict[str, str] = Field(default_factory=dict)
    # llada, mmada: as LLaDA-8B-Instruct and MMaDA-8B write conversations; tokenizer: its own chat template
    template: Literal["plain", "llada", "mmada", "tokenizer"] = "plain"
    # The day that a chat template may name (strftime_now), YYYY-MM-DD; today: the one on which the run began
    template_date: str = "today"
    eligible_turns: Literal["all", "last"] = "all"  # of a conversation: which assistant turns are targets
    eos_padding: bool = False  # LLaDA: target eos tokens up to the longest sample of the global batch
    # corpus
    across_documents: bool = True  # a sequence's documents see each other
    random_length: float = Field(default=0.0, ge=0.0, le=1.0)  # share that is cut to U{1 … max_length}; LLaDA: 0.01

    @field_validator("template_date")
    @classmethod
    def _day(cls, value: str) -> str:
        try:
            return value if value == "today" else datetime.date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("must be a day as YYYY-MM-DD, or 'today'") from None

    @field_validator("train")
    @classmethod
    def _weights(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict) and (not value or min(value.values()) <= 0):
            raise ValueError("a blend needs positive weights")
        return value


class ParallelConfig(Section):
    tensor: int = Field(default=1, gt=0)
    sequence: bool = False  # split activations along the sequence over the tensor-parallel ranks, between matrices
    pipeline: int = Field(default=1, gt=0)
    zero: Literal[0, 1, 2, 3] = 1  # in bf16 and fp16, 0 runs as 1
    offload: Literal["none", "optimizer", "all"] = "none"  # ZeRO's states in host memory; all: parameters too
    recompute: Literal["none", "selective", "full"] = "none"  # activations: selective recomputes attention only
    recompute_interval: int = Field(default=1, gt=0)  # full: every n-th layer


class BatchConfig(Section):
    global_size: int = Field(gt=0)  # samples per optimizer step, over all ranks and accumulation steps
    micro_size: int = Field(gt=0)  # samples per forward pass and data-parallel rank (MIRROR: 2 rows a sample)
    # padded: in the loader's order, padded to the longest of micro_size. bucketed: like lengths share a micro-batch.
    # packed: no padding, block-diagonal attention; micro_size samples on average.
    mode: Literal["padded", "bucketed", "packed"] = "bucketed"
    # Tokens per forward pass, padding and both views included, in place of micro_size (which validation and
    # calibration keep); 0: micro_size holds. Steps may then have different numbers of micro-batches.
    micro_tokens: int = Field(default=0, ge=0)


class OptimizerConfig(Section):
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)  # matrices only; norms are not decayed
    gradient_clipping: float = Field(default=1.0, ge=0)  # global norm; 0 switches it off


class ScheduleConfig(Section):
    """Length of training and learning rate. Exactly one of steps and epochs is set."""

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    steps: int = Field(default=0, ge=0)
    epochs: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)  # final lr / peak lr
    decay_fraction: float = Field(default=0.2, gt=0, le=1)  # wsd: share of the steps that decay

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError("set exactly one of steps and epochs")
        return self


class PrecisionConfig(Section):
    # auto: bf16 where the hardware multiplies it natively, else fp32. Master weights and moments are always fp32.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradients: Literal["model", "fp32"] = "model"  # the type in which micro-batches' gradients are summed


class CheckpointConfig(Section):
    directory: str  # the run's folder; everything it writes is below it
    save_every: int = Field(default=500, ge=0)  # steps; 0: only at the end
    asynchronous: bool = True  # training waits for a copy in memory only, which a thread then writes
    keep_last: int = Field(default=2, gt=0)  # the newest, which are always kept; besides them:
    keep_every: int = Field(default=0, ge=0)  # those of every so many steps; 0: none
    # The one with the least validation loss: saved at every validation that is the best so far, kept, and what
    # evaluation, generation and export take. auto: where evaluation.patience stops early.
    keep_best: bool | Literal["auto"] = "auto"


class FaultsConfig(Section):
    """About hangs, and losses and gradients that are infinite, not numbers, or far off the others."""

    max_skipped_in_a_row: int = Field(default=5, gt=0)  # skipped steps after which the run stops
    spike_score: float = Field(default=8.0, ge=0)  # robust z-score from which a loss is logged as a spike; 0: never
    spike_window: int = Field(default=100, ge=20)  # steps whose losses it is judged by
    # rewind: go back to the newest checkpoint, and train from there with the batches that follow the spike's
    on_spike: Literal["log", "rewind"] = "log"
    max_rewinds: int = Field(default=3, ge=0)  # in a run; further spikes are logged
    # Without progress on any rank for so long, the job ends and names the rank and the place; 0: never.
    hang_minutes: float = Field(default=10.0, ge=0)


class LoggingConfig(Section):
    every: int = Field(default=10, gt=0)  # steps between lines of metrics.jsonl and tensorboard points
    # steps between those in which communication and every rank's times are measured, too; 0: never
    profile_every: int = Field(default=100, ge=0)
    straggler_ratio: float = Field(default=1.25, gt=1)  # of a rank's busy time to its peers', from which it is named
    tensorboard: bool = True


class EvaluationConfig(Section):
    """Validation loss on a fixed stratified grid of t with fixed masks, the same for every method."""

    every: int = Field(default=0, ge=0)  # steps; 0: no validation
    num_samples: int = Field(default=256, gt=0)  # the first N of the validation set
    num_times: int = Field(default=4, gt=0)  # values of t per sample
    patience: int = Field(default=0, ge=0)  # validations without a new best before stopping; 0: never


class RunConfig(Section):
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    image: ImageConfig = ImageConfig()
    rl: RlConfig = RlConfig()
    seed: int = Field(default=42, ge=0)
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # further keys of its own; those the stack owns are refused

    @property
    def rows_per_sample(self) -> int:
        """Rows of the model that a sample, or a completion of reinforcement learning, takes in a step."""
        return self.diffusion.rows_per_sample + self.rl.full_pass
