"""Rewards: what each gives for right, wrong and hostile texts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from megatron_mdm.config.schema import RewardConfig
from megatron_mdm.evaluation.tasks import TASKS
from megatron_mdm.evaluation.tasks.expressions import MAX_DEPTH, value_of
from megatron_mdm.rl.rewards.function import Batch, scores
from megatron_mdm.rl.rewards.load import load
from megatron_mdm.rl.rewards.table import REWARDS

PUZZLE = "1030301402434020"
SOLUTION = "1234341221434321"
COLUMNS: dict[str, Any] = {
    "reference": "Some steps. \\boxed{5} #### 5",
    "numbers": [3, 4, 7],
    "target": 25,
    "puzzle": PUZZLE,
    "solution": SOLUTION,
}


def reward(name: str, text: str, arguments: dict[str, Any] | None = None, **columns: Any) -> float:
    """A built-in function's value for one completion."""
    config = RewardConfig(name=name, args=arguments or {})
    values = {column: [value] for column, value in {**COLUMNS, **columns}.items()}
    return scores(name, load(config, "gsm8k"), Batch(["a prompt"], [text], values, {}))[0]


EXACT = [  # GSM8K: response, whether it is 1234 there, whether it has an answer at all
    ("#### 1234", True, True),
    ("#### 1,234", True, True),
    ("#### $1,234", True, True),
    ("#### 1234.", True, True),
    ("#### 1234.00", True, True),
    ("#### 1.234e3", True, True),
    ("#### +1234", True, True),
    ("#### **1234**", True, True),
    ("#### `1234`", True, True),
    ("#### **$1,234**", True, True),
    ("#### $**1234**", True, True),
    ("#### 1234 apples", True, True),
    ("#### 1234. The end", True, True),
    ("a #### 7 b #### 1234", True, True),
    ("####1234", True, True),
    ("#### \\boxed{1234}", True, True),
    ("#### \\text{1234}", True, True),
    ("##### 1234", True, True),
    ("#### 1234\n5", True, True),
    ("#### １２３４", True, True),  # full width
    ("#### 1234 ####", True, True),
    ("#### 2468/2", True, True),
    ("#### 1235", False, True),
    ("#### -1234", False, True),
    ("#### -**1234**", False, True),
    ("#### 1234 #### 5", False, True),
    ("#### 12 34", False, False),
    ("#### 1234.5", False, True),
    ("1234", False, False),
    ("### 1234", False, False),
    ("#### twelve", False, False),
    ("#### 1234 + 1", False, False),
    ("#### 1234^2", False, False),
    ("#### 1,2,34", False, False),
    ("#### 1234 and a half", False, False),
    ("#### ١٢٣٤", False, False),  # Arabic digits
    ("#### 1/0", False, False),
    ("####", False, False),
    ("", False, False),
    ("#### 10**10**10", False, False),
    ("#### __import__('os').system('ls')", False, False),
    ("#### nan", False, False),
    ("#### inf", False, False),
]


@pytest.mark.parametrize(("text", "is_right", "has_answer"), EXACT)
def test_exact_match_is_the_evaluations_rule(text: str, is_right: bool, has_answer: bool) -> None:
    assert reward("exact_match", text, reference="#### 1,234") == float(is_right)
    assert reward("format_match", text) == float(has_answer)
    predicted = TASKS["gsm8k"].extract(text)  # as evaluate_exact_match() asks
    assert is_right == (predicted is not None and TASKS["gsm8k"].same(predicted, "1234"))


def test_exact_match_knows_every_task() -> None:
    assert reward("exact_match", "So \\boxed{30%, b}", {"task": "hitab"}, reference="\\boxed{B, 30}") == 1
    assert reward("exact_match", "So \\boxed{30}", {"task": "hitab"}, reference="\\boxed{B, 30}") == 0
    assert reward("exact_match", "The answer is B.", {"task": "openscience"}, reference="\\boxed{B}") == 1


