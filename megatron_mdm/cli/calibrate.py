"""Calibrate P-POTS alone, with a run's weights or a configuration's initial ones; training takes the artifact with
diffusion.calibration.artifact=FILE: mdm calibrate [--nproc RANKS] --config FILE --output calibration.json"""

import argparse
from pathlib import Path
from typing import cast

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint.choice import AUTO, CHOICES, choose_together  # noqa: E402
from megatron_mdm.checkpoint.load import load_for_inference, restored_engine  # noqa: E402
from megatron_mdm.cli.configs import config_path  # noqa: E402
from megatron_mdm.config.load import load_config  # noqa: E402
from megatron_mdm.engine.base import Engine  # noqa: E402
from megatron_mdm.objectives import check_run  # noqa: E402
from megatron_mdm.parallel.groups import initialize, world_size_from_environment  # noqa: E402
from megatron_mdm.parallel.watchdog import watch  # noqa: E402
from megatron_mdm.training.calibrate import calibrate, save_artifact  # noqa: E402
from megatron_mdm.training.inputs import agreement, resolve  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a packaged one")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write; a PNG goes beside it")
    parser.add_argument("--run-dir", type=Path, help="take this run's weights")
    parser.add_argument("--checkpoint", default=AUTO, help=f"which of its checkpoints: {CHOICES}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    config = load_config(config_path(arguments.config), arguments.overrides)
    objective = check_run(config, world_size_from_environment())
    _ = objective.design  # one without masks says so, before ranks join
    config, data = resolve(config)
    parallel = config.parallel
    hang_minutes = config.faults.hang_minutes
    context = initialize(parallel, agreement(config, data), hang_minutes)
    if context.is_main:
        print(f"device: {platform.describe()}", flush=True)
    watch(arguments.output.parent, hang_minutes, context)
    engine: Engine
    if arguments.run_dir and config.diffusion.calibration.is_judged_by_gradients:  # which takes backward passes
        chosen = choose_together(arguments.run_dir, arguments.checkpoint, context)
        engine = restored_engine(chosen.path, config, context, 0)
    elif arguments.run_dir:
        engine = cast(Engine, load_for_inference(arguments.run_dir, config, context, arguments.checkpoint))
    else:
        engine = restored_engine(None, config, context, 0)
    artifact = calibrate(engine, config, data, context)
    if context.is_main:
        save_artifact(artifact, arguments.output)
        print(
            f"calibration efficiency: {artifact['efficiency']:.3f} on held-out losses, 5 % bound "
            f"{artifact['efficiency_interval'][0]:.3f} (uniform: {artifact['efficiency_of_uniform']:.3f})"
        )
        print(f"{arguments.output}, {arguments.output.with_suffix('.png')}", flush=True)
