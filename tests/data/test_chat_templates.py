"""A tokenizer's own chat template: the text is transformers'; answers and the tokens that end them are learnt."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from pydantic import ValidationError

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically, write_json
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.chat_template import ChatTemplate
from megatron_mdm.data.conversation import Message, Piece, Template, TemplateSource
from megatron_mdm.data.sft import SftDataset, encode_prompt, read_sft, split_validation
from megatron_mdm.data.templates import TEMPLATES
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mdm.training.inputs import agreement, resolve
from megatron_mdm.training.resume import INPUTS, as_the_run_began, check_same_run, contents
from tests.data.chat_templates import CASES, CONVERSATIONS, SPECIAL_TOKENS, source
from tests.small import small_config

# It always opens the next answer, and has nothing that ends one.
HEADER_ONLY = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
CHATML = source("chatml")
CHATML_MARKED = source("chatml_marked")
ANSWERS = {
    name: [m["content"] for m in messages if m["role"] == "assistant"] for name, messages in CONVERSATIONS.items()
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer.json with everyone's special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=256,
        show_progress=False,
    )
    model.train_from_iterator(["a"], trainer)
    return model.to_str()


def folder_of(template: Any, tokens: dict[str, Any], vocabulary: str, folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    settings = {**tokens, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(vocabulary: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, case in CASES.items():
        made[name] = folder_of(case.template, case.tokens, vocabulary, tmp_path_factory.mktemp("template"))
    return made


def transformers_text(folder: Path, messages: list[dict[str, str]], add_generation_prompt: bool) -> str | None:
    """None where the template refuses."""
    from jinja2.exceptions import TemplateError
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError:
        return None
    assert isinstance(text, str)
    return text


def read(
    folder: Path, turns: list[dict[str, Any]], copies: int = 1, eos_token: str = "<|im_end|>"
) -> tuple[SftDataset, Tokenizer]:
    path = folder / "records.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * copies, encoding="utf-8")
    data = DataConfig(train="", tokenizer=str(folder), template="tokenizer", eos_token=eos_token, max_length=200)
    tokenizer = load_tokenizer(data)
    return read_sft(str(path), tokenizer, data, tokenizer.num_ids), tokenizer


def as_messages(turns: Sequence[dict[str, Any]]) -> list[Message]:
    return [Message(turn["role"], turn["content"]) for turn in turns]


def template_of(folder: Path, name: str = "tokenizer") -> Template:
    return TEMPLATES[name](TemplateSource(str(folder), SPECIAL_TOKENS))


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def learnt(samples: Sequence[Sequence[Piece]]) -> list[str]:
    return [piece.text for pieces in samples for piece in pieces if piece.is_target]


@pytest.mark.parametrize("name", CASES)
def test_text_is_that_of_transformers(name: str, folders: dict[str, Path]) -> None:
    ours = ChatTemplate.load(folders[name])
    for turns in CONVERSATIONS.values():
        for messages in (turns, turns[:-1]):
            for prompt in (True, False):
                expected = transformers_text(folders[name], messages, prompt)
                if expected is None:
                    with pytest.raises(ValueError, match="the chat template refuses it"):
                        ours(as_messages(messages), prompt)
                else:
                    assert ours(as_messages(messages), prompt) == expected


@pytest.mark.parametrize("name", CASES)
def test_answers_and_what_ends_them_are_learnt(name: str, folders: dict[str, Path]) -> None:
    """And nothing behind it. What is given is a beginning of transformers' text of the same messages."""
    case = CASES[name]
    template = template_of(folders[name])
    assert template.end_tokens == (case.end.strip(),)
    for conversation in ("one turn", "two turns", "system", "unicode"):
        turns = CONVERSATIONS[conversation]
        last = ANSWERS[conversation][-1]
        whole = transformers_text(folders[name], turns, False)
        if whole is None:
            continue
        samples = template.samples(as_messages(turns), last_only=False)
        answers = [case.before + answer + case.end for answer in ANSWERS[conversation]]
        assert learnt(samples) == answers
        assert len(samples) == (case.num_samples if len(answers) == 2 else 1)
        assert [piece.text for piece in samples[-1] if piece.is_target][-1].endswith(last + case.end)
        assert samples[-1][-1].is_target
        (only,) = template.samples(as_messages(turns), last_only=True)
        assert joined(only) == joined(samples[-1])
        assert learnt([only]) == answers[-1:]
        if name != "mistral":  # which forgets the system prompt as soon as the answer is there
            assert whole.startswith(joined(only))
        prompt = transformers_text(folders[name], turns[:-1], True)
        assert prompt is not None
        assert joined(template.prompt(as_messages(turns[:-1]))) == prompt
        assert prompt.startswith(joined(only)[: -len(answers[-1])])


