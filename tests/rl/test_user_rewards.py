"""All rewards of a run: functions of the user's own, what is said of their mistakes, time limits, totals."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RlConfig
from megatron_mdm.rl.rewards import Rewards, check_records

FUNCTIONS = '''
import math, os, sys, time
import numpy as np


def length(prompts, completions, **kwargs):
    """As TRL's documentation has it."""
    return [float(len(completion)) for completion in completions]


def near(completions, answer, scale=1.0, **kwargs):
    return [None if each is None else -scale * abs(len(text) - each) for text, each in zip(completions, answer)]


def named(completions, answer):
    return np.array([float(each is not None) for each in answer])


def further(completions, tokens, steps, truncated):
    return [len(ids) + 10 * count + 100 * cut for ids, count, cut in zip(tokens, steps, truncated)]


def columns(prompts, completions, **kwargs):
    return [float(sorted(kwargs) == ["answer", "where"] and kwargs["answer"][0] == 3)] * len(completions)


def fails_on_b(completions, **kwargs):
    return [1 / (text != "b") for text in completions]


def fails_on_all(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("several\\nlines")
    return [0.0]


def exits(completions, **kwargs):
    sys.exit(0)


def nan_for_b(completions, **kwargs):
    return [math.nan if text == "b" else 0 for text in completions]


def text(completions, **kwargs):
    return ["1.0"] * len(completions)


def too_few(completions, **kwargs):
    return [0.0]


def nothing(completions, **kwargs):
    pass


def generator(completions, **kwargs):
    return (0.0 for _ in completions)


def slow_on_b(completions, **kwargs):
    time.sleep(3600 * ("b" in completions))
    return [float(os.getpid())] * len(completions)


def killed(completions, **kwargs):
    os.kill(os.getpid(), 9)


number = 3
'''
ANSWERS = [3, None, 5]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def rewards(*configs: Any) -> Rewards:
    return Rewards.of(RlConfig.model_validate({"rewards": [{"name": c} if isinstance(c, str) else c for c in configs]}))


def score(functions: Rewards, texts: list[str], **further: Any) -> Any:
    columns = {"answer": ANSWERS[: len(texts)], "where": [f"q.jsonl, line {row + 1}" for row in range(len(texts))]}
    return functions([f"question {row}" for row in range(len(texts))], texts, columns, **further)


def test_functions_of_a_file_are_called_as_trl_calls_them(file: Path) -> None:
    functions = rewards(
        f"{file}:length",
        {"name": f"{file}:near", "weight": 0.5, "args": {"scale": 2.0}},
        f"{file}:named",
        f"{file}:columns",
        {"name": f"{file}:further", "weight": 0.0},
    )
    assert functions.names == ["length", "near", "named", "columns", "further"]
    values = score(
        functions, ["a", "bb", "ccc"], tokens=[[1], [1, 2], []], steps=[4, 4, 0], truncated=[False, True, False]
    )
    expected = [[1, -4, 1, 1, 41], [2, np.nan, 0, 1, 142], [3, -4, 1, 1, 0]]
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(functions.total(values), [1 - 2 + 1 + 1, 2 + 0 + 1, 3 - 2 + 1 + 1])
    assert functions([], [], {}).shape == (0, 5)


def test_a_function_of_a_module_is_found_and_a_completion_without_any_score_counts_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    functions = rewards("mine:near", "mine:near")
    assert functions.names == ["near", "near_2"]
    np.testing.assert_array_equal(functions.total(score(functions, ["a", "bb"])), [-4, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", r"no reward 'exact'; it must be one of exact_match, .*package\.module:function, or path/file\.py"),
        ("mine.py:", r"no reward 'mine\.py:'"),
        ("/nowhere/mine.py:length", r"no file /nowhere/mine\.py"),
        (
            "nowhere.mine:length",
            r"cannot import nowhere\.mine: .*No module named 'nowhere'; is its folder in PYTHONPATH",
        ),
        ("{file}:lenght", r"mine\.py has no function 'lenght'"),
        ("{file}:number", r"mine\.py has no function 'number'"),
        ("{broken}:f", r"broken\.py cannot be loaded: ZeroDivisionError: division by zero$"),
    ],
)
def test_a_reward_that_is_not_there_is_named(file: Path, tmp_path: Path, name: str, message: str) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(UserError, match=message) as caught:
        rewards(name.format(file=file, broken=broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "{file}:named", "args": {"scale": 2}}, r"named: the function has no parameter 'scale'"),
        (
            {"name": "countdown", "args": {"bear": True}},
            r"countdown: unknown argument 'bear' in 'args'; it takes bare, wrong",
        ),
        (
            {"name": "exact_match", "args": {"task": "gsm9k"}},
            r"exact_match: no task 'gsm9k' .* one of gsm8k, gsm8k_tags",
        ),
    ],
)
def test_arguments_are_checked_when_the_functions_are_loaded(file: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards({**config, "name": config["name"].format(file=file)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_on_b", r"fails_on_b: q\.jsonl, line 2: ZeroDivisionError: .* \(.*mine\.py, line 28\)$"),
        ("fails_on_all", r"fails_on_all: RuntimeError: several lines \(.*mine\.py, line 33\)$"),
        ("exits", r"exits: q\.jsonl, line 1: SystemExit: 0"),
        ("nan_for_b", r"nan_for_b: q\.jsonl, line 2: returned nan, which is no finite number$"),
        ("text", r"text: q\.jsonl, line 1: returned '1\.0', which is no finite number$"),
        ("too_few", r"too_few: returned 1 values for 3 completions$"),
        ("nothing", r"nothing: must return a list .*, not NoneType$"),
        ("generator", r"generator: must return a list .*, not generator$"),
        ("further", r"further: needs the column 'tokens'; the data have answer, where$"),
    ],
)
def test_a_mistake_of_a_function_names_it_and_the_record(file: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        score(rewards(f"{file}:{name}"), ["a", "b", "c"])
    assert "\n" not in str(caught.value)


def check(name: str, *records: dict[str, Any]) -> None:
    check_records(RlConfig.model_validate({"rewards": [{"name": "/not/loaded.py:f"}, {"name": name}]}), records)


def test_records_that_the_functions_of_our_own_cannot_use_are_found_at_the_start() -> None:
    good = {"reference": "#### 5", "where": "q.jsonl, line 1"}
    check("exact_match", good, good)
    with pytest.raises(UserError, match=r"exact_match: q\.jsonl, line 2: expected #### and a number"):
        check("exact_match", good, {"reference": "five", "where": "q.jsonl, line 2"})
    with pytest.raises(UserError, match=r"exact_match: q\.jsonl, line 2: the record has no response as text"):
        check("exact_match", good, {"reference": None, "where": "q.jsonl, line 2"})
    with pytest.raises(UserError, match=r"sudoku4: needs the column 'puzzle'; the data have reference, where"):
        check("sudoku4", good)
    wrong = {"puzzle": 1030301402434020, "solution": "1" * 16, "where": "s.csv, row 1"}
    with pytest.raises(UserError, match=r"sudoku4: s\.csv, row 1: 'puzzle' must be a text of 16 digits 0-4"):
        check("sudoku4", wrong)
    wrong = {"numbers": ["3", 4], "target": 7, "where": "c.jsonl, line 1"}
    with pytest.raises(UserError, match=r"countdown: c\.jsonl, line 1: 'numbers' must be a list of integers"):
        check("countdown", wrong)


def test_a_function_with_a_time_limit_runs_in_a_process_that_is_ended(file: Path) -> None:
    functions = rewards(
        {"name": f"{file}:slow_on_b", "timeout": 1.0},
        {"name": f"{file}:fails_on_b", "timeout": 60},
        {"name": f"{file}:killed", "timeout": 60},
    )
    slow, failing, killed = functions.functions
    functions.functions = [slow]
    first, again = (score(functions, ["a", "c"]) for _ in range(2))
    assert first[0] != os.getpid()
    assert (first == again).all()  # one process for all calls
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"slow_on_b: a call with 2 completions took longer than 'timeout' 1 s"
    ) as caught:
        score(functions, ["a", "b"])
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int(first[0, 0]), 0)
    functions.functions = [failing]
    with pytest.raises(UserError, match=r"fails_on_b: q\.jsonl, line 2: ZeroDivisionError"):
        score(functions, ["a", "b"])
    np.testing.assert_array_equal(score(functions, ["a"]), [[1.0]])  # it still answers
    functions.functions = [killed]
    with pytest.raises(
        UserError, match=r"killed: its process ended in a call with 1 completions \(killed by signal 9\)"
    ):
        score(functions, ["a"])
    functions.functions = [failing]
    functions.close()
    with pytest.raises(UserError, match="its process ended"):
        score(functions, ["a"])


def test_a_module_with_a_time_limit_that_cannot_be_loaded_is_named(file: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.py has no function 'lenght'"):
        rewards({"name": f"{file}:lenght", "timeout": 5})


def test_the_controls_rewards_are_exact_matches_at_other_places() -> None:
    path = Path(__file__).parent / "shuffled.py"
    texts = [f"#### {number % 3}" for number in range(64)]
    columns = {"reference": ["#### 1"] * len(texts)}
    right = rewards("exact_match")([""] * len(texts), texts, columns)
    shuffled = rewards(f"{path}:exact_match")([""] * len(texts), texts, columns)
    assert right.sum() == shuffled.sum() == 21
    assert (right != shuffled).any()
    np.testing.assert_array_equal(shuffled, rewards(f"{path}:exact_match")([""] * len(texts), texts, columns))
