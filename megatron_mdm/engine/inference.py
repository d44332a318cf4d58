"""Forward passes without an optimizer: calibration, evaluation and generation from a checkpoint."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mdm.engine.packets import prepared
from megatron_mdm.models.stages import MaskedDiffusionModel, Packet, RowStatistics
from megatron_mdm.parallel import platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InferenceEngine:
    """The forward half of engine.base.Engine, with the model whole on every data-parallel rank."""

    def __init__(self, model: MaskedDiffusionModel, dtype: str) -> None:
        self.model = model.to(device=platform.device(), dtype=DTYPES[dtype]).eval()

    @torch.no_grad()
    def evaluate(self, packets: Sequence[Packet], row_gradients: bool = False) -> list[RowStatistics]:
        with self.model[-1].with_row_gradients(row_gradients):
            return [self.model(_on_device(packet))[1] for packet in packets]

    @torch.no_grad()
    def logits(self, packet: Packet) -> Tensor:
        return self.model(_on_device(packet), want_logits=True)


def _on_device(packet: Packet) -> Packet:
    return prepared(packet, pack=False, multiple=1).to_device()
