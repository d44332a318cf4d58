"""Train a masked diffusion model: mdm train [--nproc RANKS] --config FILE [section.key=value …]"""

import argparse
import sys
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.cli.configs import absent_inputs, config_path  # noqa: E402
from megatron_mdm.config.load import load_config  # noqa: E402
from megatron_mdm.objectives import check_run  # noqa: E402
from megatron_mdm.parallel.environment import variable  # noqa: E402
from megatron_mdm.parallel.groups import initialize, world_size_from_environment  # noqa: E402
from megatron_mdm.parallel.watchdog import watch  # noqa: E402
from megatron_mdm.rl.run import parts_of  # noqa: E402
from megatron_mdm.training.dry_run import describe, describe_without_data  # noqa: E402
from megatron_mdm.training.folder import StartMode  # noqa: E402
from megatron_mdm.training.inputs import agreement, describe_data, resolve, total_steps  # noqa: E402
from megatron_mdm.training.launches import has_begun  # noqa: E402
from megatron_mdm.training.layout_check import check_layout  # noqa: E402
from megatron_mdm.training.resume import as_the_run_began  # noqa: E402
from megatron_mdm.training.run import train_run  # noqa: E402
from megatron_mdm.training.summary import outcome  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a packaged one")
    parser.add_argument("--resume", action="store_true", help="resume where the run in checkpoint.directory stopped")
    parser.add_argument("--overwrite", action="store_true", help="remove the run in checkpoint.directory first")
    parser.add_argument("--dry-run", action="store_true", help="print layout, batches and memory, and exit")
    parser.add_argument("--layout-check", action="store_true", help="compare 3 steps with the smallest layout; exit")
    parser.add_argument("--world-size", type=int, default=world_size_from_environment(), help="ranks, for --dry-run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    path = config_path(arguments.config)
    config = load_config(path, arguments.overrides)
    objective = check_run(config, arguments.world_size)
    parts = parts_of(config)
    config = parts.checked(config, arguments.world_size)
    absent = absent_inputs(config, path)
    if arguments.dry_run and absent:
        made = f"not there yet: {', '.join(absent)}; {path} says in its first lines how to make them"
        _print_once(f"{describe_without_data(config, arguments.world_size)}\n{made}")
        return
    resume = arguments.resume or has_begun(Path(config.checkpoint.directory))
    config, data = resolve(as_the_run_began(config) if resume else config)
    parts.check_data(config, data)
    description = describe(config, arguments.world_size, total_steps(config, len(data.train)))
    if arguments.dry_run:
        _print_once(f"{description}\n{describe_data(data, config)}")
        return
    parallel = config.parallel
    hang_minutes = config.faults.hang_minutes
    context = initialize(parallel, agreement(config, data), hang_minutes)
    if arguments.layout_check:
        check_layout(config, data, context)
        return
    if context.is_main:
        for line in objective.warnings():
            print(f"warning: {line}", file=sys.stderr)
        print(f"device: {platform.describe()}\n{description}\n{describe_data(data, config)}", flush=True)
    watch(Path(config.checkpoint.directory), hang_minutes, context)
    summary = train_run(config, data, context, StartMode.agreed(resume, arguments.overwrite), parts)
    if context.is_main:
        print("\n".join(outcome(config, summary)), flush=True)


def _print_once(text: str) -> None:
    """Print on the first rank only, before the ranks have joined."""
    if not variable("RANK").strip("0"):
        print(text)
