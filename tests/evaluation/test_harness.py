"""The adapter for lm-eval, where that is installed; without it, the line that says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_program_ranks, run_ranks
from tests.small import VOCAB, small_config

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_extra(tmp_path: Path) -> None:
    result = run_program_ranks("launch/evaluate.py", ["--run-dir", str(tmp_path), "--harness", "arc_easy"])[0]
    assert result.exit_code == 1
    assert "install it with: pip install 'megatron-mdm[eval]'" in result.stderr


class Letters:
    """A tokenizer of single characters."""

    num_ids = VOCAB - 1

    def encode(self, text: str) -> list[int]:
        return [2 + ord(letter) % 50 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("d") + token % 20) for token in ids)


def harness_answers(config: Any) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    from megatron_mdm.checkpoint.load import build_model
    from megatron_mdm.data.conversation import TemplateSource
    from megatron_mdm.data.templates import TEMPLATES
    from megatron_mdm.data.tokenizer import Tokenizer
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.evaluation.harness import HarnessConfig, HarnessModel
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel.tensor)
    engine = InferenceEngine(build_model(config.model, config.parallel, context, 3), "fp32")
    special = (config.data.mask_token, config.data.pad_token, config.data.eos_token)
    tokenizer = Tokenizer(Letters(), VOCAB, *special, TEMPLATES["plain"](TemplateSource("")))
    settings = HarnessConfig(num_times=8, gen_length=8, block_length=4, steps=8, batch_size=3)
    model = HarnessModel(engine, tokenizer, settings, config, context)

    def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]

    pairs = [("two and two", " four"), ("two and two", " five"), ("", "alone"), ("trailing ", "space")]
    generated = model.generate_until(instances("generate_until", [("abc", {"until": []}), ("de", {"until": ["e"]})]))
    return {
        "pairs": model.loglikelihood(instances("loglikelihood", pairs)),
        "rolling": model.loglikelihood_rolling(instances("loglikelihood_rolling", [("a" * 200,), ("b",)])),
        "generated": generated,
    }


@pytest.mark.skipif(not INSTALLED, reason="needs lm-eval")
def test_requests_are_answered_alike_on_every_layout(tmp_path: Path) -> None:
    expected = run_ranks(harness_answers, 1, small_config(tmp_path, model={"init_std": 0.3}))[0]
    assert all(likelihood < 0.0 for likelihood, _ in expected["pairs"])
    assert expected["rolling"][0] < expected["rolling"][1] < 0.0
    assert "e" not in expected["generated"][1]
    for parallel, ranks in (({}, 2), ({"tensor": 2}, 2)):
        config = small_config(tmp_path, model={"init_std": 0.3}, parallel=parallel)
        for result in run_ranks(harness_answers, ranks, config):
            assert result["generated"] == expected["generated"]
            assert result["rolling"] == pytest.approx(expected["rolling"], rel=1e-5)
            assert [pair[1] for pair in result["pairs"]] == [pair[1] for pair in expected["pairs"]]
