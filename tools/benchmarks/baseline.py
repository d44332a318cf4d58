"""The plain loop that the benchmark `steps` compares with: Hugging Face's Llama, full logits, padding, a pass per view.

It follows LLaDA's published guideline for fine-tuning: logits of all positions, of which the masked ones are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.data.loader import TrainLoader
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.training.loop import Trainer
from tools.benchmarks.cases import MASK_ID, PAD_ID, Case, source_of


class PlainBatch(NamedTuple):
    """One view of a micro-batch."""

    tokens: Tensor  # [B, S] int64, clean
    noisy: Tensor  # [B, S] int64
    masked: Tensor  # [B, S] bool
    mask_probability: Tensor  # [B, 1] float32
    num_eligible: Tensor  # [B] int64
    visible: Tensor  # [B, 1, 1, S] bool, of every query: all but padding (the form torch's kernel is fastest with)


class StepOutput(NamedTuple):
    loss: float
    grad_norm: float


class PlainLoop:
    """Model and AdamW. In bf16: bf16 weights beside fp32 ones that AdamW updates (faster here than autocast)."""

    def __init__(self, case: Case, lr: float, epsilon: float) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.case = case
        self.epsilon = epsilon
        make_config: Any = LlamaConfig  # whose stubs lack what it passes on to its base class
        config = make_config(
            vocab_size=case.vocab_size,
            hidden_size=case.hidden_size,
            intermediate_size=case.ffn_hidden_size,
            num_hidden_layers=case.num_layers,
            num_attention_heads=case.num_heads,
            num_key_value_heads=case.num_heads,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            attn_implementation="sdpa",
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config).train()
        self.weights = list(self.model.parameters())
        self.optimizer_state = self.weights
        if case.dtype == "bf16":
            self.optimizer_state = [torch.nn.Parameter(weight.detach().clone()) for weight in self.weights]
            self.model.bfloat16()
        self.optimizer = torch.optim.AdamW(self.optimizer_state, lr=lr, weight_decay=0.1, fused=True)

    def step(self, trainer: Trainer, views: int, step: int) -> StepOutput:
        """One optimizer step on the samples and mask rates of the trainer's step; the masks are drawn here."""
        loader = source_of(trainer).loader
        assert isinstance(loader, TrainLoader)
        ids = loader.sample_ids(step)
        t = torch.from_numpy(source_of(trainer).noise.times(step)[0]).float()
        batches: list[PlainBatch] = []
        for start in range(0, len(ids), self.case.micro_size):
            samples = [loader.data.samples[row] for row in ids[start : start + self.case.micro_size]]
            tokens = [torch.from_numpy(sample.tokens).long() for sample in samples]
            prompts = torch.tensor([int(sample.eligible.argmax()) for sample in samples])
            batches += self._noise(tokens, prompts, t[start : start + len(samples)], views)
        return self.optimize(batches, views)

    def optimize(self, batches: Sequence[PlainBatch], views: int) -> StepOutput:
        """Forward and backward of each view, clipping, AdamW. The loss is the mean over samples and views."""
        total = 0.0
        num_samples = self.case.global_size
        for batch in batches:
            loss = self._loss_sum(batch) / (views * num_samples)
            loss.backward()
            total += loss.item()
        if self.optimizer_state is not self.weights:
            for master, weight in zip(self.optimizer_state, self.weights):
                master.grad = weight.grad.float()
                weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer_state, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._round_weights()
        return StepOutput(total, float(norm))

    @torch.no_grad()
    def _round_weights(self) -> None:
        """bf16 weights from the fp32 ones, where there are two."""
        if self.optimizer_state is not self.weights:
            torch._foreach_copy_(self.weights, self.optimizer_state)

    def _loss_sum(self, batch: PlainBatch) -> Tensor:
        """Σ over samples of (1/P) Σ_i 1[i masked] · CE_i / p_mask (method: Section 1)."""
        logits = self.model(batch.noisy, attention_mask=batch.visible).logits  # [B, S, V]
        token_loss = F.cross_entropy(logits[batch.masked].float(), batch.tokens[batch.masked], reduction="none")
        shape = batch.masked.shape
        token_loss = token_loss / batch.mask_probability.expand(shape)[batch.masked]
        return (token_loss / batch.num_eligible[:, None].expand(shape)[batch.masked]).sum()

    def _noise(self, samples: list[Tensor], prompts: Tensor, t: Tensor, views: int) -> list[PlainBatch]:
        tokens = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=PAD_ID)
        lengths = torch.tensor([len(sample) for sample in samples])
        place = torch.arange(tokens.shape[1])
        eligible = (place >= prompts[:, None]) & (place < lengths[:, None])
        probability = ((1.0 - self.epsilon) * t + self.epsilon)[:, None]
        uniform = torch.rand(tokens.shape)
        views_masked = (uniform < probability, uniform > 1.0 - probability)[:views]
        return [
            _plain_batch(tokens, masked & eligible, probability, eligible.sum(1), lengths) for masked in views_masked
        ]

    def load(self, ours_whole: torch.nn.Module) -> None:
        """Take over the weights of a models.layers.MaskedDiffusionModel."""
        case = self.case
        last = self.case.num_layers + 1
        weights = ours_whole.state_dict()
        state = {
            "model.embed_tokens.weight": weights["0.word_embeddings.weight"][: case.vocab_size],
            "model.norm.weight": weights[f"{last}.final_norm.weight"],
            "lm_head.weight": weights[f"{last}.vocabulary_weight"][: case.vocab_size],
        }
        for index in range(case.num_layers):
            ours = f"{index + 1}.layer"
            theirs = f"model.layers.{index}"
            qkv = weights[f"{ours}.self_attention.linear_qkv.weight"].view(case.num_heads, 3, -1, case.hidden_size)
            for place, name in enumerate("qkv"):  # megatron-core: [q, k, v] per head
                state[f"{theirs}.self_attn.{name}_proj.weight"] = qkv[:, place].flatten(0, 1)
            gate, up = weights[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
            state[f"{theirs}.mlp.gate_proj.weight"] = gate
            state[f"{theirs}.mlp.up_proj.weight"] = up
            state[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.mlp.linear_fc2.weight"]
            state[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.self_attention.linear_proj.weight"]
            state[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.input_layernorm.weight"]
            state[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.pre_mlp_layernorm.weight"]
        names = [name for name, _ in self.model.named_parameters()]
        with torch.no_grad():
            torch._foreach_copy_(self.optimizer_state, [state[name] for name in names])
        self._round_weights()


def as_plain(noised: NoisedBatch, trainer: Trainer) -> list[PlainBatch]:
    """A micro-batch with its masks as our noiser drew them, view by view."""
    clean = noised.clean
    probability = torch.from_numpy(source_of(trainer).noise.mask_probability(noised.t.numpy())).float()[:, None]
    return [
        _plain_batch(clean.tokens, masked, probability, clean.num_eligible, clean.lengths)
        for masked in noised.masked.chunk(noised.views)
    ]


def _plain_batch(
    tokens: Tensor, masked: Tensor, probability: Tensor, num_eligible: Tensor, lengths: Tensor
) -> PlainBatch:
    visible = (torch.arange(tokens.shape[1]) < lengths[:, None])[:, None, None, :]
    return PlainBatch(tokens, tokens.masked_fill(masked, MASK_ID), masked, probability, num_eligible, visible)
