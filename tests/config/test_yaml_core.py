"""YAML 1.2's scalars, texts that stay as they were written, what is refused, and that a dump is read back."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.config.yaml_core import dump_yaml, read_override, read_yaml
from tests.small import small_config

# fmt: off
TRICKY = [
    "no", "yes", "on", "off", "n", "y", "No", "NO", "true", "True", "false", "null", "Null", "~", "", " ", "none",
    "010", "08", "0o10", "0x1F", "0b11", "1_000", "5", "-5", "+5", "5e8", "1e-3", "1.0", ".5", "5.", "1:30", "1:30.5",
    ".inf", "-.inf", ".nan", "inf", "nan", "2026-01-01", "2026-01-01 10:00:00", "<<", "=", "!", "*a", "&a", "- a",
    "[MASK]", "<mask>", "<|mask|>", "{a: 1}", "a: b", "a #b", "#a", "####", "runs/a #2", "'a'", '"a"', "'", '"',
    "a'b", 'a"b', "\\n", "a\nb", " a", "a ", "\ta", "a\tb", "%a", "@a", "`a`", "|", ">", "?", "-", "---", "...", ":",
    "é", "日本", "\U0001f600", "\x85", "\u2028", "\ufeff", "\x00", "\ue0b5", "a\r\nb", "C:\\runs", "a, b", "[", "]",
]
# fmt: on


def texts(number: int, seed: int) -> list[str]:
    """TRICKY ones, and random ones of the characters that mean something to YAML."""
    draw = random.Random(seed)
    alphabet = "aeinoxy019.:-+_#'\"[]{},&*!|>%@`~?=\\ \n\té日"
    return [*TRICKY, *("".join(draw.choices(alphabet, k=draw.randint(1, 8))) for _ in range(number))]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *((text, text) for text in ("no", "yes", "on", "off", "y", "1_000", "1:30", "1:30.5", "0b11", "2026-01-01")),
        *((text, text) for text in ("inf", "nan", "=", "0o9", "0xg", "1e", "e5", "1.2.3", "nuLL", "tRue")),
        *((text, None) for text in ("null", "Null", "NULL", "~")),
        *((text, text.lower() == "true") for text in ("true", "True", "TRUE", "false", "False", "FALSE")),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-5", -5),
        ("+5", 5),
        ("0", 0),
        ("00", 0),
        ("-010", -10),
        ("5e8", 500_000_000),
        ("1e-3", 1e-3),
        ("1E+3", 1000),
        ("5.0e8", 5e8),
        ("1e99", 1e99),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e1", -5.0),
        ("1.0", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("+.Inf", math.inf),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!!float '5e8'", 5e8),
        ('"5e8"', "5e8"),
        ("'no'", "no"),
    ],
)
def test_scalars_of_the_core_schema(written: str, value: Any) -> None:
    """Section 10.3.2 of the YAML 1.2.2 specification. Where nothing is known of the type."""
    found, _ = read_yaml(f"a: {written}\nb: [{written}]", "a.yaml", Any)
    assert (found["a"], type(found["a"])) == (value, type(value))
    assert found["b"] == [value]


def test_not_a_number() -> None:
    assert math.isnan(read_yaml("a: .NaN", "a.yaml", Any)[0]["a"])


@pytest.mark.parametrize(
    ("annotation", "written", "value"),
    [
        *((str, text, text) for text in ("no", "true", "1.0", "010", "5e8", "2026-01-01", ".inf", "a b", "<mask>")),
        *((int | str, text, text) for text in ("no", "true", "1.0", "010", "5e8", "0x10", "+5", "1_0")),
        *((int | str, text, int(text)) for text in ("0", "7", "-7", "126336")),
        *((int | Literal["sqrt"], *pair) for pair in (("010", 10), ("1e2", 100), ("sqrt", "sqrt"), ("no", "no"))),
        *((float | Literal["auto"], *pair) for pair in (("0.5", 0.5), ("1", 1), ("auto", "auto"))),
        *((int, *pair) for pair in (("5e8", 500_000_000), ("1e2", 100), ("010", 10), ("2.0", 2), ("true", "true"))),
        *((Literal[1, 2], *pair) for pair in (("2.0", 2), ("02", 2))),
        *((float, *pair) for pair in (("5e8", 5e8), ("1", 1), ("true", "true"))),
        *((bool, *pair) for pair in (("true", True), ("False", False), ("no", "no"))),
    ],
)
def test_plain_values_are_read_by_the_schema(annotation: Any, written: str, value: Any) -> None:
    """In files, in their lists and mappings, and in overrides. Numbers that are whole are integers where those are."""
    found, _ = read_yaml(f"a: {written}\nb: [{written}]", "a.yaml", dict[str, annotation | list[annotation]])
    for read in (found["a"], found["b"][0], read_override(written, "override", annotation)):
        assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", [*TRICKY, "null", "a=b", " # "])
def test_overrides_are_texts_as_they_were_typed(text: str) -> None:
    """Save that quotes around the whole are YAML's, and that token ids are numbers."""
    read = read_override(text, "override", DataConfig.model_fields["mask_token"].annotation)
    expected: Any = {"5": 5, "-5": -5, "'a'": "a", '"a"': "a"}.get(text, text)
    assert (read, type(read)) == (expected, type(expected))
    assert read_override(text, "override", str) == str(expected)


