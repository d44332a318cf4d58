"""`mdm`: one command for all programs."""

from __future__ import annotations

import argparse
import difflib
import sys
from importlib import import_module
from typing import NamedTuple


class Program(NamedTuple):
    line: str  # what it does, for the list
    on_ranks: bool = False  # whether several ranks may run it as one job


PROGRAMS = {  # each is the module of its name beside this file
    "train": Program("train a model, or resume a run; --dry-run shows what it would be", on_ranks=True),
    "calibrate": Program("calibrate P-POTS alone", on_ranks=True),
    "evaluate": Program("score a run: answers, perplexity, multiple choice, tasks of lm-eval", on_ranks=True),
    "generate": Program("answer prompts of a file, or those that are typed", on_ranks=True),
    "convert": Program("Hugging Face checkpoints in and out; compare and inspect checkpoints"),
    "plan": Program("memory, communication, time and cost on a cluster; the best layouts"),
    "report": Program("a run's page, many runs, where the variance comes from"),
    "study": Program("many methods, tasks and seeds as one resumable job; its tables, pictures and verdicts"),
    "prepare": Program("make data files: word problems, corpora, public data sets, pictures; inspect them"),
    "tokenizer": Program("train a sentencepiece tokenizer"),
    "image_tokenizer": Program("train a small image tokenizer"),
    "image_scores": Program("score pictures on disk against their captions: CLIP score, digits"),
    "small_clip": Program("train a small CLIP, for pictures such as the digits"),
}


def main() -> None:
    """Run the program that the first argument names; without one, list them."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: mdm has no program '{name}'{hint} (mdm --help lists them)", file=sys.stderr)
        sys.exit(2)
    if PROGRAMS[name].on_ranks:
        num_ranks, arguments = _num_ranks(name, arguments)
        if num_ranks:
            from megatron_mdm.cli.launcher import launch

            sys.exit(launch(["--nproc-per-node", str(num_ranks), "--module", "megatron_mdm.cli", name, *arguments]))
    sys.argv = [f"mdm {name}", *arguments]
    program = import_module(f"megatron_mdm.cli.{name}")
    from megatron_mdm.parallel.program import run_program

    run_program(program.main)


def _help() -> str:
    lines = [f"  {name:<15} {program.line}" for name, program in PROGRAMS.items()]
    ranks = ", ".join(name for name, program in PROGRAMS.items() if program.on_ranks)
    return "\n".join(
        [
            "usage: mdm PROGRAM …",
            "",
            *lines,
            "",
            "mdm PROGRAM --help describes its arguments. On several ranks of this machine:",
            f"  mdm PROGRAM --nproc N …   ({ranks})",
            "On several machines: torchrun … -m megatron_mdm.cli PROGRAM …",
        ]
    )


def _num_ranks(name: str, arguments: list[str]) -> tuple[int, list[str]]:
    """(ranks to start, 0 if not asked for; the other arguments)."""
    parser = argparse.ArgumentParser(prog=f"mdm {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=_positive, default=0)
    found, others = parser.parse_known_args(arguments)
    return found.nproc, others


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)
