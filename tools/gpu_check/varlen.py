"""Attention over packed rows, by the kernel that the layers use on this device, against a loop over the segments in
fp64: contexts and gradients, as many heads of keys as of queries and fewer, both ways and causal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mdm.models.attention import executor
from tools.gpu_check.attention_inputs import Heads, exact, visibility, with_gradients
from tools.gpu_check.measure import ROUNDING, relative_error, timed
from tools.gpu_check.outcome import Outcome, Setting

PARTS = ("contexts", "gradients of queries", "gradients of keys", "gradients of values")
SIZES = {"MHA": Heads(16, 16, 64), "GQA": Heads(16, 4, 128)}
SMALL = {"MHA": Heads(4, 4, 16), "GQA": Heads(4, 2, 16)}
LENGTHS = (1, 700, 33, 129, 512, 64, 1023, 8, 255, 300)
SMALL_LENGTHS = (1, 9, 5, 16)


def check(setting: Setting) -> Outcome:
    lengths = SMALL_LENGTHS if setting.quick else LENGTHS
    types = (torch.bfloat16, torch.float16) if setting.device == "cuda" else (torch.bfloat16, torch.float32)
    figures: dict[str, object] = {}
    faults = []
    for dtype in types:
        for name, heads in (SMALL if setting.quick else SIZES).items():
            for causal in (False, True):
                case = f"{name}{', causal' * causal}, {str(dtype).removeprefix('torch.')}"
                errors, seconds = compare(heads, lengths, causal, dtype, setting.device)
                figures[case] = {**dict(zip(PARTS, errors)), "ms, forward and backward": 1e3 * seconds}
                faults += [
                    f"{case}: relative error {error:.1e} of the {part}, more than rounding ({ROUNDING[dtype]:.1e})"
                    for part, error in zip(PARTS, errors)
                    if not error <= ROUNDING[dtype]
                ]
    return Outcome({"relative error": figures}, faults)


def compare(
    heads: Heads, lengths: Sequence[int], causal: bool, dtype: torch.dtype, device: str
) -> tuple[list[float], float]:
    """(relative errors by PARTS, seconds of a forward and a backward pass)."""
    inputs = heads.draw(sum(lengths), 1, dtype=dtype, device=device)
    visible = visibility(lengths, causal, pack=True, device=device)
    execute = executor(visible.kind, device, dtype)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return execute(query, key, value, visible, None)

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(x.permute(1, 2, 0, 3).split(list(lengths), dim=2) for x in (query, key, value)))
        context = torch.cat([exact(q, k, v, None, causal) for q, k, v in parts], dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)

    found = with_gradients(packed, inputs)
    wanted = with_gradients(one_by_one, [x.detach().double().requires_grad_() for x in inputs])
    seconds = timed(lambda: with_gradients(packed, inputs), device, repeats=3)
    return [relative_error(*pair) for pair in zip(found, wanted)], seconds