STRICT = "<reasoning>\nIt is 2 + 3.\n</reasoning>\n<answer>\n5\n</answer>\n"
D1 = [  # completion, right + integer + strict + soft, tags
    (STRICT, 2 + 0.5 + 0.5 + 0.5, 0.5),
    (STRICT.replace("5", "6"), 0.5 + 0.5 + 0.5, 0.5),
    (STRICT.replace("5", "five"), 0.5 + 0.5, 0.5),
    (STRICT.replace("5", "-5"), 0.5 + 0.5, 0.5),
    (STRICT.replace("5", "5.0"), 0.5 + 0.5, 0.5),
    (STRICT.replace("5", "٥"), 0.5 + 0.5, 0.5),  # an Arabic digit
    (STRICT.replace("5", "²"), 0.5 + 0.5, 0.5),
    (STRICT.replace("5", ""), 0.5 + 0.5, 0.5),
    (STRICT.replace("3.", "3.\n\nReally."), 3.5, 0.5),
    (STRICT.replace("It is 2 + 3.", ""), 3.5, 0.5),
    (STRICT.removesuffix("\n"), 3.0, 0.375 + 0.001 * -len(STRICT) + 0.001 * 1 + 0.125 + 0.001),
    (STRICT + "x" * 10, 3.0, 0.5 - 0.010 - 0.010),
    ("x" + STRICT, 2.5, 0.5),
    (" " + STRICT, 2.5, 0.5),
    (STRICT.replace("\n", " "), 3.0, 0.0),
    (STRICT.replace("\n", ""), 3.0, 0.0),
    (STRICT.replace("</reasoning>\n", "</reasoning>\n\n \n"), 3.0, 0.375 + 0.125 - 0.0),
    (STRICT.replace("</reasoning>\n", "</reasoning>\nso\n"), 2.5, 0.5),
    (STRICT.replace("<reasoning>", "<think>"), 2.5, 0.375),
    (STRICT.replace("</reasoning>", "</think>"), 2.5, 0.375),
    (STRICT * 2, 3.5, 0.0),
    (STRICT.replace("<answer>\n", "<answer>\n<answer>\n"), 3.5, 0.5),
    (STRICT.replace("<answer>", "<ANSWER>"), 0.0, 0.25 + 0.125),
    ("<answer>\n5\n</answer>\n", 2.5, 0.125),
    ("\n<answer>\n5\n</answer>", 2.5, 0.125 - 0.001 * 21 + 0.125 + 0.001),
    ("<answer>5</answer>", 2.5, 0.0),
    ("<answer>5", 2.5, 0.0),
    ("5</answer>", 2.5, 0.0),
    ("5", 2.5, 0.0),
    ("  5\n", 2.5, 0.0),
    ("6", 0.5, 0.0),
    ("<answer>6</answer><answer>5</answer>", 2.5, 0.0),
    ("<answer>5</answer><answer>6</answer>", 0.5, 0.0),
    ("<answer></answer>", 0.0, 0.0),
    ("</answer><answer>5", 2.5, 0.0),
    ("#### 5", 0.0, 0.0),
    ("<reasoning></reasoning><answer></answer>", 0.5, 0.0),
    ("<reasoning></reasoning><answer>", 0.0, 0.0),
    ("<reasoning><answer>5</answer></reasoning>", 2.5, 0.0),
    ("", 0.0, 0.0),
    ("<answer>__import__('os')</answer>", 0.0, 0.0),
    ("<answer>10**10</answer>", 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "parts", "tags"), D1)
def test_gsm8k_d1_adds_its_five_parts(text: str, parts: float, tags: float) -> None:
    assert reward("gsm8k_d1", text) == pytest.approx(parts + tags, abs=1e-12)


