"""Answer a file of prompts, or, with --interactive, those that are typed, showing each answer as it is denoised:
mdm generate [--nproc RANKS] --run-dir DIR --prompts in.jsonl --output out.jsonl [key=value …]"""

import argparse
import sys
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint import load  # noqa: E402
from megatron_mdm.checkpoint.run_weights import ADAPTERS  # noqa: E402
from megatron_mdm.config.errors import UserError  # noqa: E402
from megatron_mdm.config.load import load_section  # noqa: E402
from megatron_mdm.data.prompts import read_prompts  # noqa: E402
from megatron_mdm.data.records import ON_ERROR, BadRecords, bad_lines  # noqa: E402
from megatron_mdm.generation.answers import AnswerFile, answer_prompts  # noqa: E402
from megatron_mdm.generation.interactive import converse  # noqa: E402
from megatron_mdm.generation.settings import GenerationConfig  # noqa: E402
from megatron_mdm.objectives import objective_of  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.watchdog import watch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    load.add_run_arguments(parser)
    parser.add_argument("--adapter", default="", metavar="FOLDER", help=ADAPTERS)
    parser.add_argument("--prompts", help="JSONL or parquet: prompts, questions, instructions or messages")
    parser.add_argument("--output", type=Path, help="JSONL to write; interrupted, the same command resumes it")
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal, a line each")
    parser.add_argument("--on-error", choices=ON_ERROR, default="", help="bad records; else the run's data.on_error")
    keys = ", ".join(["data.template, data.tokenizer …", *GenerationConfig.model_fields])
    parser.add_argument("settings", nargs="*", metavar="key=value", help=keys)
    arguments = parser.parse_intermixed_args()
    if not arguments.interactive and not (arguments.prompts and arguments.output):
        raise UserError("give --prompts and --output, or --interactive")
    overrides = load.Overrides.of(arguments.settings)
    generation = load_section(GenerationConfig, overrides.others)
    config = load.run_config(arguments.run_dir, arguments.tensor, arguments.pipeline, overrides)
    tokenizer = load.run_tokenizer(arguments.run_dir, config)
    decode = objective_of(config).decoder
    bad = BadRecords(arguments.on_error or config.data.on_error)
    room = generation.room(config.model)
    prompts = [] if arguments.interactive else read_prompts(arguments.prompts, tokenizer, config.data, bad, room)
    context = initialize(config.parallel, hang_minutes=config.faults.hang_minutes)
    if context.is_main:
        print(f"device: {platform.describe()}", flush=True)
    weights = load.run_weights(arguments.run_dir, config, context, arguments.checkpoint, overrides.base)
    adapter = weights.adapter(arguments.adapter)
    if context.is_main and adapter.name:
        print(*adapter.lines(), sep="\n", flush=True)
    engine = load.LoadedRun(weights, adapter, config, context).engine
    if arguments.interactive:
        converse(engine, tokenizer, generation, room, decode, context, sys.stdin, sys.stdout)
        return
    watch(arguments.run_dir, config.faults.hang_minutes, context)  # above, ranks may wait for a person for hours
    identity = {**load.checkpoint_identity(arguments.run_dir, engine.source), **adapter.identity()}
    settings = {**identity, **generation.model_dump(mode="json")}
    if overrides.data:
        settings["data"] = overrides.data
    file = AnswerFile(arguments.output, prompts, settings, context)
    answer_prompts(file, engine, tokenizer, generation, decode, context)
    if context.is_main:
        print(*bad_lines(bad.count, bad.first), f"{len(prompts)} responses: {arguments.output}", sep="\n", flush=True)
