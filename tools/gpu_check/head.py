"""The vocabulary's cross-entropy by the rows of a chunk, and by both kernels of losses: time and memory of both passes,
and how far its gradients are off those in fp64."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from megatron_mdm.models.cross_entropy import Chunks, weighted_cross_entropy
from tools.gpu_check.measure import ROUNDING, peak_memory, relative_error, timed
from tools.gpu_check.outcome import Outcome, Setting

LARGEST_ERROR = 0.003  # of the head's gradient, at the size and the chunk that training uses
SIZE = (8192, 2048, 126_464)  # rows, width, vocabulary
SMALL = (64, 16, 97)
CHUNKS = (128, 512, 1024, 2048, 4096, 8192)  # rows
SMALL_CHUNKS = (16, 64)
INIT_STD = 0.02  # of a head's initial weights: model.init_std
EXACT_ROWS = 256  # at a time in fp64
OF_TRAINING = "the chunk that training uses"
WITH_TRITON = f"{OF_TRAINING}, Triton's kernel (model.loss_kernel)"
OF_HEAD = "error of the head's gradient"
OF_ROWS = "error of the rows' gradient"


def check(setting: Setting) -> Outcome:
    num_rows, width, vocabulary = SMALL if setting.quick else SIZE
    inputs = Inputs(num_rows, width, vocabulary, setting.device)
    exact = inputs.exact()
    figures: dict[str, Any] = {OF_TRAINING: inputs.measure(exact, setting.device)}
    for chunk in SMALL_CHUNKS if setting.quick else CHUNKS:
        figures[f"{chunk} rows"] = inputs.measure(exact, setting.device, chunks=Chunks(chunk * vocabulary))
    rounding = ROUNDING[torch.bfloat16]
    largest = {OF_HEAD: rounding if setting.quick else LARGEST_ERROR, OF_ROWS: rounding}
    faults = []
    if setting.device == "cuda" and importlib.util.find_spec("triton"):
        try:
            figures[WITH_TRITON] = inputs.measure(exact, setting.device, kernel="triton")
        except Exception as error:  # its compiler's among them: the other figures are worth having
            faults.append(f"{WITH_TRITON}: {type(error).__name__}: {error}")
    else:
        figures[WITH_TRITON] = "needs CUDA and Triton"
    for row in (OF_TRAINING, WITH_TRITON):
        errors = figures.get(row)
        if isinstance(errors, dict):
            faults += [
                f"{row}: {name} {errors[name]:.2%}, more than {allowed:.2%}"
                for name, allowed in largest.items()
                if not errors[name] <= allowed
            ]
    return Outcome(figures, faults)


class Inputs:
    """Rows and a head in bf16, with labels and weights."""

    def __init__(self, num_rows: int, width: int, vocabulary: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        self.rows = normal(num_rows, width).bfloat16().requires_grad_()
        self.head = (INIT_STD * normal(vocabulary, width)).bfloat16().requires_grad_()
        self.labels = torch.randint(0, vocabulary, (num_rows,), device=device, generator=generator)
        self.weights = torch.rand(num_rows, device=device, generator=generator) / num_rows

    def gradients(self, **settings: Any) -> tuple[Tensor, ...]:
        """Of the head and of the rows."""
        losses = weighted_cross_entropy(self.rows, self.head, self.labels, self.weights, len(self.head), **settings)
        return torch.autograd.grad(losses.total, (self.head, self.rows))

    def measure(self, exact: tuple[Tensor, Tensor], device: str, **settings: Any) -> dict[str, float]:
        head, rows = self.gradients(**settings)
        errors = relative_error(head, exact[0]), relative_error(rows, exact[1])
        del head, rows
        return {
            "ms, forward and backward": 1e3 * timed(lambda: self.gradients(**settings), device, 3),
            **peak_memory(lambda: self.gradients(**settings), device),
            OF_HEAD: errors[0],
            OF_ROWS: errors[1],
        }

    def exact(self) -> tuple[Tensor, Tensor]:
        """The gradients of head and rows in fp64: (softmax − label) · weight, some rows at a time."""
        head = self.head.detach().double()
        of_head = torch.zeros_like(head)
        of_rows = torch.zeros(self.rows.shape, dtype=torch.float64, device=head.device)
        for start in range(0, len(self.rows), EXACT_ROWS):
            part = slice(start, start + EXACT_ROWS)
            rows = self.rows[part].detach().double()
            of_logits = torch.softmax(rows @ head.t(), dim=1)
            of_logits[torch.arange(len(rows)), self.labels[part]] -= 1.0
            of_logits *= self.weights[part, None]
            of_head.addmm_(of_logits.t(), rows)
            of_rows[part] = of_logits @ head
        return of_head, of_rows
