"""Final answers in `\\boxed{…}`, as HiTab's and OpenScience's reasoning chains give them."""

import re

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def boxed_content(response: str) -> str | None:
    """What stands in the last \\boxed{…}, braces inside it balanced; None where there is none that ends."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    first = start + len("\\boxed{")
    depth = 1
    for place in range(first, len(response)):
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[first:place]
    return None


def cleaned(answer: str) -> str:
    """The published rules: strip, unwrap \\text{…}, \\% → %, drop backslashes and a trailing period."""
    answer = _TEXT.sub(r"\1", answer.strip()).replace("\\%", "%").replace("\\", "").strip()
    return answer.removesuffix(".").strip()
