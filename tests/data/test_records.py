"""Files of records: their layouts and encodings, and that a bad record costs itself only, whatever is wrong with it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.records import BadRecords, read_records
from megatron_mdm.data.sft import SftDataset, read_sft
from megatron_mdm.data.tokenizer import load_tokenizer

GOOD = {"prompt": "a", "response": "b"}
GOOD_LINE = json.dumps(GOOD)
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'type' %}{{ m.content + 1 }}{% endif %}"
    "{% if m.content == 'attribute' %}{{ m.nothing.at.all }}{% endif %}"
    "{% if m.content == 'zero' %}{{ 1 / 0 }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_byte_tokenizer(folder: Path) -> Path:
    """Every byte is a token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["a"], trainer)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("records"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"}))
    return folder


def read(folder: Path, path: Path, **changes: Any) -> SftDataset:
    data = DataConfig(train="", tokenizer=str(folder), **{"max_length": 200, **changes})
    tokenizer = load_tokenizer(data)
    return read_sft(str(path), tokenizer, data, tokenizer.num_ids)


DEEP = "[" * 100_000 + "]" * 100_000
ONE_TURN = '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "b"}]}'
BAD_LINES = {
    "half a surrogate pair": ('{"prompt": "cut \\ud83d", "response": "b"}', r"holds \\ud83d, half of a surrogate pair"),
    "the other half, in a turn": (ONE_TURN % '"\\uDE00"', r"holds \\ude00, half of a surrogate pair"),
    "half a pair in a name": ('{"prompt": "a", "response": "b", "\\ud83d": 1}', "half of a surrogate pair"),
    "id beyond 32 bits": ('{"input_ids": [5, 2147483648, 7], "prompt_length": 1}', "token id 2147483648 at position 1"),
    "id of 5,000 digits": (f'{{"input_ids": [{"9" * 5000}], "prompt_length": 0}}', "thousands of digits"),
    "negative id": ('{"input_ids": [5, -1], "prompt_length": 1}', "token id -1 at position 1"),
    "boolean id": ('{"input_ids": [5, true], "prompt_length": 1}', "'input_ids' must hold integers only"),
    "id with a fraction": ('{"input_ids": [5, 6.0], "prompt_length": 1}', "'input_ids' must hold integers only"),
    "id as text": ('{"input_ids": ["5", "6"], "prompt_length": 1}', "'input_ids' must hold integers only"),
    "id that is no number": ('{"input_ids": [5, NaN], "prompt_length": 1}', "'input_ids' must hold integers only"),
    "no id": ('{"input_ids": [], "prompt_length": 0}', "no eligible token"),
    "prompt length as text": ('{"input_ids": [5, 6], "prompt_length": "1"}', "'prompt_length' '1' is no integer"),
    "span that is none": ('{"input_ids": [5, 6], "spans": [[0]]}', "'spans' must be a list of pairs"),
    "labels of other tokens": ('{"input_ids": [5, 6], "labels": [-100, 7]}', "differ from 'input_ids' at position 1"),
    "nested deeply": (f'{{"prompt": "a", "response": {DEEP}}}', "nested too deeply"),
    "nested deeply, not needed": (f'{{"prompt": "a", "response": "b", "other": {DEEP}}}', "nested too deeply"),
    "number for text": ('{"prompt": 1, "response": "b"}', "'prompt' must be a string, found int"),
    "no number for text": ('{"prompt": "a", "response": NaN}', "'response' must be a string, found float"),
    "null for text": ('{"prompt": "a", "response": null}', r"found prompt, response \(null\)"),
    "list for text": ('{"prompt": "a", "response": ["b"]}', "'response' must be a string, found list"),
    "number for a turn": (ONE_TURN % "3", "'messages, turn 1' must be a string, found int"),
    "picture in a turn": (ONE_TURN % '[{"type": "image_url", "image_url": "x"}]', "part of the type 'image_url'"),
    "zero byte": ('{"prompt": "a\0", "response": "b"}', "not valid JSON"),
    "a string alone": ('"prompt"', "expected an object, found str"),
    "half a line": ('{"prompt": "a", "resp', "not valid JSON"),
    "template of a wrong type": (ONE_TURN % '"type"', "concatenate str"),
    "template of no attribute": (ONE_TURN % '"attribute"', "nothing|undefined"),
    "template that divides by zero": (ONE_TURN % '"zero"', "division"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_record_costs_itself_only(name: str, folder: Path, tmp_path: Path) -> None:
    """In one line with its place, or counted where it is to be skipped."""
    line, message = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD_LINE, GOOD_LINE, line, GOOD_LINE]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read(folder, path, template="tokenizer")
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 450
    data = read(folder, path, template="tokenizer", on_error="skip")
    assert (len(data), data.num_bad) == (3, 1)
    assert data.first_bad == (str(error.value),)


class Panic(BaseException):
    """An error like pyo3_runtime.PanicException, which is no Exception."""


def test_what_the_tokenizer_cannot_read_is_one_records_fault(folder: Path, tmp_path: Path) -> None:
    """One record among the many that the tokenizer is given at once."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": str(number), "response": "b"}) for number in range(50)]
    path.write_text("\n".join(lines), encoding="utf-8")
    data = DataConfig(train="", tokenizer=str(folder), max_length=99, on_error="skip")
    tokenizer = load_tokenizer(data)
    whole = read_sft(str(path), tokenizer, data, tokenizer.num_ids)
    encode_batch = tokenizer.backend.encode_batch

    def fragile(texts: list[str], parse_special: bool = False) -> list[list[int]]:
        if "17\n" in texts:
            raise Panic("index out of bounds")
        return encode_batch(texts, parse_special)

    tokenizer.backend.encode_batch = fragile  # type: ignore[method-assign]
    found = read_sft(str(path), tokenizer, data, tokenizer.num_ids)
    assert found.first_bad == (f"{path}, line 18: Panic: index out of bounds",)
    expected = [sample.tokens.tolist() for sample in whole.samples]
    assert [sample.tokens.tolist() for sample in found.samples] == expected[:17] + expected[18:]


def test_the_first_bad_records_are_kept_and_all_are_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD_LINE, *["{"] * 12]), encoding="utf-8")
    data = read(folder, path, on_error="skip")
    assert (data.num_bad, len(data.first_bad)) == (12, BadRecords.NUM_SHOWN)


def test_nothing_left_says_why(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    with pytest.raises(UserError, match=r"no sample left.*3 bad, the first: .*line 1: expected the columns"):
        read(folder, path, on_error="skip")


def test_bad_rows_of_a_table(folder: Path, tmp_path: Path) -> None:
    """Nulls, bytes, lists; and text that is not UTF-8, at which the rows beside it cannot be read together."""
    import pyarrow
    from pyarrow import parquet

    buffer = pyarrow.py_buffer(b"a\xffaa")
    offsets = pyarrow.py_buffer(b"".join(number.to_bytes(4, "little") for number in range(5)))
    prompts = pyarrow.StringArray.from_buffers(4, offsets, buffer)
    table = pyarrow.table({"prompt": prompts, "response": pyarrow.array(["b", "b", None, "b"])})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    with pytest.raises(UserError, match=r"a\.parquet, row 2: UnicodeDecodeError"):
        read(folder, path)
    data = read(folder, path, on_error="skip")
    assert (len(data), data.num_bad) == (2, 2)
    assert "row 3: expected the columns" in data.first_bad[1]
    for column in ([b"a"], [["a"]], [1.5]):
        parquet.write_table(pyarrow.table({"prompt": column, "response": ["b"]}), path)
        with pytest.raises(UserError, match=r"row 1: 'prompt' must be a string, found (bytes|list|float)"):
            read(folder, path)


RECORDS = [{"prompt": f"a\u2028{number}\x85\x0b", "response": 'b {[,]} \\ "'} for number in range(3)]
LAYOUTS = {
    "object a line": "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
    "blank lines": "\n\n" + "\n \n\n".join(json.dumps(record) for record in RECORDS) + "\n\n",
    "array on a line": json.dumps(RECORDS),
    "array": json.dumps(RECORDS, indent=2),
    "array with its objects on lines": "[" + ",\n".join(json.dumps(record) for record in RECORDS) + "]",
    "objects over lines": "\n".join(json.dumps(record, indent=4) for record in RECORDS),
    "objects over lines, with commas": ",\n".join(json.dumps(record, indent="\t") for record in RECORDS),
    "lines with commas": ",\n".join(json.dumps(record) for record in RECORDS),
    "one object over lines": json.dumps(RECORDS[0], indent=1),
    "objects on one line": "".join(json.dumps(record) for record in RECORDS),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_json(name: str, line_end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(LAYOUTS[name].replace("\n", line_end).encode())
    expected = RECORDS[:1] if name == "one object over lines" else RECORDS
    assert [record for _, record in read_records(str(path))] == expected


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".txt"])
def test_byte_order_mark_and_compression(suffix: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + f"{GOOD_LINE}\n{GOOD_LINE}\n".encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert list(read_records(str(path))) == [(f"{path}, line {number}", GOOD) for number in (1, 2)]
    if suffix.endswith("gz"):
        path.write_bytes(gzip.compress(content)[:-9])
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read \(Compressed file ended"):
            list(read_records(str(path)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{GOOD_LINE}\n".encode(encoding))
    with pytest.raises(UserError, match=rf"a\.jsonl: is {encoding[:6].upper()}.*iconv"):
        list(read_records(str(path)))


def test_places_of_bad_records_in_other_layouts(tmp_path: Path) -> None:
    """By line, and the records behind them are read."""
    path = tmp_path / "a.json"
    broken = json.dumps([GOOD] * 4, indent=1).replace('"a"', "a", 2).replace("a", '"a"', 1)
    for text, line in ((broken, 6), (broken.strip("[]").replace("},", "}"), 6)):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"a\.json, line {line}: not valid JSON"):
            list(read_records(str(path)))
        bad = BadRecords("skip")
        assert [record for _, record in read_records(str(path), bad)] == [GOOD] * 3
        assert bad.count == 1
    path.write_text(json.dumps([GOOD, 3, GOOD]))
    bad = BadRecords("skip")
    assert [where for where, _ in read_records(str(path), bad)] == [f"{path}, line 1, record {n}" for n in (1, 3)]
    assert bad.first == [f"{path}, line 1, record 2: expected an object, found int"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([GOOD] * 3, indent=1)[:-12], "line 10: not valid JSON"),
        (json.dumps([GOOD] * 3, indent=1)[:-2], "the array has no end; the file is cut off"),
        (json.dumps([GOOD] * 3) + "more", "there is more behind the array's end"),
    ],
)
def test_an_array_that_is_cut_off(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_records(str(path)))
    bad = BadRecords("skip")
    assert len(list(read_records(str(path), bad))) in (2, 3)
    assert bad.count == 1


def test_an_array_on_one_line_cannot_be_read_behind_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD] * 3).replace('"a"', "a", 2).replace("a", '"a"', 1))
    with pytest.raises(UserError, match=r"line 1, record 2: not valid JSON.*what follows cannot be told apart"):
        list(read_records(str(path), BadRecords("skip")))
