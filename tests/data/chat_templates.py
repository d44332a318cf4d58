"""Chat templates in the wild, in chat_templates/, as far as conversations go, and conversations to render by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = Path(__file__).with_name("chat_templates")


def source(name: str) -> str:
    """A file's text, without the line break at its end that editors write."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


class Case(NamedTuple):
    """A folder's settings, and how an answer is learnt."""

    template: str | list[dict[str, str]]
    end: str  # what an answer ends with
    tokens: dict[str, Any]  # special tokens of tokenizer_config.json
    before: str = ""  # what the template writes before an answer, behind the prompt for generation
    num_samples: int = 1  # that a conversation of two answers gives


_LLADA_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_QWEN_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
_LLAMA_3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_LLAMA_2_TOKENS = {
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False},
}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

CASES = {
    "llada": Case(source("llada"), "<|eot_id|>", _LLADA_TOKENS),
    "mmada": Case(source("mmada"), "<|eot_id|>", _LLADA_TOKENS),
    "dream": Case(source("dream"), "<|im_end|>", _QWEN_TOKENS),
    "chatml": Case(source("chatml"), "<|im_end|>", _QWEN_TOKENS),
    "chatml, marked": Case(source("chatml_marked"), "<|im_end|>", _QWEN_TOKENS),
    "named": Case(
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source("chatml")}], "<|im_end|>", {}
    ),
    "qwen2.5": Case(source("qwen2.5"), "<|im_end|>", _QWEN_TOKENS),
    "qwen3": Case(source("qwen3"), "<|im_end|>", _QWEN_TOKENS, EMPTY_THOUGHT, 2),
    "qwen3 without thoughts": Case(source("qwen3_without_thoughts"), "<|im_end|>", _QWEN_TOKENS),
    "llama-3": Case(source("llama3"), "<|eot_id|>", _LLAMA_3_TOKENS),
    "llama-3.1": Case(source("llama3.1"), "<|eot_id|>", _LLAMA_3_TOKENS),
    "llama-2": Case(source("llama2"), " </s>", _LLAMA_2_TOKENS, " "),
    "mistral": Case(source("mistral"), "</s>", _LLAMA_2_TOKENS, " "),
    "gemma": Case(source("gemma"), "<end_of_turn>", {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "zephyr": Case(source("zephyr"), "</s>", _LLAMA_2_TOKENS),
    "deepseek-r1": Case(source("deepseek_r1"), "<｜end▁of▁sentence｜>", {"bos_token": "<｜begin▁of▁sentence｜>"}),
    "phi-3": Case(source("phi3"), "<|end|>", {"eos_token": "<|endoftext|>"}),
}
# fmt: off
SPECIAL_TOKENS = [
    "<s>", "</s>", "<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
    "<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]", "<｜User｜>", "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
]
# fmt: on

_ONE = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
CONVERSATIONS = {
    "one turn": _ONE,
    "two turns": [*_ONE, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    "system": [{"role": "system", "content": "Be brief."}, *_ONE],
    "unicode": [{"role": "user", "content": 'né <b> "q" 数 🙂'}, {"role": "assistant", "content": "déjà\n 数"}],
    "white space": [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": "\n b "}],
    "thoughts": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nagain\n</think>\n\n4"},
    ],
}
