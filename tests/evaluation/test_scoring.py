"""Intervals, and the fixed validation grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mdm.batch import ModelInputs
from megatron_mdm.config.schema import DataConfig, RunConfig
from megatron_mdm.data.templates import BEGIN, END_OF_TURN, HEADER, HEADER_END
from megatron_mdm.evaluation.intervals import wilson_interval
from megatron_mdm.models.cache import Window
from tests.data.test_tokenizer_files import byte_level
from tests.ranks import run_ranks
from tests.small import small_config, write_ids


def test_wilson_interval() -> None:
    low, high = wilson_interval(81, 100)
    assert (low, high) == pytest.approx((0.7222, 0.8749), abs=1e-4)  # the textbook value
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0


class Says:
    """An engine that answers with these ids."""

    def __init__(self, ids: list[int], start: int, vocab_size: int) -> None:
        self.ids = torch.tensor(ids)
        self.start = start
        self.vocab_size = vocab_size

    def logits(self, inputs: ModelInputs, window: Window | None = None) -> torch.Tensor:
        places = inputs.selected.nonzero()[:, 1] - self.start
        return torch.nn.functional.one_hot(self.ids[places], self.vocab_size).float()


def scored(data: DataConfig, stop_at_eos: bool) -> dict[str, Any]:
    from megatron_mdm.data.prompts import EncodedPrompt
    from megatron_mdm.data.tokenizer import load_tokenizer
    from megatron_mdm.evaluation.exact_match import Question, evaluate_exact_match
    from megatron_mdm.evaluation.tasks import TASKS
    from megatron_mdm.generation.settings import GenerationConfig
    from megatron_mdm.parallel.groups import initialize

    tokenizer = load_tokenizer(data)
    end_of_turn = tokenizer.backend.token_id("<|eot_id|>")
    said = [*tokenizer.encode("#### 9"), end_of_turn, *tokenizer.encode("6 #### 96"), tokenizer.eos_id]
    config = GenerationConfig(gen_length=len(said), block_length=1, steps=len(said), stop_at_eos=stop_at_eos)
    question = Question(EncodedPrompt.of("Q", tokenizer), "9")
    engine = Says(said, len(question.prompt.ids), tokenizer.num_ids)
    result = evaluate_exact_match(engine, [question], TASKS["gsm8k"], tokenizer, config, initialize())
    return result["samples"][0]


@pytest.mark.parametrize("template", ["llada", "mmada"])
def test_what_follows_the_end_of_turn_is_neither_returned_nor_scored(template: str, tmp_path: Path) -> None:
    model = byte_level()
    model.add_special_tokens([BEGIN, HEADER, HEADER_END, END_OF_TURN])
    model.save(str(tmp_path / "tokenizer.json"))
    data = DataConfig(train="", tokenizer=str(tmp_path), template=template, max_length=99)
    whole, stopped = (run_ranks(scored, 1, data, stop_at_eos)[0] for stop_at_eos in (False, True))
    for sample in (whole, stopped):
        assert (sample["response"], sample["predicted"], sample["right"]) == ("#### 9", "9", True)
    assert stopped["steps"] < whole["steps"]  # blocks behind the end of turn are left out


def validated(config: RunConfig) -> float:
    from megatron_mdm.config.schema import EvaluationConfig
    from megatron_mdm.diffusion.mask_schedule import LinearSchedule
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.evaluation.validation import FixedGridValidation
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.inputs import resolve

    config, data = resolve(config)
    context = initialize(config.parallel)
    engine = InferenceEngine(build_model(config.model, config.parallel, context, 1), "fp32")
    validation = FixedGridValidation(
        data.train,
        EvaluationConfig(num_samples=7, num_times=3),
        LinearSchedule(1e-3),
        data.special_ids,
        config.batch.micro_size,
        context,
    )
    first = validation(engine)
    assert first == validation(engine)
    return first


def test_validation_loss_is_the_same_for_every_layout_seed_and_method(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 12)
    reference = run_ranks(validated, 1, small_config(tmp_path))[0]
    for num_ranks, sections in (
        (2, {}),
        (2, {"parallel": {"tensor": 2}}),
        (1, {"seed": 9, "diffusion": {"views": 2}, "batch": {"global_size": 8, "micro_size": 8}}),
    ):
        for loss in run_ranks(validated, num_ranks, small_config(tmp_path, **sections)):
            assert loss == pytest.approx(reference, rel=1e-6)
