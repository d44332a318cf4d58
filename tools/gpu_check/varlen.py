"""Attention over packed rows, by the kernels that the layers use on this device, against a loop over the segments in
fp64: contexts and gradients, as many heads of keys as of queries and fewer, both ways and causal, segments of several
lengths and of one. What segments of one length gain by cuDNN is in the times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from megatron_mdm.models.attention import Executor, executor
from tools.gpu_check.attention_inputs import Attend, Heads, exact, visibility, with_gradients
from tools.gpu_check.measure import ROUNDING, relative_error, timed
from tools.gpu_check.outcome import Outcome, Setting

PARTS = ("contexts", "gradients of queries", "gradients of keys", "gradients of values")
SIZES = {"MHA": Heads(16, 16, 64), "GQA": Heads(16, 4, 128)}
SMALL = {"MHA": Heads(4, 4, 16), "GQA": Heads(4, 2, 16)}
LENGTHS = {"": (1, 700, 33, 129, 512, 64, 1023, 8, 255, 300), "of one length, ": (2048,) * 4}
SMALL_LENGTHS = {"": (1, 9, 5, 16), "of one length, ": (7,) * 3}
TIME = "ms, forward and backward"


def check(setting: Setting) -> Outcome:
    lengths = SMALL_LENGTHS if setting.quick else LENGTHS
    types = (torch.bfloat16, torch.float16) if setting.device == "cuda" else (torch.bfloat16, torch.float32)
    figures: dict[str, object] = {}
    faults = []
    heads_of = SMALL if setting.quick else SIZES
    for dtype, name, kind, causal in product(types, heads_of, lengths, (False, True)):
        case = f"{kind}{name}{', causal' * causal}, {str(dtype).removeprefix('torch.')}"
        errors, seconds = compare(heads_of[name], lengths[kind], causal, dtype, setting.device)
        figures[case] = {**dict(zip(PARTS, errors)), **{by: 1e3 * value for by, value in seconds.items()}}
        faults += [
            f"{case}: relative error {error:.1e} of the {part}, more than rounding ({ROUNDING[dtype]:.1e})"
            for part, error in zip(PARTS, errors)
            if not error <= ROUNDING[dtype]
        ]
    return Outcome({"relative error": figures}, faults)


def compare(
    heads: Heads, lengths: Sequence[int], causal: bool, dtype: torch.dtype, device: str
) -> tuple[list[float], dict[str, float]]:
    """(relative errors by PARTS, seconds of a forward and a backward pass by the layers' kernel and, where they would
    use another one for several lengths, by that)."""
    inputs = heads.draw(sum(lengths), 1, dtype=dtype, device=device)
    visible = visibility(lengths, causal, pack=True, device=device)
    chosen = executor(visible.kind, device, dtype)
    of_any_lengths = executor("segments", device, dtype)

    def by(execute: Executor) -> Attend:
        return lambda query, key, value: execute(query, key, value, visible, None)

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(x.permute(1, 2, 0, 3).split(list(lengths), dim=2) for x in (query, key, value)))
        context = torch.cat([exact(q, k, v, None, causal) for q, k, v in parts], dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)

    found = with_gradients(by(chosen), inputs)
    wanted = with_gradients(one_by_one, [x.detach().double().requires_grad_() for x in inputs])
    seconds = {TIME: timed(lambda: with_gradients(by(chosen), inputs), device, repeats=3)}
    if of_any_lengths is not chosen:
        with_gradients(by(of_any_lengths), inputs)
        other = timed(lambda: with_gradients(by(of_any_lengths), inputs), device, repeats=3)
        seconds[f"{TIME}, by the kernel for any lengths"] = other
    return [relative_error(*pair) for pair in zip(found, wanted)], seconds
