"""Master weights and Adam moments by parameter name, whatever DeepSpeed has made of them.

Read and written as this tensor-parallel rank's shard, whole over the data-parallel ranks, so that a checkpoint does not
depend on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.spec import NORM_NAMES

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


def canonical_name(name: str, model: ModelConfig) -> str:
    """The name under which a checkpoint holds a parameter, whatever the layout and the kernels.

    Tied embeddings are held once, also where two stages have a copy.
    """
    for theirs, ours in NORM_NAMES.items():
        name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
    return "0.word_embeddings.weight" if model.tie_embeddings and name.endswith(".vocabulary_weight") else name


class MasterState:
    """The state of one DeepSpeed engine's parameters."""

    def __init__(self, module: torch.nn.Module, optimizer: object, model: ModelConfig) -> None:
        """optimizer: engine.optimizer, DeepSpeed's wrapper or torch's own."""
        self.model, self.optimizer = model, optimizer
        self.parameters = dict(module.named_parameters())
        # FP16_UnfusedOptimizer (ZeRO 0 in bf16 and fp16) keeps fp32 copies in lists of the same order.
        self.copies: dict[Tensor, Tensor] = {}
        for low, high in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])):
            self.copies.update(zip(low, high))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(canonical name, kind, fp32 tensor) of every parameter here. Collective over the data-parallel ranks."""
        self._link_states()
        for name, parameter in self.parameters.items():
            if getattr(parameter, "ds_pipe_replicated", False):
                continue  # a tied copy; another stage holds the same
            for kind in KINDS:
                yield canonical_name(name, self.model), kind, self._get(parameter, kind)

    def load(self, name: str, kind: str, value: Tensor) -> None:
        """Set a parameter's state by its own (not canonical) name. Collective over the data-parallel ranks."""
        self._link_states()
        parameter = self.parameters[name]
        if not self._is_partitioned(parameter):
            self._plain(parameter, kind).copy_(value)
        elif kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def set_steps(self, steps: int) -> None:
        """Adam's own count of steps, for its bias correction."""
        for state in self._torch_optimizer().state.values():
            state["step"] = torch.tensor(float(steps), device=state["exp_avg"].device)

    def _get(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        if not self._is_partitioned(parameter):
            return self._plain(parameter, kind)
        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    @staticmethod
    def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _plain(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        master = self.copies.get(parameter, parameter)
        if kind == WEIGHT:
            return master.data
        return self._state_of(master)[kind]

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        """The optimizer's entry, made before its first step where need be."""
        state = self._torch_optimizer().state[master]
        if MOMENTS[0] not in state:
            state.update({moment: torch.zeros_like(master.data) for moment in MOMENTS})
            state["step"] = torch.zeros((), device=master.device)
        return state

    def _link_states(self) -> None:
        """Make the states of ZeRO's flat partitions and let each parameter find its part.

        DeepSpeed links them once, after the first group's first step, when other groups have no state yet.
        """
        optimizer = self.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
            for flat in getattr(optimizer, name, []):
                self._state_of(flat)
        for groups, flats in (
            ("bit16_groups", "single_partition_of_fp32_groups"),  # ZeRO 1 and 2
            ("bf16_groups", "fp32_groups_flat_partition"),  # BF16_Optimizer
        ):
            for group, flat in zip(getattr(optimizer, groups, []), getattr(optimizer, flats, [])):
                lazy_init_hp_params_optimizer_state(group, flat, self._torch_optimizer().state)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        return optimizer
