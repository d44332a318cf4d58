"""The objective text_to_image: what it asks of configuration and data, whose codes it learns, dropped captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.image_text import null_prefix, without_caption
from megatron_mdm.data.loader import PrefetchLoader, TrainLoader
from megatron_mdm.images.tokenizer import save_tokenizer
from megatron_mdm.objectives import check_run, objective_of
from megatron_mdm.training.calibrate import as_trained
from megatron_mdm.training.inputs import RunData, resolve
from tests.images.small import small_image_tokenizer
from tests.small import IMAGES, MASK, VOCAB, small_config, write_ids, write_images

NUM_IMAGES = 30
Row = dict[str, Any]


def image_config(folder: Path, **sections: Any) -> RunConfig:
    image = {"vocabulary": IMAGES.model_dump(), "caption_dropout": 0.25, **sections.pop("image", {})}
    return small_config(folder, image=image, objective={"name": "text_to_image"}, **sections)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "train.jsonl", NUM_IMAGES)
    return tmp_path


def loader_of(config: RunConfig, data: RunData, rank: int = 0, ranks: int = 1) -> TrainLoader:
    return TrainLoader(
        data.train,
        batch=config.batch,
        views=1,
        data_rank=rank,
        data_size=ranks,
        pad_id=0,
        seed=config.seed,
        caption_dropout=objective_of(config).caption_dropout,
    )


def rows_of(loader: TrainLoader | PrefetchLoader, step: int) -> dict[int, tuple[list[int], list[bool]]]:
    """Tokens and eligible places by position in the global batch."""
    return {
        int(position): (tokens[:length].tolist(), eligible[:length].tolist())
        for batch in loader.batch(step).micro_batches
        for position, tokens, eligible, length in zip(batch.positions, batch.tokens, batch.eligible, batch.lengths)
    }


def test_a_dropped_caption_leaves_the_null_prefix(folder: Path) -> None:
    config, data = resolve(image_config(folder))
    loader = loader_of(config, data)
    seen = set()
    for step in range(8):
        local = loader.batch(step)
        rows = rows_of(loader, step)
        for position, row in enumerate(loader.sample_ids(step)):
            sample = data.train.samples[row]
            is_dropped = bool(np.random.Generator(loader_stream(config.seed, step)).random(8)[position] < 0.25)
            image = sample.tokens[sample.eligible].tolist()
            expected = [*null_prefix(IMAGES), *image, IMAGES.image_end] if is_dropped else sample.tokens.tolist()
            tokens, eligible = rows[position]
            assert tokens == expected
            assert np.array(tokens)[eligible].tolist() == image
            seen.add(is_dropped)
        assert local.num_tokens == sum(len(tokens) for tokens, _ in rows.values())
    assert seen == {True, False}


def loader_stream(seed: int, step: int) -> np.random.Philox:
    """Philox by (seed, purpose 11) and step: written out, since the values are part of a run's results."""
    return np.random.Philox(key=[seed, 11], counter=[0, 0, step, 0])


def test_dropout_has_its_share_on_every_layout_and_after_resuming(folder: Path) -> None:
    config, data = resolve(image_config(folder))
    one = loader_of(config, data)
    others = [loader_of(config, data, rank, 2) for rank in (0, 1)]
    resumed = PrefetchLoader(loader_of(config, data))
    num_steps = 200
    num_dropped = 0
    for step in range(num_steps):
        rows = rows_of(one, step)
        num_dropped += sum(tokens[2] == IMAGES.eos for tokens, _ in rows.values())
        if step % 50 == 49:
            assert {**rows_of(others[0], step), **rows_of(others[1], step)} == rows
            assert rows_of(resumed, step) == rows
    number = num_steps * config.batch.global_size
    assert abs(num_dropped / number - 0.25) < 4 * np.sqrt(0.25 * 0.75 / number)


