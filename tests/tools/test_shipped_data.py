"""The shipped configurations read the files that preparation writes, and cut off validation at most once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.corpus_writer import SPLITS
from megatron_mdm.evaluation.tasks import PREPARERS
from tests.data.test_text_to_image import write_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
QUESTION = {"question": "1 + 1?", "answer": "#### 2"}
TABLE = {"title": "t", "table": "| 1 |", "question": "which?", "answer": [1]}
OPTION = {"input": "which?", "output": "\\boxed{A}"}
CODES = {"caption": "w4 w5", "image_codes": [0, 1, 2, 3]}
PUBLIC_FILES: dict[str, list[list[dict[str, Any]]]] = {  # what people download, small
    "gsm8k": [[QUESTION], [QUESTION]],
    "gsm8k_tags": [[QUESTION], [QUESTION]],
    "hitab": [[TABLE], [TABLE], [TABLE]],
    "openscience": [[OPTION] * 6000],
    "text-to-image": [[CODES] * 20, [CODES] * 20],
}


STUDIES = ("study/small.yaml", "study/paper_8b.yaml")


@cache
def shipped(form: str) -> dict[str, DataConfig]:
    """The data sections of all configurations that name data of this form."""
    found = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if str(path.relative_to(CONFIGS)) in STUDIES:  # of many runs
            continue
        try:
            data = load_config(path).data
        except UserError as error:
            if "is missing" in str(error):  # a part of others
                continue
            raise
        if data.format == form:
            found[str(path.relative_to(CONFIGS))] = data
    return found


GENERATED = (  # by the quickstarts, mdm prepare, launch/study.sh
    "quickstart.yaml",
    "quickstart_lora.yaml",
    "images/digits.yaml",
    "rl/arithmetic_sft.yaml",
    "rl/countdown_autoregressive.yaml",
    "rl/countdown_sft.yaml",
    "rl/sudoku4_sft.yaml",
    "study/base.yaml",
    "study/base_autoregressive.yaml",
    "study/base_images.yaml",
    "study/base_masked.yaml",
    "study/sft_images.yaml",
)
GENERATED_PROMPTS = ("rl/arithmetic.yaml", "rl/countdown.yaml", "rl/sudoku4.yaml", "rl/compare/")
OWN = ("sft/dream_7b_lora.yaml",)  # a reader's
SFT = {name: data for name, data in shipped("sft").items() if name not in (*GENERATED, *OWN)}
PROMPTS = {name: data for name, data in shipped("prompts").items() if not name.startswith(GENERATED_PROMPTS)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """The files that the preparer of a task writes."""

    @cache
    def names(task: str) -> set[str]:
        folder = tmp_path_factory.mktemp(task)
        paths = [folder / f"{index}.jsonl" for index in range(len(PUBLIC_FILES[task]))]
        for path, rows in zip(paths, PUBLIC_FILES[task]):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        captions = {"tokenizer": str(write_tokenizer(folder / "tokenizer.json", 20)), "vocabulary": "behind"}
        options = {"seed": 0, "tables": "", "samples": 0, "test": 0, "output": folder, **captions}
        sets = PREPARERS[task]([str(path) for path in paths], argparse.Namespace(**options))
        return {f"{name}.jsonl" for name in sets}

    return names


def test_every_folder_is_covered() -> None:
    assert {path.name for path in (CONFIGS / "sft").iterdir()} - {Path(name).name for name in (*SFT, *OWN)} == {
        "llada_8b.yaml"
    }
    assert shipped("corpus")


@pytest.mark.parametrize("name", [*SFT, *PROMPTS])
def test_samples_are_those_that_the_task_prepares(name: str, written: Callable[[str], set[str]]) -> None:
    data = {**SFT, **PROMPTS}[name]
    train = Path(str(data.train))
    task = train.parent.name  # as tools/prepare_data.py task NAME … --output data/NAME has it
    assert train.parent.parent.name == "data"
    files = written(task)
    assert train.name in files
    if "validation.jsonl" in files:
        assert Path(str(data.validation)) == train.with_name("validation.jsonl")
        assert data.validation_fraction == 0.0
    else:
        assert not data.validation
        assert 0.0 < data.validation_fraction < 0.5


@pytest.mark.parametrize("name", shipped("corpus"))
def test_corpora_are_named_as_the_corpus_writer_names_them(name: str) -> None:
    data = shipped("corpus")[name]
    assert isinstance(data.train, str)
    prefix = data.train.removesuffix(f"-{SPLITS[0]}")
    assert (data.train, data.validation) == tuple(f"{prefix}-{split}" for split in SPLITS[:2])
    assert data.validation_fraction == 0.0