EQUATIONS = [  # answers for numbers 3, 4, 7 and target 25
    ("3*7+4", 1.0),
    ("(3*7)+4", 1.0),
    (" 4 + 7 * 3 ", 1.0),
    ("7*3--4", 1.0),
    ("-(-7*3-4)", 1.0),
    ("+7*+3+4", 1.0),
    ("((((3))))*7+4", 1.0),
    ("4-7*(-3)", 1.0),
    ("(4+7*3)/1", 0.1),  # 1 is not given
    ("7*3.+4", 1.0),
    ("7*3.0+4", 0.1),  # 0 is not given
    ("3*7+4=25", 0.1),
    ("3*7", 0.1),
    ("3*7+4+4-4", 0.1),
    ("3+4+7", 0.1),
    ("25", 0.1),
    ("", 0.1),
    ("   ", 0.1),
    ("3*7+4;", 0.1),
    ("3**7-4", 0.1),
    ("3//7+4", 0.1),
    ("3 7+4", 0.1),
    ("3(7)+4", 0.1),
    ("(3*7+4", 0.1),
    ("3*7+4)", 0.1),
    (")3*7+4(", 0.1),
    ("3*/7+4", 0.1),
    ("03*7+4", 0.1),
    ("3*7+4+", 0.1),
    ("4/(3-3)*7", 0.1),
    ("7/(4-4)+3", 0.1),
    ("3*7+４", 0.1),  # a full-width digit
    ("٣*٧+٤", 0.1),  # Arabic digits
    ("3×7+4", 0.1),
    ("3·7+4", 0.1),
    ("3\n*7+4", 0.1),
    ("3e0*7+4", 0.1),
    ("3j*7+4", 0.1),
    ("3_*7+4", 0.1),
    ("__import__('os').system('true')or 3*7+4", 0.1),
    ("10**10**10", 0.1),
    ("3*7+4+0*(9**9**9)", 0.1),
    ("lambda: 3*7+4", 0.1),
    ("[3*7+4][0]", 0.1),
    ("(" * 5000 + "3*7+4" + ")" * 5000, 0.1),
    ("(" * (MAX_DEPTH + 1) + "3" + ")" * (MAX_DEPTH + 1) + "*7+4", 0.1),
    ("-" * 150 + "3*7+4", 0.1),
    ("<answer>3*7+4", 1.0),  # of nested tags, the innermost
]


@pytest.mark.parametrize(("equation", "expected"), EQUATIONS)
def test_countdown_judges_equations_without_running_them(equation: str, expected: float) -> None:
    assert reward("countdown", f"<reasoning>hm</reasoning>\n<answer>\n{equation}\n</answer>") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3*7+4", 0.0),
        ("<answer>3*7+4", 0.0),
        ("3*7+4</answer>", 0.0),
        ("</answer>3*7+4<answer>", 0.0),
        ("<answer>3*7</answer> no: <answer>3*7+4</answer>", 1.0),
        ("<answer>3*7+4</answer> no: <answer>3*7</answer>", 0.1),
        ("<answer>3*7+4</answer> no: <answer>3*7", 1.0),
        ("", 0.0),
    ],
)
def test_countdown_takes_the_last_tags(text: str, expected: float) -> None:
    assert reward("countdown", text) == expected


def test_countdown_without_tags_and_with_another_value_of_wrong_answers() -> None:
    assert reward("countdown", "3*7+4", {"bare": True}) == 1
    assert reward("countdown", "3*7", {"bare": True, "wrong": 0.0}) == 0
    assert reward("countdown", "<answer>1/3*6</answer>", numbers=[1, 3, 6], target=2) == 1  # exactly
    assert reward("countdown", "<answer>3.5*24</answer>", numbers=[3, 5, 24], target=84) == 0.1  # 3.5 is not 3 and 5


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1/3+1/3+1/3", 1),
        ("2-3-4", -5),
        ("2/3/4", Fraction(1, 6)),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        (".5*4", 2),
        ("0", 0),
    ],
)
def test_values_are_exact(expression: str, value: Fraction) -> None:
    assert value_of(expression) == value