def test_calibration_drops_captions_and_validation_none(folder: Path) -> None:
    config, data = resolve(image_config(folder, data={"validation": str(write_images(folder / "v.jsonl", 6, seed=1))}))
    trained = as_trained(config, data)
    loader = loader_of(config, data)
    expected = {}
    for step in range(4):  # 30 samples, 8 a step
        for position, row in enumerate(loader.sample_ids(step)):
            expected.setdefault(int(row), rows_of(loader, step)[position][0])
    assert [sample.tokens.tolist() for sample in trained.samples] == [expected[row] for row in range(NUM_IMAGES)]
    lengths = [len(sample.tokens) for sample in data.train.samples]
    assert 0 < sum(len(tokens) < lengths[row] for row, tokens in expected.items()) < NUM_IMAGES
    assert data.validation is not None
    assert all(sample.tokens[2] != IMAGES.eos for sample in data.validation.samples)


def test_text_rows_keep_their_tokens(folder: Path) -> None:
    text = str(write_ids(folder / "text.jsonl", 10, num_ids=40))
    blend = {str(folder / "train.jsonl"): 1.0, text: 0.5}
    config, data = resolve(image_config(folder, data={"train": blend}, image={"caption_dropout": 0.9}))
    assert len(data.train) == 45  # every image once, texts half as often
    assert [bool(sample.codes_of) for sample in data.train.samples] == [True] * 30 + [False] * 15
    loader = loader_of(config, data)
    rows = rows_of(loader, 0)
    for position, row in enumerate(loader.sample_ids(0)):
        if row >= 30:
            assert rows[position][0] == data.train.samples[row].tokens.tolist()
    assert sum(tokens[2] == IMAGES.eos for tokens, _ in rows.values()) >= 3


def test_the_run_says_whose_codes_it_was_trained_on(folder: Path) -> None:
    config, _ = resolve(image_config(folder))
    assert (config.image.made_by, config.image.num_tokens) == ("a" * 64, 9)
    tokenizer = small_image_tokenizer()
    save_tokenizer(tokenizer, folder / "tokenizer")
    write_images(folder / "train.jsonl", 4, codes_of=tokenizer.fingerprint())
    config, data = resolve(image_config(folder, image={"tokenizer": str(folder / "tokenizer")}))
    assert config.image.made_by == tokenizer.fingerprint()
    assert data.notes == ()
    write_images(folder / "train.jsonl", 4, codes_of="")
    config, data = resolve(image_config(folder, image={"tokenizer": str(folder / "tokenizer")}))
    assert config.image.made_by == tokenizer.fingerprint()
    assert data.notes == (
        "warning: the samples do not say by which image tokenizer their codes were made ('codes_of')",
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"format": "corpus"}},
            "'data.format' corpus has no captions; 'objective.name' text_to_image needs sft",
        ),
        ({"data": {"too_long": "truncate"}}, "'data.too_long' truncate would cut images"),
        ({"data": {"eos_padding": True}}, "'data.eos_padding' would put targets behind images"),
        ({"model": {"vocab_size": 59}}, "'model.vocab_size' 59 has no room for the image codes of 'image.vocabulary'"),
        (
            {"image": {"preview": "captions.jsonl"}},
            "'image.preview' draws pictures at validations: set 'evaluation.every'",
        ),
        (
            {"image": {"preview": "c.jsonl"}, "evaluation": {"every": 2}, "data": {"validation_fraction": 0.2}},
            "'image.preview' draws pictures at validations: set 'image.tokenizer'",
        ),
        ({"objective": {"name": "masked"}}, "'image.caption_dropout' 0.25 has no meaning for 'objective.name' masked"),
        (
            {"objective": {"name": "autoregressive"}, "model": {"attention": "causal"}},
            "'image.caption_dropout' 0.25 has no meaning for 'objective.name' autoregressive",
        ),
    ],
)
def test_configurations_that_do_not_go_with_it(sections: dict[str, Any], message: str, folder: Path) -> None:
    config = image_config(folder)
    changed = small_config(
        folder, **{"image": config.image.model_dump(), "objective": {"name": "text_to_image"}, **sections}
    )
    with pytest.raises(UserError) as caught:
        check_run(changed, 1)
    assert str(caught.value).startswith(message)


