"""Special tokens and templates that several files name: which is taken, what is told, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.checkpoint.convert import ImportOptions, export_checkpoint, import_checkpoint
from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_mdm.checkpoint.imported_tokens import special_tokens
from megatron_mdm.checkpoint.initial_tokens import contradictions, with_initial_tokens
from megatron_mdm.checkpoint.load import Overrides, run_config, run_tokenizer
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import validate
from megatron_mdm.data.tokenizer import load_tokenizer, resolve_vocabulary
from megatron_mdm.training.resume import as_the_run_began
from tests.checkpoint.huggingface_models import VOCAB, write_checkpoint
from tests.checkpoint.test_bad_checkpoints import change_json
from tests.small import small_config

# Ids of the tokenizer's special tokens; the table has 60 rows.
SPECIAL = {"<pad>": 0, "</s>": 1, "<|im_end|>": 40, "<|mask|>": 41, "<|eot_id|>": 42, "<s>": 43}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


def write_tokenizer(folder: Path, special: dict[str, int] = SPECIAL, **settings: Any) -> None:
    words = {f"w{index}": index for index in range(max(special.values())) if index not in special.values()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": token_id, "content": text, "special": True, **flags} for text, token_id in special.items()]
    model = {"type": "WordLevel", "vocab": {**words, **special}, "unk_token": "w20"}
    described = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    made = {family: write_checkpoint(folder / family, family, shard_size="1GB") for family in ("llada", "qwen2")}
    for path in made.values():
        (path / "generation_config.json").unlink()
    return made


@pytest.fixture
def llada(originals: dict[str, Path], tmp_path: Path) -> Path:
    """config.json: mask 57, eos 1, pad 0."""
    folder = Path(shutil.copytree(originals["llada"], tmp_path / "llada"))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def qwen2(originals: dict[str, Path], tmp_path: Path) -> Path:
    """An autoregressive one. config.json: eos 1, pad 0."""
    folder = Path(shutil.copytree(originals["qwen2"], tmp_path / "qwen2"))
    write_tokenizer(folder)
    return folder


def chosen(folder: Path, **tokens: str) -> tuple[tuple[int, ...], str]:
    """((mask, pad, eos and further end tokens), what is told) of an import."""
    special = special_tokens(HuggingFaceCheckpoint.open(folder), tokens)
    assert not any("\n" in note for note in special.notes)
    return (special.mask_id, special.pad_id, special.eos_id, *special.end_ids), "\n".join(special.notes)


def imported(folder: Path, **tokens: str) -> tuple[RunConfig, str]:
    """(the run's configuration, what was told)"""
    run = folder.parent / "imported"
    shutil.rmtree(run, ignore_errors=True)
    notes = import_checkpoint(folder, run, ImportOptions(1, 1, "auto", 10**9, tokens))
    return load_config(run / "config.yaml"), "\n".join(notes)


def refused(folder: Path, *parts: str, **tokens: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(folder, **tokens)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_import_takes_the_mask_token_that_the_tokenizers_files_name(qwen2: Path) -> None:
    write_tokenizer(qwen2, mask_token="<|mask|>")
    ids, told = chosen(qwen2)
    assert ids == (41, 0, 1)
    assert "mask token 41: by " in told
    (qwen2 / "tokenizer_config.json").unlink()
    (qwen2 / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<|eot_id|>"}}))
    ids, told = chosen(qwen2)
    assert ids[0] == 42
    assert "special_tokens_map.json (<|eot_id|>)" in told
    assert "though" in told  # <|mask|> is there by name


def test_import_takes_a_mask_token_by_its_name_before_it_takes_a_spare_row(qwen2: Path) -> None:
    assert chosen(qwen2)[0][0] == 41
    write_tokenizer(qwen2, {**SPECIAL, "[MASK]": 39})
    refused(qwen2, "several tokens could be the mask token ([MASK] 39, <|mask|> 41)")
    assert chosen(qwen2, mask="[MASK]")[0][0] == 39
    write_tokenizer(qwen2, {text: token for text, token in SPECIAL.items() if text != "<|mask|>"})
    ids, told = chosen(qwen2)
    assert ids[0] == 44
    assert "mask token 44: a spare row" in told


def test_a_named_token_that_the_tokenizer_lacks_is_told(llada: Path) -> None:
    write_tokenizer(llada, mask_token="<MASK>", pad_token="[PAD]")
    ids, told = chosen(llada)
    assert ids == (57, 0, 1)
    for name, text in (("mask", "<MASK>"), ("pad", "[PAD]")):
        assert f"{name} token: {llada}/tokenizer_config.json names '{text}', which the tokenizer lacks" in told


def test_a_mask_token_that_is_listed_or_not_marked_as_special_is_found_by_its_name(qwen2: Path) -> None:
    write_tokenizer(qwen2, additional_special_tokens=["<|mask|>"])
    change_json(qwen2 / "tokenizer.json", added_tokens=[])  # all of them are in the vocabulary, as words
    assert chosen(qwen2)[0][0] == 41
    (qwen2 / "tokenizer_config.json").unlink()
    assert chosen(qwen2)[0][0] == 41


def test_two_mask_tokens_are_refused_with_both(llada: Path) -> None:
    write_tokenizer(llada, mask_token="<|mask|>")
    named = ("57 by ", "config.json (mask_token_id)", "but 41 by ", "tokenizer_config.json (<|mask|>)", "--mask-token")
    refused(llada, *named)
    ids, told = chosen(llada, mask="57")
    assert ids[0] == 57
    assert "mask token 57, as was asked for, though it is 41 by " in told
    ids, told = chosen(llada, mask="<|mask|>")
    assert ids[0] == 41
    assert "mask token 41, as was asked for, though it is 57 by " in told


def test_end_tokens_of_all_files_end_a_response(llada: Path) -> None:
    """As Llama-3-Instruct's and Qwen2.5-Instruct's files have them."""
    (llada / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 42], "pad_token_id": 0}))
    write_tokenizer(llada, eos_token="<|im_end|>")
    ids, told = chosen(llada)
    assert ids == (57, 0, 1, 42, 40)
    assert "eos token: 1 by " in told
    assert "but 40 by " in told
    change_json(llada / "config.json", eos_token_id=[42, 40])
    assert chosen(llada)[0] == (57, 0, 42, 40, 1)


