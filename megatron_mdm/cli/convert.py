"""Hugging Face checkpoints in and out, streaming: no more than a few blocks of a tensor are in memory.

mdm convert import FOLDER --output runs/llada --tensor 2 --pipeline 2
mdm convert export runs/mine --output FOLDER --dtype bf16
mdm convert export runs/lora --output FOLDER --adapter
mdm convert verify FOLDER-OR-RUN FOLDER-OR-RUN
mdm convert inspect FOLDER-OR-RUN
"""

import argparse
import json
import re
import sys
from pathlib import Path

from megatron_mdm.checkpoint.choice import AUTO, CHOICES
from megatron_mdm.checkpoint.compare import differences
from megatron_mdm.checkpoint.convert import TYPES, ImportOptions, export_checkpoint, import_checkpoint
from megatron_mdm.checkpoint.describe import description, tree_lines
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.checkpoint.peft_export import export_adapter
from megatron_mdm.config.errors import UserError
from megatron_mdm.models.families import FAMILIES

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """The number of bytes of '5GB', '500MB', '2GiB'."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.strip().upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]


def degree(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def run_import(arguments: argparse.Namespace) -> None:
    tokens = {name: getattr(arguments, f"{name}_token") for name in ("mask", "pad", "eos")}
    layout = (arguments.tensor, arguments.pipeline, arguments.dtype, arguments.shard_size)
    options = ImportOptions(*layout, tokens, arguments.ignore_fields)
    for line in import_checkpoint(arguments.source, arguments.output, options):
        print(line)
    print(f"run folder: {arguments.output}")


def run_export(arguments: argparse.Namespace) -> None:
    moved = [f"model.init_from={arguments.base}"] if arguments.base else []
    run = NativeCheckpoint.open(arguments.source, arguments.checkpoint, moved)
    print(f"weights: {run.path.name}, {run.reason}", flush=True)
    if arguments.adapter:
        notes = export_adapter(run, arguments.output, arguments.family, arguments.dtype)
        print(f"adapter: {arguments.output}", *notes, sep="\n")
        return
    config = export_checkpoint(run, arguments.output, arguments.family, arguments.dtype, arguments.shard_size)
    print(f"{config['architectures'][0]}: {arguments.output}")


def run_verify(arguments: argparse.Namespace) -> None:
    found = []
    compared = 0
    for line in differences(arguments.source, arguments.other, arguments.ignore_fields):
        compared += 1
        if line:
            found.append(line)
            print(line, flush=True)
    if found:
        raise UserError(f"{len(found)} of {compared} tensors differ")
    print(f"{compared} tensors are equal, bit for bit")


def run_inspect(arguments: argparse.Namespace) -> None:
    described = description(arguments.source, not arguments.no_checksums, arguments.ignore_fields)
    if arguments.json:
        json.dump(described, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(tree_lines(described)))


def add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=["auto", *TYPES], default="auto", help="of the weights that are written")
    parser.add_argument("--shard-size", type=size, default=size("5GB"), help="of a file, at most (5GB, 500MB …)")


def names(text: str) -> tuple[str, ...]:
    return tuple(name for name in re.split(r"[,\s]+", text) if name)


def add_ignore_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-fields",
        type=names,
        default=(),
        metavar="NAME,…",
        help="of config.json, to read as if they were absent, though they may change what the model computes",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="import | export | verify | inspect")
    reading = commands.add_parser("import", help="Hugging Face → a run's folder, for generation, scoring, training")
    reading.add_argument("source", type=Path, help="folder with config.json and safetensors files")
    add_conversion(reading)
    reading.add_argument(
        "--tensor", type=degree, default=1, help="tensor-parallel degree of the files that are written"
    )
    reading.add_argument("--pipeline", type=degree, default=1, help="pipeline stages of the files that are written")
    for name in ("mask", "pad", "eos"):
        reading.add_argument(f"--{name}-token", default="", help="text or id; else what the checkpoint says")
    add_ignore_fields(reading)
    reading.set_defaults(run=run_import)
    writing = commands.add_parser("export", help="a run's checkpoint, of any layout → Hugging Face")
    writing.add_argument("source", type=Path, help="a run's folder")
    writing.add_argument("--checkpoint", default=AUTO, help=CHOICES)
    add_conversion(writing)
    writing.add_argument(
        "--family", choices=["auto", *FAMILIES], default="auto", help="auto: what it was imported from"
    )
    writing.add_argument(
        "--adapter", action="store_true", help="the run's adapters alone, as the peft library has them; else merged"
    )
    writing.add_argument("--base", metavar="FOLDER", help="where the weights beside a run's adapters are by now")
    writing.set_defaults(run=run_export)
    comparing = commands.add_parser(
        "verify", help="compare two checkpoints tensor by tensor; exit code 1 if they differ"
    )
    comparing.add_argument("source", type=Path, help="Hugging Face folder or run's folder")
    comparing.add_argument("other", type=Path, help="Hugging Face folder or run's folder")
    add_ignore_fields(comparing)
    comparing.set_defaults(run=run_verify)
    looking = commands.add_parser("inspect", help="names, shapes, types, sizes and checksums of tensors")
    looking.add_argument("source", type=Path, help="Hugging Face folder or run's folder")
    looking.add_argument("--json", action="store_true", help="as JSON")
    looking.add_argument("--no-checksums", action="store_true", help="headers only; no tensor is read")
    add_ignore_fields(looking)
    looking.set_defaults(run=run_inspect)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except OSError as error:
        raise UserError(f"{error.filename or arguments.source}: {error.strerror}") from None