def code(number: int) -> Callable[[Row], Row]:
    return lambda row: {**row, "input_ids": [*row["input_ids"][:-2], number, row["input_ids"][-1]]}


def spans(change: Callable[[int, int], list[tuple[int, int]]]) -> Callable[[Row], Row]:
    return lambda row: {**row, "spans": change(*row["spans"][0])}


MISTAKES: dict[str, tuple[Callable[[Row], Row], str]] = {
    "other_task": (
        lambda row: {**row, "input_ids": [7, *row["input_ids"][1:]]},
        "sample 2 has image codes, but not the ids of 'image.vocabulary' before them; set it as vocabulary.json says",
    ),
    "no_code": (code(5), "sample 2 has the target 5, which is no image code (44 to 59)"),
    "mask": (code(MASK), f"line 2: token {{}} is the mask token {MASK}, which clean data cannot hold"),
    "outside": (code(VOCAB), f"line 2: token id {VOCAB} at position {{}} is outside the vocabulary of {VOCAB} ids"),
    "no_end": (
        lambda row: {**row, "input_ids": [*row["input_ids"][:-1], 3]},
        "sample 2 does not end with 'image.vocabulary.image_end' 43 behind its image",
    ),
    "end_is_target": (
        spans(lambda first, end: [(first, end + 1)]),
        "sample 2 has the target 43, which is no image code",
    ),
    "part_of_the_image": (
        spans(lambda first, end: [(first, end - 2)]),
        "sample 2 does not end with 'image.vocabulary.image_end' 43 behind its image",
    ),
    "gap": (
        spans(lambda first, end: [(first, first + 1), (end - 1, end)]),
        "sample 2 has targets that are no image: only the image between its begin and its end may be one",
    ),
    "codes_of": (
        lambda row: {**row, "codes_of": 7},
        "line 2: 'codes_of' must be a text, the image tokenizer's fingerprint, not 7",
    ),
    "other_tokenizer": (
        lambda row: {**row, "codes_of": "b" * 64},
        "'data': image codes of several image tokenizers (aaaaaaaaaaaa, bbbbbbbbbbbb): the same",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_rows_that_are_refused(name: str, folder: Path) -> None:
    change, message = MISTAKES[name]
    path = folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    place = len(rows[1]["input_ids"]) - 2
    rows[1] = change(rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        resolve(image_config(folder))
    assert message.format(place) in str(caught.value)


def test_data_without_images_are_refused(folder: Path) -> None:
    write_ids(folder / "train.jsonl", 5, num_ids=40)
    with pytest.raises(UserError, match=r"no sample holds an image by 'image\.vocabulary' \(task token 40"):
        resolve(image_config(folder))


def test_codes_of_another_tokenizer_are_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"another image tokenizer \(aaaaaaaaaaaa\) than 'image\.made_by' \(cccccccccccc\)"
    ):
        resolve(image_config(folder, image={"made_by": "c" * 64}))
    tokenizer = small_image_tokenizer()
    save_tokenizer(tokenizer, folder / "tokenizer")
    named = {"tokenizer": str(folder / "tokenizer")}
    with pytest.raises(UserError, match=r"another image tokenizer \(aaaaaaaaaaaa\) than 'image\.tokenizer' "):
        resolve(image_config(folder, image=named))
    with pytest.raises(UserError, match=r"is not the image tokenizer of 'image\.made_by' \(cccccccccccc\)"):
        resolve(image_config(folder, image={**named, "made_by": "c" * 64}))
    with pytest.raises(UserError, match="no such folder of an image tokenizer"):
        resolve(image_config(folder, image={"tokenizer": str(folder / "nowhere")}))


def test_images_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"images of 9 codes, but 'image\.num_tokens' is 16; set it to 0 for images of"):
        resolve(image_config(folder, image={"num_tokens": 16}))


def test_without_caption_keeps_the_image(folder: Path) -> None:
    _, data = resolve(image_config(folder))
    sample = data.train.samples[0]
    shown = without_caption(sample, IMAGES)
    assert shown.tokens[shown.eligible].tolist() == sample.tokens[sample.eligible].tolist()
    assert shown.codes_of == sample.codes_of
