"""The configurations of configs/pretrain on one rank, on drawn tokens and weights: what is timed and traced."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.build import build_engine
from megatron_mdm.parallel.groups import ParallelContext, initialize
from megatron_mdm.training.loop import Trainer
from tools.benchmarks.cases import MASK_ID, NUM_SPECIAL, PAD_ID, Method, trainer
from tools.gpu_check.outcome import Setting
from tools.gpu_check.small_runs import CONFIGS

NUM_SAMPLES = 64
MICRO_BATCHES = 2  # of a step with one view
_QUICK = (
    "model={num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 4, ffn_hidden_size: 64, vocab_size: 256,"
    " max_sequence_length: 32}",
    "batch={global_size: 8, micro_size: 4, mode: packed, micro_tokens: 128}",
    "precision.dtype=fp32",
    "deepspeed={zero_optimization: {reduce_bucket_size: 1000000}}",
)


class Pretraining:
    """One rank's engine, and a trainer by method on it."""

    def __init__(self, name: str, setting: Setting, compile_blocks: bool = False) -> None:
        config = configuration(name, setting)
        model = config.model.model_copy(update={"compile": compile_blocks})
        self.config = config.model_copy(update={"model": model})
        self.context: ParallelContext = initialize(self.config.parallel)
        torch.manual_seed(0)  # of draw_weights: the same for every engine
        self.engine: Engine = build_engine(self.config, self.context, draw_weights)
        self.data = samples(self.config)

    def trainer(self, method: Method) -> Trainer:
        return trainer(method, self.data, self.engine, self.config, self.context)


def configuration(name: str, setting: Setting) -> RunConfig:
    """A file of configs/pretrain with one view, the same tokens in a micro-batch, and few micro-batches a step."""
    length = 32 if setting.quick else 4096
    overrides = [
        f"data={{train: drawn, mask_token: {MASK_ID}, pad_token: {PAD_ID}, max_length: {length}}}",
        "diffusion={views: 1}",
        "evaluation.every=0",
        "logging={profile_every: 0, tensorboard: false}",
        f"checkpoint.directory={setting.folder / 'run'}",
        *(_QUICK if setting.quick else ()),
    ]
    config = load_config(CONFIGS / "pretrain" / f"{name}.yaml", overrides)
    batch = config.batch
    tokens = batch.micro_tokens or batch.micro_size * 2 * length  # the file's micro-batches hold both views
    size = tokens // length
    small = {"micro_tokens": tokens, "mode": "packed", "micro_size": size, "global_size": MICRO_BATCHES * size}
    return config.model_copy(update={"batch": batch.model_copy(update=small)})


def samples(config: RunConfig) -> SftDataset:
    """Drawn tokens, all of them targets, all samples of full length."""
    generator = np.random.default_rng(0)
    shape = NUM_SAMPLES, config.data.max_length
    tokens = generator.integers(NUM_SPECIAL, int(config.model.vocab_size), shape, dtype=np.int32)
    return SftDataset([Sample.of(row, 0) for row in tokens], 0, "drawn")


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """By torch's generator: the code's own draws, which do not depend on the layout, take the host a minute."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
