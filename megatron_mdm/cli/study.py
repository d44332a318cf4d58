"""A study: many methods on many tasks with many seeds, as one resumable job; its tables and pictures.

mdm study CONFIG [--workers N]          run what is not done yet; killed anywhere, the same command goes on
mdm study CONFIG --shard 0/4            as one of four such jobs on one folder (Slurm's array index is taken by itself)
mdm study CONFIG --dry-run              runs, hours and disk
mdm study CONFIG --plan CLUSTER         hours by method on a cluster (h100-80gb, …, or a YAML file)
mdm study CONFIG --collect              study.json, tables and pictures of what is done, while others still run
mdm study --tables FOLDER               tables and pictures from FOLDER/study.json alone
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.cli.configs import config_path  # noqa: E402
from megatron_mdm.cli.numbers import whole  # noqa: E402
from megatron_mdm.config.errors import UserError  # noqa: E402
from megatron_mdm.config.files import write_json  # noqa: E402
from megatron_mdm.parallel import environment  # noqa: E402
from megatron_mdm.study.cluster_plan import plan_table, planned_rows, total_lines  # noqa: E402
from megatron_mdm.study.cost import estimate_lines  # noqa: E402
from megatron_mdm.study.gradients import gradient_recipes, measured  # noqa: E402
from megatron_mdm.study.pool import Machine, Pool, own_share_first  # noqa: E402
from megatron_mdm.study.report import write_report  # noqa: E402
from megatron_mdm.study.results import STUDY, collect, read_collected  # noqa: E402
from megatron_mdm.study.runs import Study, check_recipes  # noqa: E402
from megatron_mdm.study.settings import read_study  # noqa: E402
from megatron_mdm.study.tables import as_markdown  # noqa: E402
from megatron_mdm.training.plan.cluster import PRESETS, Cluster, read_cluster  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="", help="YAML file, or the name of a packaged one (study/small)")
    parser.add_argument("--workers", type=whole(1, 4096), default=0, help="runs at a time; else by the cores or GPUs")
    parser.add_argument("--shard", type=_shard, default=None, metavar="I/N", help="which of several jobs this one is")
    parser.add_argument("--dry-run", action="store_true", help="print runs, hours and disk, and exit")
    parser.add_argument("--collect", action="store_true", help="write tables of what is done, and exit")
    parser.add_argument("--only", type=_words, default=(), metavar="PART,…", help="parts of the study by name")
    parser.add_argument("--plan", default="", metavar="CLUSTER", help=f"{', '.join(PRESETS)}, or a YAML file")
    parser.add_argument("--nodes", type=whole(1, 1_000_000), default=0, help="of the plan, in place of the cluster's")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="of a study.json: write tables and pictures")
    arguments = parser.parse_args()
    if arguments.tables:
        _report(arguments.tables)
        return
    if not arguments.config:
        raise UserError("name a configuration, such as study/small, or a folder with --tables")
    settings = read_study(config_path(arguments.config))
    parts = tuple(part for part in settings.parts if not arguments.only or part.name in arguments.only)
    if not parts:
        raise UserError(f"--only: the parts are {', '.join(part.name for part in settings.parts)}")
    study = Study(settings.model_copy(update={"parts": parts}), config_path)
    check_recipes(study)
    if arguments.plan:
        _print_plan(study, read_cluster(arguments.plan, arguments.nodes))
        return
    machine = _machine(arguments.workers, settings.ranks)
    if arguments.dry_run:
        print("\n".join(estimate_lines(study, machine)))
        return
    if arguments.collect:
        _collect(study)
        return
    _run(study, machine, arguments.shard or _of_slurm())


def _run(study: Study, machine: Machine, shard: tuple[int, int]) -> None:
    recipes = own_share_first([*gradient_recipes(study), *study.recipes()], *shard)
    print(f"{len(recipes)} runs, {machine.workers} at a time, to {study.folder}", flush=True)
    outcome = Pool(study, recipes, machine, lambda line: print(line, flush=True)).run()
    _collect(study)
    if outcome.failed:
        print(f"{len(outcome.failed)} runs have failed: {', '.join(outcome.failed)}", file=sys.stderr)
        sys.exit(1)
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} runs are left to others, who do them; the last to end writes all tables")
    if outcome.stopped:
        print("stopped; the same command goes on", flush=True)


def _print_plan(study: Study, cluster: Cluster) -> None:
    rows = planned_rows(study, cluster)
    print("\n".join([as_markdown(plan_table(rows)), *total_lines(study, rows, cluster)]))


def _collect(study: Study) -> None:
    write_json(study.folder / STUDY, collect(study, measured(gradient_recipes(study))))
    _report(study.folder)


def _report(folder: Path) -> None:
    for path in write_report(read_collected(folder), folder):
        print(path)


def _machine(workers: int, ranks: int) -> Machine:
    """So many runs at a time as there are cores, or GPUs, for the ranks of each."""
    named = environment.variable("CUDA_VISIBLE_DEVICES")
    gpus = tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))
    gpus = gpus if platform.is_cuda() else ()
    most = max(1, (len(gpus) or len(os.sched_getaffinity(0))) // ranks)
    if gpus and max(workers, 1) * ranks > len(gpus):
        raise UserError(f"{max(workers, 1)} runs of {ranks} ranks need more than the {len(gpus)} GPUs that there are")
    return Machine(workers or most, ranks, gpus)


def _shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 0 to N - 1")
    return int(index), int(number)


def _of_slurm() -> tuple[int, int]:
    """The place in an array of Slurm's jobs; the first of one, where there is none."""
    number = environment.number("SLURM_ARRAY_TASK_COUNT", 1)
    index = environment.number("SLURM_ARRAY_TASK_ID", 0) - environment.number("SLURM_ARRAY_TASK_MIN", 0)
    return index % number, number


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
