"""Pictures of captions: the folder, how it is resumed, what is refused, their scores, and the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mdm.batch import IdRange, ModelInputs
from megatron_mdm.checkpoint.load import Overrides
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.schema import ImageConfig, ImageVocabulary
from megatron_mdm.data.captioned import CaptionedSource, num_without_caption, write_captioned
from megatron_mdm.data.captions import Caption, read_captions
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.tokenizer import load_tokenizer as load_words
from megatron_mdm.evaluation.clip_score import evaluate_clip, load_clip
from megatron_mdm.evaluation.image_scores import RealDigits
from megatron_mdm.evaluation.measure import Source
from megatron_mdm.evaluation.measures import MEASURES
from megatron_mdm.generation.image_interactive import draw_typed_captions, numbers, partly_known_picture
from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
from megatron_mdm.generation.images import picture, run_image_tokenizer
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.images.digits import DigitJudge, load_digits, read_caption, tinted
from megatron_mdm.images.pixels import read_image, to_png
from megatron_mdm.images.terminal import blocks
from megatron_mdm.images.tokenizer import load_tokenizer, save_tokenizer
from megatron_mdm.objectives import objective_of
from tests.data.test_records import write_byte_tokenizer
from tests.evaluation.test_clip_score import write_clip
from tests.images.small import small_image_tokenizer
from tests.ranks import ProgramResult, run_program_ranks, run_ranks
from tests.small import MASK, PAD, small_config, small_model, word_tokenizer

CAPTIONS = ["a red seven", "no", "a blue one"]
NUM_TOKENS = 16
SETTINGS = ["steps=3", "batch_size=2", "images_per_caption=2", "seed=5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, told that it is one on images; two image tokenizers; captions."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "words").mkdir()
    write_byte_tokenizer(folder / "words")
    (folder / "train.jsonl").write_text((json.dumps({"prompt": "a", "response": "b"}) + "\n") * 8)
    tokenizer = {"tokenizer": str(folder / "words"), "mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "</s>"}
    model = small_model(vocab_size=320, init_std=0.3).model_dump()
    config = small_config(folder, model=model, data=tokenizer, schedule={"steps": 1})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert run_program_ranks("launch/train.py", ["--config", str(folder / "config.yaml")])[0].exit_code == 0
    for name, seed in (("tokenizer", 0), ("other", 1)):
        save_tokenizer(small_image_tokenizer(seed), folder / name)
    vocabulary = ImageVocabulary(task=312, bos=313, eos=1, image_begin=314, image_end=315, first_id=280, num_codes=32)
    made_by = load_tokenizer(folder / "tokenizer").fingerprint()
    image = ImageConfig(made_by=made_by, num_tokens=NUM_TOKENS, vocabulary=vocabulary)
    trained = load_config(folder / "run" / "config.yaml").model_copy(update={"image": image})
    (folder / "run" / "config.yaml").write_text(dump_config(trained, folder / "run"), encoding="utf-8")
    lines = [json.dumps({"caption": caption}) for caption in CAPTIONS]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def generate(folder: Path, output: str, *more: str, ranks: int = 1, tokenizer: str = "tokenizer") -> ProgramResult:
    arguments = ["--run-dir", str(folder / "run"), "--prompts", str(folder / "captions.jsonl")]
    arguments += ["--output", str(folder / output), f"image.tokenizer={folder / tokenizer}", *SETTINGS, *more]
    return run_program_ranks("launch/generate.py", arguments, ranks)[0]


@pytest.fixture(scope="module")
def drawn(folder: Path) -> Path:
    result = generate(folder, "drawn", ranks=2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(f"6 images: {folder / 'drawn'}\n")
    return folder / "drawn"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_of_pictures(folder: Path, drawn: Path) -> None:
    names = [f"{number:06d}.png" for number in range(6)]
    assert [*contents(drawn)] == [*names, "images.jsonl", "sheet.png"]
    records = [json.loads(line) for line in (drawn / "images.jsonl").read_text().splitlines()]
    assert [record["caption"] for record in records] == [caption for caption in CAPTIONS for _ in range(2)]
    assert [record["file"] for record in records] == names
    tokenizer = load_tokenizer(folder / "tokenizer")
    for record in records:
        assert record.keys() == {"caption", "file", "codes", "seed", "steps"}
        assert (record["seed"], record["steps"]) == (5, 3)
        with Image.open(drawn / record["file"]) as image:
            np.testing.assert_array_equal(np.array(image), np.array(picture(tokenizer, record["codes"])))
    assert len({tuple(record["codes"]) for record in records}) == 6
    found = CaptionedSource(str(drawn)).read(BadRecords())  # as `mdm image_scores DIR` reads it
    assert [each.caption for each in found] == [record["caption"] for record in records]
    assert num_without_caption(str(drawn)) == 0  # the sheet is no picture of a caption


def test_it_is_resumed_on_another_layout(folder: Path, drawn: Path) -> None:
    """As a killed job leaves it: two pictures that are listed, one of which has gone, and one that is not."""
    output = folder / "resumed"
    (output / "images.jsonl").mkdir(parents=True)  # so that the job cannot finish its list
    stopped = generate(folder, "resumed", "--tensor", "2", ranks=2)
    assert stopped.exit_code == 1
    assert f"error: {output / 'images.jsonl'}: cannot be written (Is a directory)" in stopped.stderr
    (output / "images.jsonl").rmdir()
    partial = output / "images.jsonl.partial"
    partial.write_text("\n".join([*partial.read_text().split("\n")[:3], '{"row": 4, "co']))
    listed = [json.loads(line)["row"] for line in partial.read_text().split("\n")[1:3]]
    (output / f"{listed[0]:06d}.png").unlink()
    refused = generate(folder, "resumed", "steps=4")
    assert refused.exit_code == 1
    assert "begun with steps = 3, not 4; go on with the same settings" in refused.stderr
    assert "1 images are there already" in generate(folder, "resumed").stdout
    assert contents(output) == contents(drawn)


def test_another_image_tokenizer_is_refused(folder: Path) -> None:
    refused = generate(folder, "refused", tokenizer="other")
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {folder / 'other'}: another image tokenizer (")
    assert not (folder / "refused").exists()


def test_previews_at_validations_are_what_generation_draws_of_the_checkpoint(folder: Path) -> None:
    """By a training engine with two stages, and later by one rank from its checkpoint."""
    arguments = ["--config", str(folder / "config.yaml"), f"checkpoint.directory={folder / 'previewed'}"]
    arguments += ["parallel.pipeline=2", "schedule.steps=2", "data.validation_fraction=0.5", "evaluation.every=1"]
    arguments += [f"image.preview={folder / 'captions.jsonl'}", f"image.tokenizer={folder / 'tokenizer'}"]
    image = load_config(folder / "run" / "config.yaml").image
    arguments += [f"image.vocabulary={json.dumps(image.vocabulary.model_dump())}", f"image.num_tokens={NUM_TOKENS}"]
    result = run_program_ranks("launch/train.py", [*arguments, "logging.tensorboard=true"], 2)[0]
    assert result.exit_code == 0, result.stderr
    arguments = ["--run-dir", str(folder / "previewed"), "--prompts", str(folder / "captions.jsonl")]
    result = run_program_ranks("launch/generate.py", [*arguments, "--output", str(folder / "afterwards")])[0]
    assert result.exit_code == 0, result.stderr
    pages = contents(folder / "previewed" / "samples")
    assert [*pages] == ["step-00000001.png", "step-00000002.png"]
    assert pages["step-00000002.png"] == (folder / "afterwards" / "sheet.png").read_bytes()
    assert pages["step-00000001.png"] != pages["step-00000002.png"]
    events = EventAccumulator(str(folder / "previewed" / "tensorboard")).Reload()
    assert [image.step for image in events.Images("samples")] == [1, 2]


def evaluate(folder: Path, task: str, data: str, *more: str, ranks: int = 1) -> ProgramResult:
    arguments = ["--run-dir", str(folder / "run"), "--task", task, "--data", str(folder / data), *SETTINGS, *more]
    return run_program_ranks("launch/evaluate.py", [*arguments, f"image.tokenizer={folder / 'tokenizer'}"], ranks)[0]


def test_a_run_is_scored_by_a_clip(folder: Path, drawn: Path) -> None:
    """By the pictures that generation makes of the same captions."""
    clip = write_clip(folder / "clip")
    result = evaluate(folder, "clip_score", "captions.jsonl", "--clip", str(clip), ranks=2)
    assert result.exit_code == 0, result.stderr
    written = json.loads((folder / "run" / "clip_score.json").read_text())
    pictures = {name: content for name, content in contents(drawn).items() if name.endswith(".png")}
    assert contents(folder / "run" / "images") == pictures
    images = [read_image(drawn / f"{number:06d}.png") for number in range(6)]
    captions = [caption for caption in CAPTIONS for _ in range(2)]
    expected = evaluate_clip(images, captions, load_clip(clip))
    assert written.items() >= {name: value for name, value in expected.items() if name != "scores"}.items()
    assert written["settings"]["steps"] == 3
    assert f"CLIP score: {expected['clip_score']:.2f}\n" in result.stdout
    lines = (folder / "run" / "clip_score_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == expected["scores"]


def test_a_run_on_digits_is_scored_by_real_ones(folder: Path) -> None:
    for name, digits in zip(("train", "test"), load_digits(0)):
        pictures = [picture for picture, _ in zip(tinted(digits, without_held_out_pairs=False), range(120))]
        rows = [(to_png(Image.fromarray(p.pixels)), {"caption": p.caption, "digit": p.digit}) for p in pictures]
        write_captioned(folder / f"{name}.parquet", rows)
    real = ["--digits", str(folder / "train.parquet"), str(folder / "test.parquet")]
    result = evaluate(folder, "image_scores", "test.parquet", *real, "--limit", "7")
    assert result.exit_code == 0, result.stderr
    written = json.loads((folder / "run" / "image_scores.json").read_text())
    assert written["num_images"] == 14
    assert f"digit accuracy: {written['digit_accuracy']:.2f}\n" in result.stdout
    lines = [json.loads(line) for line in (folder / "run" / "image_scores_samples.jsonl").read_text().splitlines()]
    right = [read_caption(line["caption"])[0] == line["digit"] for line in lines]
    assert sum(right) / 14 == written["digit_accuracy"]
    assert (folder / "run" / "images" / lines[-1]["file"]).is_file()


@pytest.mark.parametrize(
    ("task", "changes", "given", "message"),
    [
        ("clip_score", {}, {}, "name the CLIP model to score by with --clip FOLDER; there is no default"),
        ("clip_score", {}, {"clip": "none", "limit": 1}, "needs two distinct captions at least"),
        ("clip_score", {}, {"clip": "none"}, "none: no folder with a CLIP model's config.json"),
        ("image_scores", {}, {}, "name real tinted digits to judge by with --digits TRAIN TEST"),
        ("image_scores", {"num_tokens": 4}, {"digits": True}, "have 4 pixels a side, the digits 8"),
        ("image_scores", {}, {"digits": True}, "'no' is no caption of a tinted digit"),
    ],
)
def test_what_cannot_be_scored_is_told_before_a_model_is_loaded(
    task: str, changes: dict[str, Any], given: dict[str, Any], message: str, folder: Path
) -> None:
    config = load_config(folder / "run" / "config.yaml", [f"image.tokenizer={folder / 'tokenizer'}"])
    config = config.model_copy(update={"image": config.image.model_copy(update=changes)})
    judge = DigitJudge(np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64))
    if "digits" in given:
        given = {**given, "digits": RealDigits(judge, np.zeros(1))}
    source = Source(**{"path": str(folder / "captions.jsonl"), "limit": 0, **given})
    with pytest.raises(UserError, match=message):
        MEASURES[task].prepare(source, ImageSampling(), config, load_words(config.data), objective_of(config))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({}, "the run does not say where its image tokenizer is; name its folder: image.tokenizer=FOLDER"),
        ({"tokenizer": "missing"}, "missing: no such folder of an image tokenizer"),
        ({"tokenizer": "tokenizer"}, "tokenizer: 32 codes, the run's image vocabulary has 8192"),
    ],
)
def test_image_tokenizers_that_do_not_fit(
    image: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        run_image_tokenizer(ImageConfig.model_validate(image))
    assert str(error.value) == message


def test_an_image_tokenizer_that_nothing_vouches_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vocabulary = ImageVocabulary(first_id=280, num_codes=32, task=1, bos=1, eos=1, image_begin=1, image_end=1)
    run_image_tokenizer(ImageConfig(tokenizer=str(folder / "tokenizer"), vocabulary=vocabulary))
    assert capfd.readouterr().err.startswith("warning: the run does not say whose codes it was trained on; ")


def test_what_of_a_run_s_image_section_can_be_set() -> None:
    overrides = Overrides.of(["image.tokenizer=a", "data.template=plain", "steps=3", "image.num_tokens=4"])
    assert overrides.image == ["image.tokenizer=a", "image.num_tokens=4"]
    assert overrides.others == ["steps=3"]
    with pytest.raises(UserError, match=r"'image.made_by' cannot be set here; of 'image', only tokenizer, num_tokens"):
        Overrides.of(["image.made_by=x"])


def test_captions(tmp_path: Path) -> None:
    vocabulary = ImageVocabulary(caption_tokens=4)
    lines = tmp_path / "captions.txt"
    lines.write_text("one two three\n\n  four\n")
    found = read_captions(str(lines), word_tokenizer(), vocabulary, BadRecords())
    assert found == [Caption("one two three", [13, 13, 15], True), Caption("four", [14], False)]
    assert len(read_captions(str(lines), word_tokenizer(), vocabulary, BadRecords(), limit=1)) == 1
    records = tmp_path / "captions.jsonl"
    records.write_text('{"prompt": "four"}\n{"caption": ""}\n{"caption": 5}\n{"picture": "a"}\n')
    bad = BadRecords("skip")
    assert [caption.text for caption in read_captions(str(records), word_tokenizer(), vocabulary, bad)] == ["four", ""]
    assert [message.partition(", ")[2] for message in bad.first] == [
        "line 3: the caption ('caption') is no text",
        "line 4: no caption ('caption'); found picture",
    ]
    room = Room(20, 17)
    with pytest.raises(UserError, match=r"line 1: 6 tokens of prompt and 17 of the image are 23, more than"):
        read_captions(str(lines), word_tokenizer(), vocabulary, BadRecords(), room)
    records.write_text("")
    with pytest.raises(UserError, match=r"captions.jsonl: no captions"):
        read_captions(str(records), word_tokenizer(), vocabulary, BadRecords())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FirstCodes:
    """An engine that likes code 7."""

    def logits(self, inputs: ModelInputs, *, ids: IdRange | None = None) -> torch.Tensor:
        assert ids is not None
        return 99.0 * torch.nn.functional.one_hot(torch.full((int(inputs.selected.sum()),), 7), ids[1]).float()


def typed() -> list[str]:
    """What is written to a terminal with colours, to one without, and to a file."""
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    image = ImageTokens(ImageVocabulary(first_id=28, num_codes=32, eos=1), 4)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        for colors, output in (("truecolor", Terminal()), ("", Terminal()), ("truecolor", io.StringIO())):
            patch.setenv("COLORTERM", colors)
            draw_typed_captions(
                FirstCodes(),
                word_tokenizer(),
                small_image_tokenizer(),
                ImageSampling(steps=2),
                SpecialIds(MASK, PAD),
                image,
                Room(10, 5),
                context,
                ["a\n", "too many of them\n"],
                output,
            )
            written.append(output.getvalue())
    return written


def test_a_terminal_shows_the_picture_forming() -> None:
    colored, plain, file = run_ranks(typed, 1)[0]
    table, error = "7 7\n7 7\n", "error: 8 tokens of prompt and 5 of the image are 13, more than"
    assert file.startswith(table + error)
    assert "\x1b[2A\r\x1b[J" in plain
    assert plain.count("·") == 2  # after the first of two steps
    assert plain.split("(2 steps)")[0].endswith(table)
    assert "▀" not in plain
    assert "\x1b[38;2;96;96;96;48;2;96;96;96m▀" in colored  # what is unknown
    last = colored.split("(2 steps)")[0].rpartition("\x1b[J")[2]
    assert "\x1b[38;2;96;96;96;48;2;96;96;96m▀" not in last
    pixels = np.array(picture(small_image_tokenizer(), [7] * 4))
    assert f"\x1b[38;2;{';'.join(map(str, pixels[0, 0]))}" in last


def test_pictures_in_half_blocks() -> None:
    two = Image.new("RGB", (2, 3), (1, 2, 3))
    two.putpixel((0, 1), (4, 5, 6))
    upper, lower = blocks(two, 2, 2)
    assert upper == "\x1b[38;2;1;2;3;48;2;4;5;6m▀\x1b[38;2;1;2;3;48;2;1;2;3m▀\x1b[0m"
    assert lower.count("48;2;0;0;0") == 2  # below the last row
    assert len(blocks(Image.new("RGB", (100, 100)), 40, 30)) == 20  # as wide as fits
    assert blocks(Image.new("RGB", (100, 100)), 40, 30)[0].count("▀") == 40
    assert len(blocks(Image.new("RGB", (8, 8)), 200, 100)) == 32  # enlarged by whole factors


def test_unknown_parts() -> None:
    tokenizer = small_image_tokenizer()
    pixels = np.array(partly_known_picture(tokenizer, [3, -1, 5, 6]))
    side = tokenizer.down
    assert (pixels[:side, side:] == 96).all()
    assert not (pixels[side:] == 96).all()
    assert numbers([3, -1, 15, 6]) == [" 3  ·", "15  6"]
