"""The reward functions by name. A new one is a file with its maker, and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mdm.rl.rewards.countdown import countdown
from megatron_mdm.rl.rewards.exact_match import exact_match, format_match
from megatron_mdm.rl.rewards.function import Function
from megatron_mdm.rl.rewards.gsm8k_d1 import gsm8k_d1
from megatron_mdm.rl.rewards.math_boxed import math_boxed
from megatron_mdm.rl.rewards.sudoku import sudoku4, sudoku4_exact

# Makers, whose keyword arguments are what `args` may say. A function names the columns it needs in its signature, and
# raises ValueError for a record whose columns are none that it can use, whatever the completion.
REWARDS: dict[str, Callable[..., Function]] = {
    "exact_match": exact_match,
    "format_match": format_match,
    "gsm8k_d1": gsm8k_d1,
    "math_boxed": math_boxed,
    "countdown": countdown,
    "sudoku4": sudoku4,
    "sudoku4_exact": sudoku4_exact,
}
