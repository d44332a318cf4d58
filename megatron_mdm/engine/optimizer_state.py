"""Master weights and Adam moments by the names of the table of parameters, whatever DeepSpeed has made of them.

Read and written where they lie: the part of this tensor-parallel rank's shard that this data-parallel rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils import lazy_init_hp_params_optimizer_state
from torch import Tensor

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.naming import rows_of
from megatron_mdm.models.rows import Parameter

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


def kinds_of(row: Parameter) -> tuple[str, ...]:
    """What a checkpoint holds of a parameter: of what is frozen its weight alone, of adapters' base nothing."""
    if row.is_base:
        return ()
    return KINDS if row.trained else (WEIGHT,)


class Fragment(NamedTuple):
    """Adjacent elements of a tensor-parallel rank's shard of a weight or moment."""

    name: str
    kind: str
    shape: torch.Size  # of the shard
    start: int  # of the fragment in the shard, counted in elements
    values: Tensor  # [n] the optimizer's own memory, fp32; of what is frozen the model's, in its type
    is_replicated: bool  # every data-parallel rank holds the same


class OptimizerState:
    """The state of one DeepSpeed engine's parameters."""

    def __init__(self, module: torch.nn.Module, optimizer: object, model: ModelConfig) -> None:
        """optimizer: engine.optimizer, DeepSpeed's wrapper or torch's own."""
        self.optimizer = optimizer
        rows = list(rows_of(module, model))
        self.rows = {row.name: row for row, _ in rows}
        self.parameters = {row.name: tensor for row, tensor in rows}

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of every parameter here, less tied copies, whose like another stage holds. Nothing is
        copied, nothing communicated."""
        for fragment in self._all_fragments():
            if not getattr(self.parameters[fragment.name], "ds_pipe_replicated", False):
                yield fragment

    @torch.no_grad()
    def load(self, read: Callable[[Fragment], Tensor]) -> None:
        """Set what this rank holds of every weight and moment. read: the values of a fragment, [n]. Collective: the
        weights that the model computes with follow, gathered from all data-parallel ranks."""
        for fragment in self._all_fragments():
            fragment.values.copy_(read(fragment))
        if hasattr(self.optimizer, "update_lp_params"):  # ZeRO 1 and 2
            self.optimizer.update_lp_params()
        partitioned: list[Any] = [tensor for tensor in self.parameters.values() if hasattr(tensor, "ds_id")]
        for parameter in partitioned:
            _, here = self._here(parameter, WEIGHT)
            parameter.ds_tensor.data[: len(here)].copy_(here)
        if partitioned:  # what has stayed gathered is gathered again where it is needed
            self.optimizer.empty_partition_cache()  # type: ignore[attr-defined]

    def set_steps(self, steps: int) -> None:
        """Adam's own count of steps, for its bias correction."""
        for state in self._torch_optimizer().state.values():
            state["step"] = torch.tensor(float(steps), device=state["exp_avg"].device)

    @contextmanager
    def moments_kept(self) -> Iterator[None]:
        """Adam's moments and its count of steps are afterwards what they were before. Holds a copy of them."""
        self._link_states()
        trained = [parameter for name, parameter in self.parameters.items() if self.rows[name].trained]
        moments = [self._here(parameter, kind)[1] for parameter in trained for kind in MOMENTS]
        steps = [state["step"] for state in self._torch_optimizer().state.values()]
        kept = [values.clone() for values in (*moments, *steps)]
        try:
            yield
        finally:
            with torch.no_grad():
                for values, before in zip((*moments, *steps), kept):
                    values.copy_(before)

    def _all_fragments(self) -> Iterator[Fragment]:
        self._link_states()
        for name, parameter in self.parameters.items():
            for kind in kinds_of(self.rows[name]):
                start, values = self._here(parameter, kind)
                if len(values):
                    replicated = not self._is_partitioned(parameter)
                    yield Fragment(name, kind, _shape(parameter), start, values.detach(), replicated)

    def _here(self, parameter: Any, kind: str) -> tuple[int, Tensor]:
        """(start, elements) of the shard that this data-parallel rank holds; none where it holds no part of it."""
        if hasattr(parameter, "ds_id"):
            partition = self._partition(parameter, kind)
            start = partition.numel() * dist.get_rank(parameter.ds_process_group)
            return start, partition[: max(0, parameter.ds_numel - start)]  # the last ones are padded
        if not hasattr(parameter, "_hp_mapping"):
            return 0, self._plain(parameter, kind).view(-1)
        if parameter._hp_mapping is None:
            return 0, torch.empty(0)
        fragment = parameter._hp_mapping.get_hp_fragment(None if kind == WEIGHT else kind)
        return parameter._hp_mapping.lp_fragment_address.start, fragment

    def _partition(self, parameter: Any, kind: str) -> Tensor:
        """ZeRO 3's part of a parameter, padded to equal parts, where it lies: DeepSpeed's public accessors copy it to
        the device. What is frozen has no fp32 copy."""
        if not parameter.requires_grad:
            return parameter.ds_tensor.data
        values, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=None if kind == WEIGHT else kind
        )
        return values

    @staticmethod
    def _is_partitioned(parameter: Any) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _plain(self, parameter: Any, kind: str) -> Tensor:
        return parameter.data if kind == WEIGHT else self._state_of(parameter)[kind]

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


def _shape(parameter: Any) -> torch.Size:
    """A parameter's shape, also where ZeRO 3 has left no element of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)
