"""Attention under a padding mask: which of torch's back ends take it, how far they are off, their time and memory.

The layers leave the choice to torch. Where it falls back to the one that keeps all scores, memory tells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_mdm.models.attention import executor, fused
from tools.gpu_check.attention_inputs import Heads, exact, visibility, with_gradients
from tools.gpu_check.measure import ROUNDING, peak_memory, relative_error, timed
from tools.gpu_check.outcome import Outcome, Setting

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
SIZES = {"MHA": Heads(16, 16, 64), "GQA": Heads(16, 4, 64)}
SMALL = {"MHA": Heads(4, 4, 16), "GQA": Heads(4, 2, 16)}
LENGTHS = (1024, 700, 33, 1000)
SMALL_LENGTHS = (16, 5, 1)


def check(setting: Setting) -> Outcome:
    lengths = SMALL_LENGTHS if setting.quick else LENGTHS
    figures: dict[str, Any] = {}
    faults = []
    for name, heads in (SMALL if setting.quick else SIZES).items():
        case = Case(heads, lengths, setting.device)
        figures[name] = {"scores of all heads, MiB": case.scores_mib, "the layers' choice": case.run(case.of_layers)}
        for backend in BACKENDS:
            figures[name][backend] = case.by_backend(getattr(SDPBackend, backend))
        for way, result in figures[name].items():
            error = result["relative error"] if isinstance(result, dict) else 0.0
            if not error <= ROUNDING[torch.bfloat16]:
                faults.append(f"{name}, {way}: relative error {error:.1e}, more than rounding")
    return Outcome(figures, faults)


class Case:
    """Padded rows in bf16, and what attention has to give."""

    def __init__(self, heads: Heads, lengths: tuple[int, ...], device: str) -> None:
        self.device = device
        self.visible = visibility(lengths, causal=False, pack=False, device=device)
        self.inputs = heads.draw(max(lengths), len(lengths), dtype=torch.bfloat16, device=device)
        self.scores_mib = len(lengths) * heads.query * max(lengths) ** 2 * 2 / 2**20
        doubles = [x.detach().double().requires_grad_() for x in self.inputs]
        self.wanted = with_gradients(self._exact, doubles)

    def of_layers(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        execute = executor(self.visible.kind, self.device, query.dtype)
        return execute(query, key, value, self.visible, None)

    def by_backend(self, backend: SDPBackend) -> Any:
        """Figures; why not, where the back end does not take such a mask."""
        try:
            with sdpa_kernel([backend]):
                return self.run(self._fused)
        except RuntimeError as error:
            return f"does not take it ({str(error).splitlines()[0]})"

    def run(self, attend: Any) -> dict[str, float]:
        """Of one way: the greatest relative error of contexts and gradients, time and memory of both passes."""
        found = with_gradients(attend, self.inputs)
        return {
            "relative error": max(relative_error(*pair) for pair in zip(found, self.wanted)),
            "ms, forward and backward": 1e3 * timed(lambda: with_gradients(attend, self.inputs), self.device, 3),
            **peak_memory(lambda: with_gradients(attend, self.inputs), self.device),
        }

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._over_positions(lambda q, k, v: fused(q, k, v, self.visible.mask, None, False), query, key, value)

    def _exact(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._over_positions(lambda q, k, v: exact(q, k, v, self.visible.mask, False), query, key, value)

    @staticmethod
    def _over_positions(attend: Any, *inputs: Tensor) -> Tensor:
        context: Tensor = attend(*(x.permute(1, 2, 0, 3) for x in inputs))
        return context.permute(2, 0, 1, 3).flatten(2)