GRIDS = [  # answer, right ones of the 6 empty cells of PUZZLE, whether all 16 are right
    (SOLUTION, 6, True),
    ("1234 3412\n2143 4321", 6, True),
    ("1 2 3 4 | 3 4 1 2 | 2 1 4 3 | 4 3 2 1", 6, True),
    (SOLUTION + "99", 6, True),  # the first 16 count
    ("[1,2,3,4,3,4,1,2,2,1,4,3,4,3,2,1]", 6, True),
    (PUZZLE, 0, False),
    ("2" + SOLUTION[1:], 6, False),  # a given cell is wrong
    ("1134341221434321", 5, False),
    ("1233341221434321", 5, False),
    ("12", 1, False),
    ("1234", 2, False),
    ("123434122", 4, False),
    ("1" * 16, 1, False),
    ("2" * 16, 2, False),
    ("0" * 16, 0, False),
    ("9" * 16, 0, False),
    ("１２３４３４１２２１４３４３２１", 0, False),  # full-width digits
    ("١٢٣٤", 0, False),
    ("", 0, False),
    ("no idea", 0, False),
    ("R1: 1234", 0, False),  # the 1 of R1 is a digit, as in d1
    ("__import__('os')", 0, False),
    ("10**10**10", 0, False),
    ("-1234341221434321", 6, True),
    ("1.234341221434321", 6, True),
    ("1" * 100_000, 1, False),
]


@pytest.mark.parametrize(("answer", "num_right", "is_exact"), GRIDS)
def test_sudoku_counts_the_empty_cells(answer: str, num_right: int, is_exact: bool) -> None:
    for text, arguments in ((f"7 <answer>\n{answer}\n</answer> 7", {}), (answer, {"bare": True})):
        assert reward("sudoku4", text, arguments) == pytest.approx(num_right / 6)
        assert reward("sudoku4_exact", text, arguments) == float(is_exact)
    assert reward("sudoku4", answer) == 0


BOXES = [  # completion, reference, whether it is right
    ("\\boxed{5}", "\\boxed{5}", True),
    ("\\boxed{ 5 }", "\\boxed{5}", True),
    ("\\boxed{5.0}", "5", True),
    ("\\boxed{5}", "so \\boxed{1} then \\boxed{5}", True),
    ("\\boxed{1} \\boxed{5}", "\\boxed{5}", True),
    ("\\boxed{5} \\boxed{1}", "\\boxed{5}", False),
    ("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", True),
    ("\\boxed{\\dfrac{1}{2}}", "\\boxed{\\frac12}", True),
    ("\\boxed{1/2}", "\\boxed{\\frac{1}{2}}", True),
    ("\\boxed{\\text{even}}", "\\boxed{even}", True),
    ("\\boxed{$x+1$}", "\\boxed{x + 1}", True),
    ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "\\boxed{(3,\\frac{\\pi}{2})}", True),
    ("\\boxed{x^{2}}", "\\boxed{x^{2}}", True),
    ("\\boxed{1,234}", "\\boxed{1234}", True),
    ("\\boxed{50\\%}", "\\boxed{50}", True),
    ("\\boxed{5.}", "\\boxed{5}", True),
    ("\\boxed{6}", "\\boxed{5}", False),
    ("\\boxed{}", "\\boxed{5}", False),
    ("\\boxed{5", "\\boxed{5}", False),
    ("\\boxed5", "\\boxed{5}", False),
    ("5", "\\boxed{5}", False),
    ("#### 5", "\\boxed{5}", False),
    ("", "\\boxed{5}", False),
    ("\\boxed{٥}", "\\boxed{5}", False),
    ("\\boxed{１}", "\\boxed{1}", True),
    ("\\boxed{__import__('os')}", "\\boxed{5}", False),
    ("\\boxed{10**10**10}", "\\boxed{5}", False),
    ("\\boxed{" * 5000 + "5" + "}" * 5000, "\\boxed{5}", True),  # the innermost box is the last
]


