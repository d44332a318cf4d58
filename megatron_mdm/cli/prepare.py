"""Prepare data files, and look at them.

mdm prepare arithmetic --output FOLDER [--kind comparisons --train 60000 --validation 500 --test 500 --seed 0]
    generates word problems in GSM8K's format: train.jsonl, validation.jsonl and test.jsonl, no question twice
mdm prepare countdown --output FOLDER [--style tags --train 15000 --validation 500 --test 2000 --seed 0]
mdm prepare sudoku --output FOLDER [the same]
    generates puzzles for reinforcement learning, solved, so that they can be fine-tuned on, too: numbers that make a
    target, 4×4 grids; no three numbers and no solved grid are in two of the files
mdm prepare corpus FILE … --output PREFIX --tokenizer FILE [--workers 2 --splits 0.98 0.01 0.01]
    tokenises text, JSON lines, parquet or a `datasets` set into Megatron's .bin/.idx; interrupted, it resumes
mdm prepare task gsm8k|gsm8k_tags|hitab|openscience|text-to-image FILE … --output FOLDER
    turns the public files, as they are downloaded, into samples for training and questions for tests, with the paper's
    splits; the shipped configurations expect them in data/TASK
mdm prepare images DATA … --image-tokenizer FOLDER --resolution 512 --output codes.jsonl
    encodes pictures with captions (folders with captions.jsonl, tar shards of jpg and json, parquet) into lines of
    caption and image codes, which `task text-to-image` takes; interrupted, it resumes
mdm prepare digits --output FOLDER [--seed 0]
    scikit-learn's handwritten digits, tinted and captioned ("a red seven"): train.parquet, test.parquet, captions.jsonl
mdm prepare study --output FOLDER [--train 640 --validation 128 --test 1000 --mix 200000 --seed 0]
    generates the small study's data: sets of three tasks, a mix to pretrain on, and their tokenizer
mdm prepare inspect --config FILE --output FOLDER [section.key=value …]
    shows samples as training sees them, their lengths, and what padding and packing cost
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_mdm.cli.numbers import whole
from megatron_mdm.cli.prepare_puzzles import add_countdown, add_sudoku
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.word_problems import PROBLEMS, generate

_NATURAL = whole(0, sys.maxsize)
_POSITIVE = whole(1, sys.maxsize)
MOST_PROBLEMS = 1_000_000  # far below the number of distinct questions, so that generation ends


def arithmetic(arguments: argparse.Namespace) -> None:
    sizes = {"test": arguments.test, "validation": arguments.validation, "train": arguments.train}
    if min(sizes.values()) < 1 or sum(sizes.values()) > MOST_PROBLEMS:
        raise UserError(f"sizes must be positive and at most {MOST_PROBLEMS:,} together")
    seen: set[str] = set()
    for index, (name, size) in enumerate(sizes.items()):  # held-out sets first: they do not depend on the others' sizes
        problems = generate(size, arguments.seed * len(sizes) + index, seen, arguments.kind)
        seen.update(problem["question"] for problem in problems)
        path = arguments.output / f"{name}.jsonl"
        write_atomically(path, "".join(json.dumps(problem) + "\n" for problem in problems))
        print(f"{path}: {size:,} problems")


def corpus(arguments: argparse.Namespace) -> None:
    from megatron_mdm.parallel import platform

    platform.quiet_libraries()
    from megatron_mdm.config.schema import DataConfig
    from megatron_mdm.data.corpus_writer import CorpusSettings, warnings, write_corpus
    from megatron_mdm.data.documents import Source, format_of

    formats = {arguments.format or format_of(path) for path in arguments.input}
    if len(formats) > 1:
        raise UserError(f"inputs of several formats ({', '.join(sorted(formats))}); prepare them one after another")
    source = Source(arguments.input, formats.pop(), arguments.field, arguments.documents, arguments.split)
    data = DataConfig(train="", tokenizer=arguments.tokenizer, eos_token=_token(arguments.eos_token), max_length=2)
    settings = CorpusSettings(
        output=arguments.output,
        data=data,
        shares=tuple(arguments.splits),
        end_token=not arguments.no_end_token,
        workers=arguments.workers,
        shard_tokens=arguments.shard_tokens,
        seed=arguments.seed,
        skip_bad=arguments.on_error == "skip",
    )
    result = write_corpus(source, settings)
    for line in warnings(result, source):
        print(f"warning: {line}", file=sys.stderr)
    for bad in result.first_bad:
        print(f"skipped: {bad}")
    for name, documents, tokens in zip(("train", "validation", "test"), result.documents, result.tokens):
        print(f"{name if settings.shares else settings.output}: {documents:,} documents, {tokens:,} tokens")
    print(f"{result.shards} shard{'s' * (result.shards > 1)}, {result.bad:,} bad documents skipped")


def task(arguments: argparse.Namespace) -> None:
    from megatron_mdm.evaluation.tasks import PREPARERS

    for name, records in PREPARERS[arguments.name](arguments.input, arguments).items():
        path = arguments.output / f"{name}.jsonl"
        write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        print(f"{path}: {len(records):,} samples")


def images(arguments: argparse.Namespace) -> None:
    from megatron_mdm.parallel import platform

    platform.quiet_libraries()
    from megatron_mdm.cli.prepare_images import encode_images

    encode_images(arguments)


def digits(arguments: argparse.Namespace) -> None:
    from megatron_mdm.cli.prepare_digits import write_digits

    write_digits(arguments)


def study(arguments: argparse.Namespace) -> None:
    from megatron_mdm.cli.prepare_study import write_study

    write_study(arguments)


def inspect(arguments: argparse.Namespace) -> None:
    from megatron_mdm.parallel import platform

    platform.quiet_libraries()
    from megatron_mdm.cli.prepare_inspect import inspect_data

    inspect_data(arguments)


def _token(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("arithmetic", help="generated word problems in GSM8K's format")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--train", type=int, default=60_000)
    command.add_argument("--validation", type=int, default=500)
    command.add_argument("--test", type=int, default=500)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--kind", choices=PROBLEMS, default="arithmetic", help="comparisons: further operators, max and min"
    )
    command.set_defaults(run=arithmetic)

    add_countdown(commands.add_parser("countdown", help="generated: make a target of three numbers"))
    add_sudoku(commands.add_parser("sudoku", help="generated: 4x4 grids with one solution"))
    command = commands.add_parser("corpus", help="a pretraining corpus in Megatron's format")
    command.add_argument("input", nargs="+", help="files of one format, or names for `datasets`")
    command.add_argument("--output", required=True, help="PREFIX of the .bin and .idx files")
    command.add_argument("--tokenizer", required=True)
    command.add_argument("--eos-token", default="</s>", help="text or id of the token behind every document")
    command.add_argument("--no-end-token", action="store_true")
    command.add_argument("--format", default="", choices=["", "text", "jsonl", "parquet", "datasets"])
    command.add_argument("--field", default="text", help="of JSON lines and tables")
    command.add_argument(
        "--documents", default="paragraph", choices=["line", "paragraph", "file"], help="of text files"
    )
    command.add_argument("--split", default="train", help="of a `datasets` name")
    command.add_argument("--splits", type=float, nargs="*", default=[], metavar="SHARE", help="train validation test")
    command.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    command.add_argument("--shard-tokens", type=int, default=50_000_000)
    command.add_argument("--on-error", default="stop", choices=["stop", "skip"])
    command.add_argument("--seed", type=int, default=0, help="of the splits")
    command.set_defaults(run=corpus)

    _add_task(commands.add_parser("task", help="public data sets, with the paper's splits"))
    _add_images(commands.add_parser("images", help="pictures with captions, as image codes"))
    command = commands.add_parser("digits", help="tinted handwritten digits with captions")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--seed", type=int, default=0, help="of what is held out")
    command.set_defaults(run=digits)
    command = commands.add_parser("study", help="the small study's data")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--train", type=_POSITIVE, default=640, help="samples of each task")
    command.add_argument("--validation", type=_POSITIVE, default=128)
    command.add_argument("--test", type=_POSITIVE, default=1000)
    command.add_argument("--mix", type=whole(1000, MOST_PROBLEMS), default=200_000, help="samples to pretrain on")
    command.add_argument("--seed", type=_NATURAL, default=0)
    command.set_defaults(run=study)
    command = commands.add_parser("inspect", help="samples, lengths, efficiency")
    command.add_argument("--config", required=True, help="YAML file, or the name of a packaged one")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--samples", type=int, default=3, help="how many to show")
    command.add_argument("--no-color", action="store_true", help="brackets around what is learnt, instead of colour")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=inspect)
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_task(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", choices=["gsm8k", "gsm8k_tags", "hitab", "openscience", "text-to-image"])
    command.add_argument(
        "input",
        nargs="+",
        help="train and test files; openscience: one file or `datasets` name; text-to-image: any number",
    )
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--tables", default="", help="hitab: the folder of its tables; tables/ beside each file")
    command.add_argument("--tokenizer", default="", help="text-to-image: of the captions")
    command.add_argument(
        "--vocabulary",
        choices=["mmada", "behind"],
        default="mmada",
        help="text-to-image: MMaDA-8B's ids, or ids behind the tokenizer's for a model from scratch",
    )
    command.add_argument(
        "--image-offset", type=_NATURAL, default=126_349, help="text-to-image, mmada: id of image code 0"
    )
    command.add_argument(
        "--samples", type=_NATURAL, default=5000, help="text-to-image: for training and validation; 0: all"
    )
    command.add_argument("--test", type=_NATURAL, default=100, help="text-to-image: of those behind them")
    command.add_argument("--seed", type=int, default=0, help="of validation sets that are cut off")
    command.set_defaults(run=task)


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", nargs="+", help="folders, tar or parquet files")
    command.add_argument("--image-tokenizer", required=True, help="its folder")
    command.add_argument("--resolution", type=_NATURAL, required=True, help="pixels of the square that is encoded")
    command.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    command.add_argument("--caption-field", default="", help="of the records; else caption, prompt or text")
    command.add_argument("--batch-size", type=_POSITIVE, default=16, help="pictures encoded at once")
    command.add_argument("--threads", type=_POSITIVE, default=4, help="that read pictures")
    command.add_argument("--on-error", default="stop", choices=["stop", "skip"])
    command.set_defaults(run=images)
