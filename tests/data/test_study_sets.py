"""The small study's data: splits apart, answers right, nothing of the test in what is pretrained on."""

from __future__ import annotations

import pytest

from megatron_mdm.data import fact_questions, table_questions
from megatron_mdm.data.public_sets import Sets
from megatron_mdm.data.study_sets import NUM_ASKED, NUM_PEOPLE, TASKS, Held, Sizes, pretraining_mix
from megatron_mdm.evaluation.tasks import TASKS as SCORERS

SIZES = Sizes(train=300, validation=100, test=1000)
MEASURES = {"arithmetic": "gsm8k", "tables": "hitab", "facts": "hitab"}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Sets]:
    return {name: make(SIZES, 0) for name, make in TASKS.items()}


def prompt_of(sample: dict[str, str]) -> str:
    return sample.get("question") or sample["prompt"]


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_two_sets(tasks: dict[str, Sets], name: str) -> None:
    sets = tasks[name]
    assert {part: len(samples) for part, samples in sets.items()} == SIZES._asdict()
    prompts = [prompt_of(sample) for samples in sets.values() for sample in samples]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", TASKS)
def test_the_test_set_does_not_depend_on_the_others_sizes(tasks: dict[str, Sets], name: str) -> None:
    assert TASKS[name](Sizes(10, 10, 1000), 0)["test"] == tasks[name]["test"]


@pytest.mark.parametrize("name", TASKS)
def test_references_are_read_by_the_tasks_scorers(tasks: dict[str, Sets], name: str) -> None:
    scorer = SCORERS[MEASURES[name]]
    for sample in tasks[name]["test"]:
        response = sample.get("answer") or sample["response"]
        answer = scorer.reference(response)
        assert scorer.extract(response) == answer


def test_tables_answer_their_questions(tasks: dict[str, Sets]) -> None:
    """Every answer is the sum of the two rows' ages, in the order of the question."""
    for sample in tasks["tables"]["test"]:
        question, header, *lines = sample["prompt"].split("\n")
        assert "\n".join([header, *lines]) == sample["table"]
        ages = dict(zip(table_questions.ROWS, (int(line.strip("| ").split(" | ")[1]) for line in lines), strict=True))
        a, b = (ages[word.removesuffix("?")] for word in question.split() if word.removesuffix("?") in ages)
        assert sample["response"] == f"{a} + {b} = {a + b}. \\boxed{{ {a + b} }}"


def test_the_test_asks_for_facts_that_no_other_question_shows(tasks: dict[str, Sets]) -> None:
    people = fact_questions.people(0)[:NUM_PEOPLE]
    asked = {person.name for person in people[:NUM_ASKED]}
    others = {person.name for person in people[NUM_ASKED:]}
    for part, expected in (("train", asked), ("validation", asked), ("test", others)):
        for sample in tasks["facts"][part]:
            assert any(name in sample["prompt"] for name in expected)
            assert not any(name in sample["prompt"] for name in (asked | others) - expected)


def test_options_hold_the_right_value_once(tasks: dict[str, Sets]) -> None:
    values = {person.name: person.values for person in fact_questions.people(0)}
    for sample in tasks["facts"]["test"]:
        question, _, listed = sample["prompt"].partition(" One of: ")
        name = next(name for name in values if name in question)
        options = listed.split(", ")
        right = sample["response"].removeprefix("\\boxed{ ").removesuffix(" }")
        assert right in values[name]
        assert right in options
        assert len(set(options)) == 4


def test_pretraining_shows_no_question_of_any_set_and_every_fact(tasks: dict[str, Sets]) -> None:
    held = Held.of(tasks)
    mix = pretraining_mix(8000, held, 0)
    assert mix == pretraining_mix(8000, held, 0)
    texts = [f"{sample['prompt']}\n{sample['response']}" for sample in mix]
    whole = "\n\n".join(texts)
    for samples in (part for sets in tasks.values() for part in sets.values()):
        assert not any((sample.get("table") or prompt_of(sample)) in whole for sample in samples)
    quizzed = [text for text in texts if "The answer is" in text]
    others = [person.name for person in fact_questions.people(0)[NUM_ASKED:NUM_PEOPLE]]
    assert quizzed
    assert not any(name in text for text in quizzed for name in others)
    assert sum(name in whole for name in others) == len(others)


def test_tables_are_drawn_by_the_seed() -> None:
    assert table_questions.generate(5, 1) == table_questions.generate(5, 1)
    assert table_questions.generate(5, 1) != table_questions.generate(5, 2)