@pytest.mark.parametrize("text", ["5", "'a'", '"', "a: b", "[a]", "runs/a #2", " a ", "\\n"])
def test_overrides_in_quotes(text: str) -> None:
    """How to write a text that is a number, or has quotes of its own."""
    single = text.replace("'", "''")
    double = text.replace("\\", r"\\").replace('"', r"\"")
    assert read_override(f"'{single}'", "override", int | str) == text
    assert read_override(f'"{double}"', "override", int | str) == text


def test_overrides_have_no_comments() -> None:
    annotation = DataConfig.model_fields["mask_token"].annotation
    assert read_override("[####, 'a #b', no, 5, 1.0]", "override", tuple[annotation, ...]) == [
        "####",
        "a #b",
        "no",
        5,
        "1.0",
    ]
    assert read_override("{a#: b #c}", "override", dict[str, str]) == {"a#": "b #c"}
    assert read_override("{/data/a #1: 0.5}", "override", str | dict[str, float]) == {"/data/a #1": 0.5}
    assert read_override("runs/a #2", "override", str | dict[str, float]) == "runs/a #2"


def test_the_configuration_round_trips(tmp_path: Path) -> None:
    """Through our dump; through PyYAML's own, which wrote the runs of earlier versions; and PyYAML reads ours alike."""
    words = texts(400, seed=1)
    config = small_config(
        tmp_path,
        diffusion={"isad": {"delimiters": [*words, 5, 126336]}, "syrm": {"tokens": words[::-1]}},
        data={"train": dict.fromkeys(words, 0.5), "mask_token": "no", "eos_token": "08", "pad_token": "[PAD]"},
        checkpoint={"directory": "runs/a #2"},
        deepspeed={"a": words[:40], "b": {"c": [1, 1.5, True, None, "5"]}},
    )
    path = tmp_path / "a.yaml"
    values = config.model_dump(mode="json")
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(dump_config(config)) == {"format": 2, **values}
    del values["deepspeed"]  # where the schema says nothing, readers of 1.1 and 1.2 differ
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert load_config(path) == config.model_copy(update={"deepspeed": {}})