def test_an_answer_is_learnt_behind_the_prompt_that_generation_sees(folders: dict[str, Path]) -> None:
    """With a template that shows the system prompt in the last question only."""
    turns = CONVERSATIONS["system"]
    (pieces,) = template_of(folders["mistral"]).samples(as_messages(turns), last_only=False)
    assert joined(pieces) == "<s>[INST] Be brief.\n\nWho?[/INST] Me.</s>"
    assert transformers_text(folders["mistral"], turns, False) == "<s>[INST] Who?[/INST] Me.</s>"


def test_thoughts_that_later_turns_drop_are_learnt_in_their_own_turn(folders: dict[str, Path]) -> None:
    first, second = template_of(folders["qwen3"]).samples(as_messages(CONVERSATIONS["thoughts"]), last_only=False)
    assert learnt([first]) == ["<think>\nadd\n</think>\n\n2<|im_end|>"]
    assert learnt([second]) == ["<think>\nagain\n</think>\n\n4<|im_end|>"]
    assert "add" not in joined(second)
    assert "<|im_start|>assistant\n2<|im_end|>\n" in joined(second)


@pytest.mark.parametrize("name", ["llada", "mmada"])
def test_built_in_formats_are_upstreams(name: str, folders: dict[str, Path]) -> None:
    """Text and what of it is learnt, against the template of the same model as a chat template."""
    ours = template_of(folders[name], name)
    theirs = template_of(folders[name])
    assert ours.end_tokens == theirs.end_tokens == ("<|eot_id|>",)
    for turns in CONVERSATIONS.values():
        messages = as_messages(turns)
        for last_only in (False, True):
            (pieces,), (expected,) = ours.samples(messages, last_only), theirs.samples(messages, last_only)
            assert joined(pieces) == joined(expected)
            assert "".join(learnt([pieces])) == "".join(learnt([expected]))
        assert joined(ours.prompt(messages[:-1])) == transformers_text(folders[name], turns[:-1], True)


def test_marks_of_a_template_are_those_of_transformers(folders: dict[str, Path]) -> None:
    """{% generation %}: the tokens that transformers' assistant mask names are learnt."""
    from transformers import PreTrainedTokenizerFast

    folder = folders["chatml, marked"]
    turns = CONVERSATIONS["two turns"]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    sample = read(folder, turns)[0].samples[0]
    length = len(sample.tokens)  # nothing stands behind the last answer
    assert sample.tokens.tolist() == theirs["input_ids"][:length]
    assert sample.eligible.tolist() == [bool(mark) for mark in theirs["assistant_masks"][:length]]
    assert not any(theirs["assistant_masks"][length:])


@pytest.mark.parametrize("name", ["llama-2", "zephyr", "mistral", "llada"])
@pytest.mark.parametrize("spaces", ["Prepend", "first", "always", "never"])
def test_tokens_are_those_of_transformers(spaces: str, name: str, tmp_path: Path) -> None:
    """With tokenizers that put a space before a text's first word, as Llama 2's: an answer is no text of its own."""
    from transformers import PreTrainedTokenizerFast

    case = CASES[name]
    turns = CONVERSATIONS["two turns"]
    folder = folder_of(case.template, case.tokens, with_spaces(spaces).to_str(), tmp_path)
    expected = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(turns, return_dict=False)
    data, tokenizer = read(folder, turns, eos_token="</s>")
    tokens = data.samples[0].tokens.tolist()
    learnt_ids = data.samples[0].tokens[data.samples[0].eligible]
    assert tokens == expected[: len(tokens)]
    assert tokenizer.decode(learnt_ids).strip() == "Me."
    prompt = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        turns[:1], return_dict=False, add_generation_prompt=True
    )
    assert encode_prompt(turns[0]["content"], tokenizer) == prompt


