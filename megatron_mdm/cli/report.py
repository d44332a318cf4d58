"""Look at runs.

mdm report run FOLDER        a page of a run, finished or not: run.png, and its content in run.json
mdm report runs FOLDER…      many runs: mean, interval, range and standard deviation over seeds by method, a picture
mdm report pair FIRST SECOND the scores of two evaluations on the same questions, and a paired test; --run adds the
                             picture of the reinforcement learning that lies between them
mdm report variance FOLDER   where its model's training noise comes from, and what each method leaves of it
mdm report rl-variance FOLDER   noise and bias of an update's gradient, on a recorded rollout of reinforcement learning
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.objectives import objective_of
from megatron_mdm.reports.paired import read_pairs, rewards_figure
from megatron_mdm.reports.plots import VARIANCES, save_figure
from megatron_mdm.reports.run_facts import fact_lines
from megatron_mdm.reports.run_page import page_figure
from megatron_mdm.reports.run_summary import read_run_folder, run_page
from megatron_mdm.reports.runs import as_json, read_runs, spread_figure, spreads, table, unequal_settings
from megatron_mdm.rl import label as rl_label


def report_run(folder: Path, output: Path) -> None:
    """Write page and JSON; print what a run is, and what a finished one reached."""
    run = read_run_folder(folder)
    page = run_page(run, objective_of(run.config).description)
    try:
        write_json(output.with_suffix(".json"), page)
        save_figure(page_figure(page), output.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another place by --output") from None
    for label, text in fact_lines(page["facts"]):
        print(f"{label}: {text}")
    if run.has_current_summary:
        _print_summary(run.summary)
    for name in ("calibration.png", "curves.png", "metrics.jsonl", "tensorboard", "samples.jsonl"):
        if (folder / name).exists():
            print(f"{name.partition('.')[0]}: {folder / name}")
    if (folder / "evaluation.json").exists():
        _print_answers(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    print(f"page: {output.with_suffix('.png')}")


def _print_summary(summary: dict[str, Any]) -> None:
    last = summary["t_last_step"]
    spread = summary["t_share_by_decile"]
    print(
        f"spread of t: {last['min']:.3f} to {last['max']:.3f} in one global batch (mean {last['mean']:.3f}, standard "
        f"deviation {last['std']:.3f}); share of all draws by decile {' '.join(f'{share:.3f}' for share in spread)}"
    )
    measured = ((label, summary.get(key)) for key, label in VARIANCES.items())
    print("variance: " + ", ".join(f"{label} {value:.3f}" for label, value in measured if value is not None))
    calibration = summary["calibration"]
    if calibration:
        uniform = calibration["efficiency_of_uniform"]
        print(
            f"calibration efficiency: {calibration['efficiency']:.3f} (uniform: {uniform:.3f}) "
            f"from {calibration['forwards']:,} forwards in {calibration['seconds']:.1f} s"
        )


def _print_answers(result: dict[str, Any]) -> None:
    low, high = result["interval"]
    print(f"answers: {result['num_right']} of {result['num_questions']} right, 95 % interval {low:.3f} to {high:.3f}")
    print(f"exact match: {result['exact_match']:.2f}")


def report_runs(folders: list[Path], output: Path) -> None:
    """Print the table; write output.png and output.json."""
    found = read_runs(folders, _label)
    over_seeds = spreads(found)
    print(table(over_seeds))
    for line in unequal_settings(found):
        print(f"not in seeds alone: {line}")
    write_json(output.with_suffix(".json"), as_json(found, over_seeds))
    save_figure(spread_figure(over_seeds), output.with_suffix(".png"))
    print(f"picture: {output.with_suffix('.png')}")


def _label(config: RunConfig) -> str:
    return rl_label.label(config) if config.rl.is_used else objective_of(config).description.label


def report_pair(first: Path, second: Path, run: Path | None, output: Path) -> None:
    """Print one line; write output.json and, of a run, output.png."""
    pairs = read_pairs(first, second)
    write_json(output.with_suffix(".json"), pairs.as_json())
    print(pairs)
    if run is not None:
        records = read_run_folder(run).records
        save_figure(rewards_figure(records, pairs), output.with_suffix(".png"), cut=False)
        print(f"picture: {output.with_suffix('.png')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="a page of one run, finished or not")
    command.add_argument("folder", type=Path)
    command.add_argument("--output", type=Path, help="name of the PNG and JSON to write; FOLDER/run.png if not given")
    command.set_defaults(report=_run)
    command = commands.add_parser("variance", help="A, B, C and every method's variance in loss and gradient")
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--draws", type=int, default=1000, help="samples whose gradients are drawn, per way of masking"
    )
    command.add_argument("--groups", type=int, default=200, help="samples for A, B and C, 24 rows each")
    command.add_argument("--output", type=Path, help="folder for variance.json and its picture; the run's if not given")
    command.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value")
    command.set_defaults(report=_variance)
    command = commands.add_parser("rl-variance", help="noise and bias of an update of reinforcement learning")
    command.add_argument("folder", type=Path, help="a run with recorded rollouts (rl.record)")
    command.add_argument("--checkpoint", default="newest", help="weights: newest, or a step")
    command.add_argument("--old", default="", help="checkpoint of the weights that ratios are over; else they are 1")
    command.add_argument("--rollout", type=Path, help="a recorded rollout; else the checkpoint's next, or the last")
    command.add_argument("--groups", type=int, default=32, help="prompts, of those whose rewards differ")
    command.add_argument("--draws", type=int, default=64, help="updates drawn of each design")
    command.add_argument("--target-rows", type=int, default=32, help="rows of a draw of the exact gradient")
    command.add_argument("--target-draws", type=int, default=16, help="draws of the exact gradient")
    command.add_argument("--designs", default="", help="names, with ; between; else all")
    command.add_argument("--output", type=Path, help="folder; FOLDER/rl_variance if not given")
    command.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value")
    command.set_defaults(report=_rl_variance)
    command = commands.add_parser("runs", help="many runs, by method")
    command.add_argument("folders", type=Path, nargs="+", help="runs' folders, or folders that hold them")
    command.add_argument("--output", type=Path, default=Path("runs_report"), help="name of the PNG and JSON to write")
    command.set_defaults(report=lambda arguments: report_runs(arguments.folders, arguments.output))
    command = commands.add_parser("pair", help="two evaluations on the same questions, and a paired test")
    command.add_argument("first", type=Path, help="samples.jsonl, or the run it is in")
    command.add_argument("second", type=Path)
    command.add_argument("--run", type=Path, help="of reinforcement learning, whose rewards are drawn")
    command.add_argument("--output", type=Path, default=Path("pair"), help="name of the JSON and PNG to write")
    command.set_defaults(report=lambda given: report_pair(given.first, given.second, given.run, given.output))
    arguments = parser.parse_args()
    arguments.report(arguments)


def _run(arguments: argparse.Namespace) -> None:
    report_run(arguments.folder, arguments.output or arguments.folder / "run.png")


def _variance(arguments: argparse.Namespace) -> None:
    from megatron_mdm.parallel import platform

    platform.quiet_libraries()
    from megatron_mdm.cli.report_variance import (
        report_variance,  # DeepSpeed and megatron-core are needed by this report only
    )

    report_variance(arguments)


def _rl_variance(arguments: argparse.Namespace) -> None:
    from megatron_mdm.parallel import platform

    platform.quiet_libraries()
    from megatron_mdm.cli.report_rl_variance import report_rl_variance  # as above

    report_rl_variance(arguments)