@pytest.mark.parametrize(("text", "reference", "is_right"), BOXES)
def test_math_boxed_compares_what_is_in_the_last_box(text: str, reference: str, is_right: bool) -> None:
    assert reward("math_boxed", text, {"form": False}, reference=reference) == 2.0 * is_right


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("<answer>\\boxed{7}</answer>", 1.0),
        ("<answer>7</answer>", 0.75),
        ("<answer>7</answer> \\boxed{7}", 0.75),
        ("\\boxed{7}", 0.5),
        ("<answer>\\boxed{7}", 0.5),
        ("7", 0.25),
        ("", 0.25),
    ],
)
def test_math_boxed_rewards_the_form(text: str, form: float) -> None:
    assert reward("math_boxed", text) == form


def long(length: int) -> dict[str, str]:
    """Texts on which a pattern that is searched from each place, or in more ways than one, takes length² steps."""
    return {
        "spaces": " " * length,
        "line breaks": "#### 5" + "\n" * length + "=",
        "spaces behind the mark": "#### " + " " * length + "x",
        "asterisks": "#### " + "*" * length + "x",
        "currencies": "#### " + "$ " * (length // 2) + "x",
        "digits": "#### " + "1" * length,
        "groups": "#### " + "1," * (length // 2),
        "boxes": "#### " + "\\boxed{" * (length // 8) + "5" + "}" * (length // 8),
        "open boxes": "\\boxed{" * (length // 7),
        "fractions": "\\boxed{" + "\\frac{" * (length // 12) + "1}{2}" + "}{2}" * (length // 12) + "}",
        "list": "\\boxed{A" + ", and B" * (length // 7) + "!}",
        "spaces in a box": "\\boxed{" + " " * length + "}",
        "answers": "answer " * (length // 7) + " " * (length // 7),
        "open tags": "<answer>" * (length // 8),
        "closed tags": "</answer>" * (length // 9),
        "nested tags": "<answer>" * (length // 17) + "3*7+4" + "</answer>" * (length // 17),
        "reasoning": "<reasoning>" + "</reasoning>  " * (length // 14),
        "angles": "<a " * (length // 3),
        "parentheses": f"<answer>{'(' * (length // 2)}3{')' * (length // 2)}</answer>",
        "signs": f"<answer>{'-' * length}3*7+4</answer>",
        "backslashes": "\\ " * (length // 2),
        "null": "\x00" * length,
        "emoji": "👩‍👩‍👧" * (length // 5),
        "combining": "#### 5" + "\u0301" * length,
        "half of a pair": "#### 5\ud800",
        "power": "<answer>" + "10**" * (length // 4) + "10</answer>",
        "import": "<answer>__import__('os').system('echo no')</answer> #### __import__('os')",
    }


CHECKED = [(name, {}) for name in REWARDS] + [("exact_match", {"task": task}) for task in ("hitab", "openscience")]
REFERENCES = {"openscience": "\\boxed{A}"}


@pytest.mark.parametrize("text", long(20_000).values(), ids=long(1))
def test_hostile_texts_get_a_finite_number_soon(text: str) -> None:
    for name, arguments in CHECKED:
        reference = REFERENCES.get(arguments.get("task", ""), COLUMNS["reference"])
        assert -50 < reward(name, text, arguments, reference=reference) <= 4, name


@pytest.mark.parametrize("kind", ["spaces behind the mark", "asterisks", "nested tags"])
def test_a_million_characters_take_no_longer_than_they_are_long(kind: str) -> None:
    """A pattern that took length² steps would take hours."""
    text = long(1_000_000)[kind]
    for name in ("exact_match", "countdown", "gsm8k_d1"):
        assert reward(name, text) <= 1