@pytest.mark.parametrize("seed", range(3))
def test_any_value_round_trips(seed: int) -> None:
    draw = random.Random(seed)
    words = texts(300, seed)

    def value(depth: int) -> Any:
        kind = draw.randrange(8 if depth else 6)
        scalars: list[Any] = [
            draw.choice(words),
            draw.randint(-(10**12), 10**12),
            draw.random() * 10.0 ** draw.randint(-300, 300),
        ]
        if kind < 3:
            return scalars[kind]
        if kind < 6:
            return draw.choice([None, True, False, draw.choice(words)])
        parts = [value(depth - 1) for _ in range(draw.randrange(5))]
        return parts if kind == 6 else {draw.choice(words): part for part in parts}

    for _ in range(60):
        expected = {"a": value(3)}
        assert read_yaml(dump_yaml(expected), "a.yaml", Any)[0] == expected


def doubling(first: str, later: str) -> str:
    """A document of 40 lines whose aliases stand for 2^40 values."""
    lines = [f"a0: &a0 {first}", *(f"a{n}: &a{n} {later.format(f'a{n - 1}')}" for n in range(1, 40))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "a.yaml, line 3: key 'a' stands here and in line 1"),
        ("a: {b: 1, b: 1}", "a.yaml, line 1: key 'b' stands here and in line 1"),
        ("a: 1\n'a': 2", "key 'a' stands here"),
        ("- {x: 1,\n   x: 2}", "a.yaml, line 2: key 'x'"),
        ("a: &m {x: 1}\nb:\n  <<: *m\n  <<: *m", "a.yaml, line 4: key '<<'"),
        ("? [a]\n: 1", "a key must be a text"),
        ("a: &x {b: *x}", "within what it names"),
        ("a: &x\n  <<: *x", "within what it names"),
        ("a: &x [*x]", "within what it names"),
        ("a:\n  <<: 1", "'<<' takes a mapping"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !local {x: 1}", "tag"),
        ("a: !!int x", "'x' is not of the type of its tag, int"),
        ("a: 1\nb: [1", "a.yaml, line 2: not valid YAML"),
        ("a: \x07", "a.yaml: not valid YAML"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("a: *nowhere", "undefined alias"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        (doubling("{x: 1}", "[*{0}, *{0}]"), "more than 100,000 values"),
        (doubling("{x: 1}", "{{<<: [*{0}, *{0}]}}"), "more than 100,000 values"),
    ],
)
def test_bad_documents(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_yaml(text, "a.yaml", Any)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merges_and_aliases() -> None:
    text = "a: &a {x: 1, y: {z: 1}}\nb: &b {x: 2, w: 2}\nc: {<<: [*a, *b], w: 3}\nd: *a\ne: {'<<': 1}"
    value, lines = read_yaml(text, "a.yaml", Any)
    assert value["c"] == {"x": 1, "y": {"z": 1}, "w": 3}
    assert value["e"] == {"<<": 1}
    assert value["d"] == value["a"]
    assert value["d"]["y"] is not value["a"]["y"], "an override of one would change the other"
    assert (lines[("c", "w")], lines[("c", "x")], lines[("d",)]) == (3, 1, 4)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[MASK]", "'data.mask_token': a list stands where a text is expected; put it in quotes: '[MASK]'"),
        ("{mask}", "'data.mask_token': a mapping stands where a text is expected; put it in quotes: '{mask}'"),
        ("null", "'data.mask_token': 'null' stands where a text is expected; write '' for an empty one; in quotes"),
        ("", "'data.mask_token': nothing stands where a text is expected; write '' for an empty one"),
    ],
)
def test_what_is_no_text_in_a_file_is_told_how_to_be_one(written: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_yaml(f"x: 1\nmask_token: {written}", "a.yaml", DataConfig)
    assert str(caught.value).startswith("a.yaml, line 2: " + message.replace("data.", ""))
    with pytest.raises(UserError, match="pad_token"):
        read_yaml("pad_token: ~", "a.yaml", DataConfig)


def test_numbers_too_long_for_python_are_refused_as_others_are(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    for text in ("9" * 5000, "1e999", "9" * 400):
        with pytest.raises(UserError, match=r"'optimizer\.lr': input should be a "):
            load_config(path, [f"optimizer.lr={text}"])
