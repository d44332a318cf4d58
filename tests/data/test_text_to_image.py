"""Rows of caption and image, and `prepare_data.py task text-to-image`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from pydantic import ValidationError

from megatron_mdm.config.schema import DataConfig
from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.data.image_text import image_row, null_prefix, prefix, suffix
from megatron_mdm.data.sft import SftDataset, read_sft
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.ranks import ProgramResult, run_program_ranks

MMADA = ImageVocabulary()


def test_rows_are_mmadas() -> None:
    """Its task token, bos, caption, eos, soi, codes behind LLaDA's 126,349 ids, eoi; only the image is a target."""
    row = image_row([11, 12], [0, 5, 8191], MMADA)
    assert row.ids == [126_088, 126_080, 11, 12, 126_081, 126_084, 126_349, 126_354, 134_540, 126_085]
    assert (row.span, row.is_cut) == ((6, 9), False)
    assert MMADA.num_ids == 134_541  # below the table's 134,656 rows
    assert null_prefix(MMADA) == [126_088, 126_080, 126_081, 126_084]
    assert suffix(MMADA) == [126_085]


def test_a_long_caption_is_cut_before_eos() -> None:
    """Task token, bos, caption and eos are 513 places at most: max_seq_length + 1."""
    text = prefix(list(range(600)), MMADA)[:-1]
    assert len(text) == 513
    assert (text[:3], text[-2:]) == ([126_088, 126_080, 0], [509, 126_081])
    assert image_row(list(range(511)), [0], MMADA).is_cut
    assert not image_row(list(range(510)), [0], MMADA).is_cut


@pytest.mark.parametrize("codes", [[], [-1], [8192]])
def test_codes_outside_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 8191"):
        image_row([], codes, MMADA)


def test_ids_do_not_collide() -> None:
    with pytest.raises(ValidationError, match="eos 126349 is the id of an image code"):
        ImageVocabulary(eos=126_349)
    small = ImageVocabulary.behind(num_ids=24, eos=3, num_codes=256)
    ids = [small.task, small.bos, small.eos, small.image_begin, small.image_end, *range(small.first_id, small.num_ids)]
    assert len({*ids}) == 5 + 256
    assert min({*ids} - {3}) == 24


def write_tokenizer(path: Path, num_words: int) -> Path:
    vocabulary = {"<unk>": 0, "<mask>": 1, "<pad>": 2, "</s>": 3, **{f"w{n}": n for n in range(4, num_words)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(path))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json", 20)


def record(number: int, **changes: Any) -> dict[str, Any]:
    codes = {"image_codes": [number % 64, 63], "codes_of": "a" * 64, "num_codes": 64}
    return {"caption": f"w{4 + number % 16} w5", **codes, **changes}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)


def prepared(paths: list[str], tokenizer: Path, output: Path, *arguments: str) -> ProgramResult:
    program = ["task", "text-to-image", *paths, "--tokenizer", str(tokenizer), "--output", str(output), *arguments]
    return run_program_ranks("tools/prepare_data.py", program)[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_papers_split(tokenizer: Path, tmp_path: Path) -> None:
    """As many of each file, 9 : 1, and the test behind them; training reads the rows."""
    paths = [write(tmp_path / f"{n}.jsonl", [record(100 * n + m) for m in range(40)]) for n in range(2)]
    result = prepared(paths, tokenizer, tmp_path / "out", "--vocabulary", "behind", "--samples", "60", "--test", "11")
    assert result.exit_code == 0, result.stderr
    train, validation, test = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (54, 6, 11)
    vocabulary = ImageVocabulary.model_validate_json((tmp_path / "out" / "vocabulary.json").read_text())
    assert vocabulary == ImageVocabulary.behind(num_ids=20, eos=3, num_codes=64)
    first = [row["input_ids"][row["spans"][0][0]] - vocabulary.first_id for row in test]
    assert first == [*(n % 64 for n in range(30, 36)), *(n % 64 for n in range(130, 135))]
    assert all(row["codes_of"] == "a" * 64 for row in train)
    config = DataConfig(train=str(tmp_path / "out" / "train.jsonl"), tokenizer=str(tokenizer), max_length=20)
    data = read_sft(config.train, load_tokenizer(config), config, vocabulary.num_ids)
    assert isinstance(data, SftDataset)
    assert data.num_eligible().tolist() == [2] * 54


def test_too_few_records_and_cut_captions_are_said(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(0), record(1, caption="w5 " * 511), record(2)])
    result = prepared([path], tokenizer, tmp_path / "out", "--vocabulary", "behind")
    assert result.exit_code == 0, result.stderr
    assert f"warning: {path}: 3 of 5,000 train samples are there\n" in result.stderr
    assert f"warning: {path}: 0 of 100 test samples are there\n" in result.stderr
    assert "warning: 1 captions were longer than 510 tokens and were cut\n" in result.stderr
    assert not (tmp_path / "out" / "test.jsonl").exists()
    everything = prepared(
        [path], tokenizer, tmp_path / "all", "--vocabulary", "behind", "--samples", "0", "--test", "0"
    )
    assert "train samples" not in everything.stderr


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no caption": ([record(0, caption=None)], "a.jsonl, line 2: expected a string 'caption' and a list of integers"),
    "no codes": ([record(0, image_codes=None)], "line 2: expected a string 'caption' and a list of integers"),
    "a text": ([record(0, image_codes=[1, "2"])], "line 2: expected a string 'caption' and a list of integers"),
    "true": ([record(0, image_codes=[1, True])], "line 2: expected a string 'caption' and a list of integers"),
    "empty": ([record(0, image_codes=[])], "line 2: image codes must be integers from 0 to 63, at least one"),
    "too large": ([record(0, image_codes=[64])], "line 2: image codes must be integers from 0 to 63"),
    "another tokenizer": (
        [record(0, codes_of="b" * 64)],
        "line 2: codes of another image tokenizer (bbbbbbbbbbbb, 64 codes) than those before (aaaaaaaaaaaa, 64 codes)",
    ),
    "not said whose": ([{"caption": "w4", "image_codes": [1]}], "(not said, 8192 codes) than those before (aaaa"),
    "odd number": ([record(0, num_codes="64")], "line 2: 'codes_of' must be a text and 'num_codes' a positive number"),
}


def test_bad_records_are_one_line(tokenizer: Path, tmp_path: Path) -> None:
    for name, (records, message) in BAD.items():
        path = write(tmp_path / "a.jsonl", [record(7), *records])
        result = prepared([path], tokenizer, tmp_path / "out", "--vocabulary", "behind")
        assert result.exit_code == 1, name
        assert message in result.stderr.splitlines()[-1], name
    assert not (tmp_path / "out").exists()


def test_mmadas_ids_are_checked(tokenizer: Path, tmp_path: Path) -> None:
    """An edited tokenizer would shift every image id, and codes of another tokenizer mean nothing to the model."""
    path = write(tmp_path / "a.jsonl", [record(0)])
    message = "the image codes are of 64, MMaDA's of 8192; --vocabulary behind is for models from scratch"
    assert message in prepared([path], tokenizer, tmp_path / "out").stderr
    large = write_tokenizer(tmp_path / "large.json", 126_350)
    result = prepared([path], large, tmp_path / "out")
    assert result.exit_code == 1
    assert "its 126350 ids reach into the image codes, which begin at 126349" in result.stderr