@pytest.mark.parametrize(("stated", "expected"), [(-1, 1), (None, 1), ([], 1), (40, 40), ([40], 40)])
def test_a_padding_token_that_means_none(stated: Any, expected: int, llada: Path) -> None:
    change_json(llada / "config.json", pad_token_id=stated)
    assert chosen(llada)[0][1] == expected


def test_padding_tokens_may_differ_and_that_is_told(llada: Path) -> None:
    write_tokenizer(llada, pad_token="<|im_end|>")
    ids, told = chosen(llada)
    assert ids[1] == 0
    assert "pad token: 0 by " in told
    assert "but 40 by " in told
    change_json(llada / "config.json", pad_token_id=None)
    (llada / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|eot_id|>"}))
    assert chosen(llada)[0][1] == 40  # tokenizer_config.json goes before it


@pytest.mark.parametrize("value", ["1", True, 1.0, [1, "2"], {"id": 1}, [[1]]])
@pytest.mark.parametrize("name", ["mask", "pad", "eos"])
def test_an_id_that_is_none_is_named(name: str, value: Any, llada: Path) -> None:
    change_json(llada / "config.json", **{f"{name}_token_id": value})
    refused(llada, f"config.json: '{name}_token_id' must be an id or a list of ids, got {json.dumps(value)}")
    position = ["mask", "pad", "eos"].index(name)
    assert chosen(llada, **{name: "40"})[0][position] == 40


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": []}, "no file names the end token ('eos_token_id'); give it with --eos-token"),
        ({"eos_token_id": -1}, "no file names the end token"),
        ({"eos_token_id": 60}, "eos token 60 is outside the table of 60 rows"),
        ({"pad_token_id": 999}, "pad token 999 is outside the table of 60 rows"),
        ({"mask_token_id": 61}, "mask token 61 is beyond the table of 60 rows"),
        ({"mask_token_id": [3, 4]}, "the mask token is 3, 4 by "),
        ({"mask_token_id": 1}, "1 is both the mask token and the eos token"),
    ],
)
def test_ids_that_cannot_be_used_are_named(changes: dict[str, Any], expected: str, llada: Path) -> None:
    change_json(llada / "config.json", **changes)
    refused(llada, expected)


def test_end_tokens_outside_the_table_are_left_out_and_told(llada: Path) -> None:
    change_json(llada / "config.json", eos_token_id=[1, 70])
    ids, told = chosen(llada)
    assert ids == (57, 0, 1)
    assert "eos token 70 is outside the table of 60 rows and left out" in told