def with_spaces(how: str) -> tokenizers.Tokenizer:
    """A vocabulary of characters in which ▁ is a space, put before the first word (prepend_scheme), or before every
    stretch between special tokens (the normalizer Prepend)."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABIMNSTUW<>|/[]?.\n_"
    pieces = [*dict.fromkeys([*SPECIAL_TOKENS, "<unk>", *letters]), "▁M", "▁S", "▁W", "\n\n"]
    model = tokenizers.models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "M"), ("▁", "S"), ("▁", "W"), ("\n", "\n")],
        unk_token="<unk>",
    )
    made = tokenizers.Tokenizer(model)
    if how == "Prepend":
        replace = tokenizers.normalizers.Replace(" ", "▁")
        made.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), replace])
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=how, split=False)
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(SPECIAL_TOKENS)
    return made


def test_a_mark_without_the_end_of_turn_is_told(vocabulary: str, tmp_path: Path) -> None:
    shorter = CHATML_MARKED.replace(" + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    (warning,) = template_of(folder_of(shorter, {}, vocabulary, tmp_path)).warnings
    assert "leaves out <|im_end|>, which ends an answer" in warning


def test_other_things_a_user_should_know(folders: dict[str, Path], vocabulary: str, tmp_path: Path) -> None:
    told = {name: template_of(folder).warnings for name, folder in folders.items()}
    (thinking,) = told.pop("deepseek-r1")
    assert "ends a prompt for generation with '<think>\\n'" in thinking
    (empty_thought,) = told.pop("qwen3 without thoughts")
    assert "'<think>\\n\\n</think>\\n\\n'" in empty_thought
    assert not any(told.values())
    endless = template_of(folder_of(CHATML.replace("<|im_end|>", ""), {}, vocabulary, tmp_path))
    assert endless.end_tokens == ()
    assert "puts no special token behind an answer" in endless.warnings[0]
    header_only = template_of(folder_of(HEADER_ONLY, {}, vocabulary, tmp_path))
    assert header_only.end_tokens == ()
    assert learnt(header_only.samples(as_messages(CONVERSATIONS["two turns"]), last_only=False)) == ["Me.", "So."]
    grumpy = template_of(folder_of("{{ raise_exception('no') }}", {}, vocabulary, tmp_path))
    assert "'data.end_tokens'" in grumpy.warnings[0]


@pytest.mark.parametrize(
    "condition",
    ["messages[0].role != 'system'", "messages|length > 3", "messages[-1].role == 'user' and messages|length > 2"],
)
def test_what_ends_an_answer_is_found_where_some_conversations_are_refused(
    condition: str, vocabulary: str, tmp_path: Path
) -> None:
    fussy = f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    for name in ("chatml", "llada"):
        template = template_of(folder_of(fussy + source(name), CASES[name].tokens, vocabulary, tmp_path))
        assert template.end_tokens == (CASES[name].end,)
        assert template.warnings == ()


def test_the_date_is_that_of_the_run(folders: dict[str, Path]) -> None:
    messages = as_messages(CONVERSATIONS["one turn"])
    path = str(folders["llama-3.1"])
    old = TEMPLATES["tokenizer"](TemplateSource(path, SPECIAL_TOKENS, "2021-03-04"))
    assert old.date == "2021-03-04"
    assert "Today Date: 04 Mar 2021\n" in joined(old.prompt(messages[:1]))
    theirs = transformers_text(folders["llama-3.1"], CONVERSATIONS["one turn"][:1], True)
    assert theirs is not None
    assert "2021" not in theirs  # who asks transformers in this process gets its own clock
    new = TEMPLATES["tokenizer"](TemplateSource(path, SPECIAL_TOKENS))
    assert new.date == datetime.date.today().isoformat()
    expected = transformers_text(folders["llama-3.1"], CONVERSATIONS["one turn"][:1], True)
    assert joined(new.prompt(messages[:1])) == expected
    assert template_of(folders["llada"]).date == ""


def test_a_resumed_run_keeps_its_day_and_its_template(folders: dict[str, Path], tmp_path: Path) -> None:
    """config.yaml holds the day on which the run began, where the template names it. Another template is refused."""
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"messages": CONVERSATIONS["one turn"]}) + "\n", encoding="utf-8")
    today = datetime.date.today().isoformat()
    for name, begun in (("llama-3.1", today), ("llama-3", "today")):
        data = {"train": str(records), "tokenizer": str(folders[name]), "template": "tokenizer", "max_length": 200}
        special = {"eos_token": "<|eot_id|>", "mask_token": "<mask>", "pad_token": "<pad>"}
        config = small_config(tmp_path / name, data={**data, **special}, model={"vocab_size": 400})
        first, read_first = resolve(config)
        assert first.data.template_date == begun
        assert as_the_run_began(config) == config  # nothing has begun
        earlier = first.data.model_copy(update={"template_date": "2021-03-04"} if begun == today else {})
        saved = tmp_path / name / "run" / "config.yaml"
        write_atomically(saved, dump_config(first.model_copy(update={"data": earlier})))
        again, read_again = resolve(as_the_run_began(config))
        write_json(saved.with_name(INPUTS), contents(first, read_first))
        check_same_run(saved.parent, again, read_again)
        changed = template_of(folders["llada" if name == "llama-3" else "llama-3"])
        other = dataclasses.replace(read_again, tokenizer=dataclasses.replace(read_again.tokenizer, template=changed))
        assert agreement(again, other) != agreement(again, read_again)
        with pytest.raises(UserError, match="the file has changed since the run"):
            check_same_run(saved.parent, again, other)
        texts = [run.tokenizer.decode_all(run.train.samples[0].tokens) for run in (read_first, read_again)]
        assert ("04 Mar 2021" in texts[1]) == (begun == today)
        assert (texts[0] == texts[1]) == (begun == "today")
    with pytest.raises(ValidationError, match="must be a day as YYYY-MM-DD, or 'today'"):
        DataConfig(train="", max_length=9, template_date="4 March")


def test_the_place_of_an_answer_does_not_depend_on_what_it_says(folders: dict[str, Path]) -> None:
    """It begins like the thought that only a prompt for generation has."""
    turns = [Message("user", "Who?"), Message("assistant", "<b>Me.")]
    (pieces,) = template_of(folders["qwen3 without thoughts"]).samples(turns, last_only=False)
    assert learnt([pieces]) == ["<b>Me.<|im_end|>"]


def test_a_conversation_may_begin_with_an_answer(folders: dict[str, Path]) -> None:
    turns = [Message("assistant", "Hi."), Message("user", "Who?"), Message("assistant", "Me.")]
    for name in ("chatml", "chatml, marked", "llada", "llama-3.1"):
        end = CASES[name].end
        (pieces,) = template_of(folders[name]).samples(turns, last_only=False)
        assert learnt([pieces]) == [f"Hi.{end}", f"Me.{end}"]


ODD = {
    # name: (how an answer is written, samples that a conversation of two gives)
    "a point where there is none": ("{{ m.content }}{% if m.content[-1] != '.' %}.{% endif %}<|end|>", 1),
    "a mark behind a single letter": ("{{ m.content }}{% if m.content|length == 1 %}?{% endif %}<|end|>\n", 1),
    "the length behind it": ("{{ m.content }}<|end|>{{ 'x' * messages|length }}", 1),
    "the length behind the last": ("{{ m.content }}<|end|>{% if loop.last %}{{ 'x' * messages|length }}{% endif %}", 1),
    "eos behind the last only": ("{{ m.content }}{% if loop.last %}<|end|>{% endif %}", 2),
    "the last is marked": (
        "{% if loop.index0 > messages|length - 3 %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}",
        1,
    ),
}


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_odd_endings(name: str, listens: bool, vocabulary: str, tmp_path: Path) -> None:
    """Endings of templates that end a prompt with a header if they are asked to, and of those that never do."""
    answer, num_samples = ODD[name]
    header = "{% if add_generation_prompt %}<|assistant|>{% endif %}" if listens else ""
    template = template_of(
        folder_of(
            "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
            f"{answer}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}{header}",
            {},
            vocabulary,
            tmp_path,
        )
    )
    assert template.end_tokens == ("<|end|>",)
    samples = template.samples(as_messages(CONVERSATIONS["two turns"]), last_only=False)
    marked = "generation %}" in answer
    before = "" if listens or marked else "<|assistant|>"
    assert learnt(samples) == [f"{before}Me.<|end|>", f"{before}So.<|end|>"]
    assert len(samples) == num_samples


def test_a_token_across_the_beginning_of_an_answer_belongs_to_none(tmp_path: Path) -> None:
    """The prompt of a conversation is that which generation sees, also where two line breaks are one token."""
    case = CASES["zephyr"]
    folder = folder_of(case.template, case.tokens, with_spaces("Prepend").to_str(), tmp_path)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "\nMe."}]
    data, tokenizer = read(folder, turns, eos_token="</s>")
    sample = data.samples[0]
    assert encode_prompt("Who?", tokenizer) == sample.tokens[~sample.eligible].tolist()
    assert tokenizer.backend.token_id("\n\n") not in sample.tokens
    assert tokenizer.decode(sample.tokens[sample.eligible]).endswith("\nMe.")
    assert tokenizer.backend.token_id("\n\n") in tokenizer.encode("a\n\nb")


def test_fields_of_messages_reach_the_template(vocabulary: str, tmp_path: Path) -> None:
    """As transformers takes them: a null counts as absent."""
    folder = folder_of(source("qwen3"), {}, vocabulary, tmp_path)
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "a<|im_end|>b", "name": None},
    ]
    data, tokenizer = read(folder, turns)
    sample = data.samples[0]
    assert tokenizer.decode_all(sample.tokens[sample.eligible]) == "<think>\na<|im_end|>b\n</think>\n\n2⏎"
    assert encode_prompt("1 + 1?", tokenizer) == sample.tokens[~sample.eligible].tolist()


def test_fields_that_are_null_count_as_absent(vocabulary: str, tmp_path: Path) -> None:
    template = CHATML_MARKED + "{{ messages[1].name is defined }}"
    chat = ChatTemplate.load(folder_of(template, {"eos_token": "<|im_end|>"}, vocabulary, tmp_path))
    turns = [Message("user", "Who?"), Message("assistant", "Me.", {"name": None})]
    assert chat(turns, False).endswith("False")
    assert chat.with_answers(turns)[0] == chat(turns, False)


def test_a_thought_is_learnt_behind_what_it_shares_with_the_prompt(vocabulary: str, tmp_path: Path) -> None:
    """Where the prompt for generation ends in an empty thought, and the answer has one that is not."""
    template = source("qwen3").replace("enable_thinking is defined and enable_thinking is false", "true")
    made = template_of(folder_of(template, {}, vocabulary, tmp_path))
    first, _ = made.samples(as_messages(CONVERSATIONS["thoughts"]), last_only=False)
    assert joined(first).endswith("<|im_start|>assistant\n<think>\nadd\n</think>\n\n2<|im_end|>")
    assert learnt([first]) == ["add\n</think>\n\n2<|im_end|>"]


def test_samples_of_a_conversation_stay_together(folders: dict[str, Path]) -> None:
    data, _ = read(folders["qwen3"], CONVERSATIONS["thoughts"], copies=10)
    train, validation = split_validation(data, 0.2, seed=0)
    assert (len(train), len(validation)) == (16, 4)
    assert (len(set(train.records)), len(set(validation.records))) == (8, 2)
    assert not set(train.records) & set(validation.records)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": "{'a"}, r"tokenizer_config\.json: not readable as JSON \("),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: expected a JSON object"),
        ({"tokenizer_config.json": "{}"}, "'data.template' tokenizer needs a chat template"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"0": 3}}'}, "the tokenizer's settings cannot be read"),
        ({"chat_template.jinja": "{% for m in messages %}"}, r"the chat template is not valid \(Unexpected end"),
        ({"additional_chat_templates/rag.jinja": "a"}, r"the chat template is not valid \(.*\['rag'\]"),
    ],
)
def test_unusable_settings_are_one_line(files: dict[str, str], message: str, vocabulary: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    data = DataConfig(train="", tokenizer=str(tmp_path), template="tokenizer", max_length=200)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(data)
    assert "\n" not in str(error.value)


def test_a_template_in_a_file_of_its_own_comes_first(vocabulary: str, tmp_path: Path) -> None:
    folder = folder_of("other", {"eos_token": "<|im_end|>"}, vocabulary, tmp_path)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert joined(template_of(folder).prompt([Message("user", "a")])).startswith("<|im_start|>user\na<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('not\nthis') }}", r"the chat template refuses it \(not this\)"),
        ("{{ messages[9].content + 1 }}", "the chat template refuses it"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses it"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the assistant says"),
    ],
)
def test_a_refused_conversation_is_told_with_its_line(
    template: str, message: str, vocabulary: str, tmp_path: Path
) -> None:
    folder = folder_of(template, {}, vocabulary, tmp_path)
    with pytest.raises(UserError, match=f"line 1: .*{message}") as error:
        read(folder, CONVERSATIONS["one turn"])
    assert "\n" not in str(error.value)
