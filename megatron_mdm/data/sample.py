"""One tokenised sample, of any kind of data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_NOTHING = np.zeros(0, dtype=np.bool_)
_WHOLE = np.zeros(0, dtype=np.int64)


class Sample(NamedTuple):
    tokens: NDArray[np.int32]  # [S]
    eligible: NDArray[np.bool_]  # [S]: target tokens, which may be masked
    delimiters: NDArray[np.bool_] = _NOTHING  # [S]: marks of an answer (ISAD); empty: none
    segments: NDArray[np.int64] = _WHOLE  # [K]: tokens of parts that do not see each other; empty: one part
    codes_of: str = ""  # fingerprint of the image tokenizer whose codes it holds; empty: not said, or no image

    @classmethod
    def of(cls, tokens: NDArray[np.int32], prompt_length: int) -> Sample:
        """A sample of which everything behind the prompt is eligible."""
        return cls(tokens, np.arange(len(tokens)) >= prompt_length)