def test_import_takes_the_folders_chat_template(llada: Path) -> None:
    assert "template plain: the folder has no chat template" in imported(llada)[1]
    write_tokenizer(llada, chat_template=TEMPLATE)
    config, told = imported(llada)
    assert config.data.template == "tokenizer"
    assert "template tokenizer: the folder's chat template" in told
    (llada / "tokenizer_config.json").unlink()
    (llada / "chat_template.jinja").write_text(TEMPLATE)
    assert imported(llada)[0].data.template == "tokenizer"
    (llada / "chat_template.jinja").write_text("{% for %}")
    config, told = imported(llada)
    assert config.data.template == "plain"
    assert "template plain: the folder's chat template cannot be used" in told


def ids(config: RunConfig) -> tuple[int | str, ...]:
    return config.data.mask_token, config.data.pad_token, config.data.eos_token, *config.data.end_tokens


def start(folder: Path, data: Sequence[str] = (), **model: Any) -> tuple[RunConfig, str]:
    """A configuration as a user writes it, with model.init_from, and what is told."""
    values = small_config(folder.parent, model={"init_from": str(folder), "vocab_size": VOCAB, **model}).model_dump()
    values["data"] = {"train": "a.jsonl", "max_length": 64, "tokenizer": str(folder / "tokenizer.json")}
    path = folder.parent / "my.yaml"
    path.write_text(json.dumps(json.loads(json.dumps(values))))
    written = load_config(path, [f"data.{key}" for key in data])
    validate(written, 1)
    config, notes = with_initial_tokens(written)
    assert not any("\n" in note for note in notes)
    return config, "\n".join(notes)


def test_a_run_takes_the_tokens_that_its_configuration_leaves_open(llada: Path) -> None:
    change_json(llada / "config.json", eos_token_id=[42, 1])
    config, told = start(llada)
    assert ids(config) == (57, "<pad>", 42, 1)  # <pad> is 0, as in config.json
    assert f"mask token 57, by {llada}/config.json (mask_token_id), since 'data.mask_token' is not set" in told
    assert "eos token 42, by " in told
    assert load_tokenizer(config.data).mask_id == 57
    again = llada.parent / "again.yaml"
    again.write_text(dump_config(config))
    assert with_initial_tokens(load_config(again)) == (load_config(again), [])


def test_a_run_keeps_what_its_configuration_sets_and_tells_what_contradicts(llada: Path) -> None:
    config, told = start(llada, ["mask_token=<|mask|>", "eos_token=40", "pad_token=<new>"])
    assert ids(config) == ("<|mask|>", "<new>", 40)
    assert f"mask token 41 (<|mask|>), by 'data.mask_token', though it is 57 by {llada}/config.json" in told
    assert "eos token 40, by 'data.eos_token', though it is 1 by " in told
    assert "pad token <new> (a new id), by 'data.pad_token', though it is 0 by " in told
    assert start(llada, ["mask_token=57", "eos_token=</s>", "pad_token=0"])[1] == ""
    change_json(llada / "config.json", eos_token_id=[42, 1])
    config, told = start(llada, ["mask_token=57", "eos_token=</s>", "pad_token=0"])
    assert (ids(config), told) == ((57, 0, "</s>", 42), "")  # any of its end tokens; responses end at the others, too
    assert ids(start(llada, ["eos_token=</s>", "end_tokens=[7]"])[0])[-2:] == ("</s>", 7)


def test_two_mask_tokens_of_a_start_are_refused_unless_one_is_chosen(llada: Path) -> None:
    write_tokenizer(llada, mask_token="<|mask|>")
    with pytest.raises(UserError, match=r"the mask token is 57 by .*, but 41 by .*choose one with 'data.mask_token'"):
        start(llada)
    assert ids(start(llada, ["mask_token=41"])[0])[0] == 41


def test_a_run_takes_the_chat_template_that_its_configuration_leaves_open(llada: Path) -> None:
    assert start(llada)[0].data.template == "plain"
    write_tokenizer(llada, chat_template=TEMPLATE)
    config, told = start(llada)
    assert config.data.template == "tokenizer"
    assert f"template tokenizer, that of {llada}, since 'data.template' is not set" in told
    config, told = start(llada, ["template=plain"])
    assert config.data.template == "plain"
    assert "template" not in told


def test_the_start_may_be_a_run(llada: Path) -> None:
    imported(llada)
    run = llada.parent / "imported"
    config, told = start(run, [f"tokenizer={llada}/tokenizer.json"])
    assert ids(config)[0] == 57
    assert f"mask token 57, by {run}/config.yaml (data.mask_token), since 'data.mask_token' is not set" in told
    told = start(run, [f"tokenizer={llada}/tokenizer.json", "mask_token=41"])[1]
    assert f"mask token 41, by 'data.mask_token', though it is 57 by {run}/config.yaml" in told


