"""A control: rewards of exact match that are shuffled over the completions of a rank, so that nothing can be learnt
from them. Deterministic in the completions, as a reward must be."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from megatron_mdm.rl.rewards.exact_match import exact_match as exact_match_of


def exact_match(completions: list[str], reference: list[Any]) -> list[float | None]:
    """The right values of gsm8k, each at another completion's place."""
    values = list(exact_match_of("gsm8k")(completions, reference=reference))
    seed = hashlib.sha256("\0".join(completions).encode("utf-8", "surrogatepass")).digest()
    random.Random(seed).shuffle(values)
    return values
