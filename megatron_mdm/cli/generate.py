"""Answer a file of prompts, or draw a file of captions where the run is one on images; or, with --interactive, those
that are typed, showing each answer or picture as it is denoised:
mdm generate [--nproc RANKS] --run-dir DIR --prompts in.jsonl --output out.jsonl [key=value …]
mdm generate [--nproc RANKS] --run-dir DIR --prompts captions.jsonl --output DIR image.tokenizer=DIR [key=value …]"""

import argparse
import sys
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint import load  # noqa: E402
from megatron_mdm.checkpoint.run_weights import ADAPTERS  # noqa: E402
from megatron_mdm.cli.generation_jobs import JOBS  # noqa: E402
from megatron_mdm.config.errors import UserError  # noqa: E402
from megatron_mdm.data.records import ON_ERROR, bad_lines  # noqa: E402
from megatron_mdm.generation.image_settings import ImageSampling  # noqa: E402
from megatron_mdm.generation.settings import GenerationConfig  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.watchdog import watch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load.add_run_arguments(parser)
    parser.add_argument("--adapter", default="", metavar="FOLDER", help=ADAPTERS)
    parser.add_argument(
        "--prompts", help="JSONL or parquet: prompts, questions, instructions, messages, captions; or captions as text"
    )
    parser.add_argument(
        "--output", type=Path, help="JSONL to write, or a folder of images; interrupted, the same command resumes it"
    )
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal, a line each")
    parser.add_argument("--text", action="store_true", help="answer in text, though the run is one on images")
    parser.add_argument("--on-error", choices=ON_ERROR, default="", help="bad records; else the run's data.on_error")
    keys = ", ".join(["data.template, data.tokenizer …", *GenerationConfig.model_fields])
    of_images = ", ".join(["image.tokenizer, image.num_tokens", *ImageSampling.model_fields])
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"{keys}; of images: {of_images}")
    arguments = parser.parse_intermixed_args()
    if not arguments.interactive and not (arguments.prompts and arguments.output):
        raise UserError("give --prompts and --output, or --interactive")
    overrides = load.Overrides.of(arguments.settings)
    config = load.run_config(arguments.run_dir, arguments.tensor, arguments.pipeline, overrides)
    tokenizer = load.run_tokenizer(arguments.run_dir, config)
    kind = "images" if config.image.is_used and not arguments.text else "text"
    prompts = "" if arguments.interactive else arguments.prompts
    job = JOBS[kind](prompts, arguments.on_error, overrides.others, config, tokenizer)
    context = initialize(config.parallel, hang_minutes=config.faults.hang_minutes)
    if context.is_main:
        print(f"device: {platform.describe()}", flush=True)
    weights = load.run_weights(arguments.run_dir, config, context, arguments.checkpoint, overrides.base)
    adapter = weights.adapter(arguments.adapter)
    if context.is_main and adapter.name:
        print(*adapter.lines(), sep="\n", flush=True)
    engine = load.LoadedRun(weights, adapter, config, context).engine
    if arguments.interactive:
        job.converse(engine, context, sys.stdin, sys.stdout)
        return
    watch(arguments.run_dir, config.faults.hang_minutes, context)  # above, ranks may wait for a person for hours
    settings = {**load.checkpoint_identity(arguments.run_dir, engine.source), **adapter.identity(), **job.identity()}
    if overrides.data:
        settings["data"] = overrides.data
    summary = job.answer(engine, context, arguments.output, settings)
    if context.is_main:
        print(*bad_lines(job.bad.count, job.bad.first), *summary, sep="\n", flush=True)