def test_the_table_has_the_starts_rows_where_the_configuration_leaves_them_open(llada: Path) -> None:
    assert start(llada, vocab_size="tokenizer")[0].model.vocab_size == VOCAB
    write_tokenizer(llada, {**SPECIAL, "<|last|>": 59})
    grown = start(llada, ["eos_token=<new>"], vocab_size="tokenizer")[0]
    assert resolve_vocabulary(grown.model, load_tokenizer(grown.data)).vocab_size == VOCAB + 1


def test_token_ids_alone_need_no_special_tokens_beside_a_start(llada: Path) -> None:
    config, _ = start(llada, ["tokenizer="], vocab_size="tokenizer")
    assert ids(config) == (57, 0, 1)
    assert config.model.vocab_size == VOCAB
    change_json(llada / "config.json", mask_token_id=None)
    config, _ = start(llada, ["tokenizer=", "pad_token=0"])
    assert ids(config) == (41, 0, 1)  # <|mask|> of its tokenizer
    (llada / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"'data\.tokenizer' is empty, so 'data\.mask_token' must be a token id"):
        load_tokenizer(start(llada, ["tokenizer="])[0].data)


def test_an_export_has_the_tokenizer_that_the_run_was_trained_with(llada: Path) -> None:
    write_tokenizer(llada, chat_template=TEMPLATE)
    config, _ = imported(llada)
    run = llada.parent / "imported"
    out = llada.parent / "out"
    export_checkpoint(NativeCheckpoint.open(run), out, "auto", "auto", 10**9)
    assert (out / "tokenizer.json").read_bytes() == (llada / "tokenizer.json").read_bytes()
    assert (out / "tokenizer_config.json").exists()
    other = llada.parent / "other.json"
    shutil.copyfile(llada / "tokenizer.json", other)
    change_json(other, normalizer={"type": "Lowercase"})
    changed = config.data.model_copy(update={"tokenizer": str(other), "template": "plain"})
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"data": changed})))
    export_checkpoint(NativeCheckpoint.open(run), llada.parent / "again", "auto", "auto", 10**9)
    assert (llada.parent / "again" / "tokenizer.json").read_bytes() == other.read_bytes()
    assert not (llada.parent / "again" / "tokenizer_config.json").exists()


def test_a_run_that_contradicts_the_files_it_keeps_says_so(llada: Path) -> None:
    config, _ = imported(llada)
    run = llada.parent / "imported"
    assert contradictions(run, load_tokenizer(config.data)) == []
    changed = config.data.model_copy(update={"mask_token": 41, "eos_token": 40})
    mask, eos = contradictions(run, load_tokenizer(changed))
    assert mask.startswith("mask token 41, by the run's config.yaml, though it is 57 by ")
    assert eos.startswith("eos token 40, by the run's config.yaml, though it is 1 by ")


def test_a_run_is_read_with_another_template_or_other_tokens(llada: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As generate and evaluate do with data.… on the command line."""
    write_tokenizer(llada, chat_template=TEMPLATE)
    imported(llada)
    run = llada.parent / "imported"
    overrides = Overrides.of(["steps=8", "data.template=plain", "data.eos_token=40", "data.end_tokens=[1, 42]"])
    assert overrides.others == ["steps=8"]
    config = run_config(run, overrides=overrides)
    assert (config.data.template, config.data.eos_token, config.data.end_tokens) == ("plain", 40, (1, 42))
    capsys.readouterr()
    assert run_tokenizer(run, config).eos_id == 40
    assert capsys.readouterr().err.startswith("eos token 40, by the run's config.yaml, though it is 1 by ")
    run_tokenizer(run, run_config(run))
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"'data\.train' cannot be set here; of 'data', only tokenizer, template"):
        Overrides.of(["data.train=x"])


def test_a_resumed_run_keeps_what_it_took_from_a_start_that_is_gone(llada: Path) -> None:
    config, _ = start(llada)
    folder = Path(config.checkpoint.directory)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    written = load_config(llada.parent / "my.yaml")
    shutil.rmtree(llada)
    with pytest.raises(UserError, match="no such folder"):
        with_initial_tokens(written)
    resumed, notes = with_initial_tokens(as_the_run_began(written))
    assert ids(resumed) == ids(config)
    assert notes == []


def test_the_family_speaks_where_no_file_does(llada: Path) -> None:
    change_json(llada / "config.json", mask_token_id=None)
    write_tokenizer(llada, {text: token for text, token in SPECIAL.items() if text != "<|mask|>"})
    assert "mask token 44: a spare row" in chosen(llada)[1]  # 126336 is beyond this small table
