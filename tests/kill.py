"""Kill training at random instants and see that it resumes as if nothing had been: python -m tests.kill [--cases 40]

A random rank, or all of them, is ended by SIGKILL while it trains, saves, calibrates or validates, on several layouts;
in reinforcement learning while it draws a rollout, judges it or measures its values.
The resumed run must leave the same records and, bit for bit, the same last checkpoint as an undisturbed one; it must go
on from the newest checkpoint there was, and have lost no more steps than lie between two saves (and, where a checkpoint
was being written in the background, those done since that was begun). Exit code 1 where it is not so.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.config.load import dump_config
from tests.ranks import run_program_ranks
from tests.rl.small import rl_config
from tests.training.test_resume import losses, write_config

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "zero1_bf16": ({"zero": 1}, "bf16"),
    "zero3": ({"zero": 3}, "fp32"),
    "tp2": ({"tensor": 2, "zero": 1}, "fp32"),
    "pp2": ({"pipeline": 2, "zero": 1}, "fp32"),
    "adapters": ({"zero": 1}, "bf16"),
    "rl": ({"zero": 1}, "fp32"),
}
ADAPTERS = ("adapters",)  # layouts whose runs train adapters beside another run's weights
RL = ("rl",)  # layouts whose runs are of reinforcement learning
PHASES = ("training", "saving", "calibration", "validation")
RL_PHASES = ("training", "saving", "rollout", "reward", "old values")
WHO = ((0,), (1,), (0, 1))
SAVE_EVERY = 3
WRAPPER = "tests/kill_wrapper.py"


class Reference(NamedTuple):
    """An undisturbed run."""

    config: Path
    base: Path | None
    records: list[dict[str, Any]]
    manifest: str
    seconds: dict[str, list[float]]  # of each phase's occurrences


class Case(NamedTuple):
    layout: str
    asynchronous: bool
    phase: str
    occurrence: int
    delay: float
    ranks: tuple[int, ...]


class Outcome(NamedTuple):
    case: Case
    phases: list[str]  # what the killed rank was doing when it died
    was_killed: bool  # else it had ended before its instant came
    lost: int  # steps that were done again
    fault: str  # what is wrong; empty: nothing


def arguments_of(config: Path, run: Path, layout: str, asynchronous: bool, base: Path | None) -> list[str]:
    """base: the run beside whose weights adapters are trained; None: everything is."""
    adapters = [f"model.init_from={base}", "model.lora.rank=64"] if base else []
    validations = [] if layout in RL else ["evaluation.every=2"]
    return [
        *adapters,
        *validations,
        "--config",
        str(config),
        f"checkpoint.directory={run}",
        f"checkpoint.save_every={SAVE_EVERY}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
        "model.hidden_size=192",  # so that a save takes a while
        "model.ffn_hidden_size=768",
    ]


def write_rl_config(folder: Path, parallel: dict[str, Any], dtype: str) -> Path:
    config = rl_config(folder, parallel=parallel, precision={"dtype": dtype}, schedule={"steps": 12})
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def undisturbed(folder: Path, layout: str) -> Reference:
    folder.mkdir()
    config = (write_rl_config if layout in RL else write_config)(folder, *LAYOUTS[layout])
    base = None
    if layout in ADAPTERS:
        base = folder / "base"
        results = run_program_ranks(
            "launch/train.py", [*arguments_of(config, base, layout, True, None), "schedule.steps=4"], 2
        )
        assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    plan = json.dumps({"phase": "", "log": str(folder)})
    results = run_program_ranks(WRAPPER, [plan, *arguments_of(config, folder / "whole", layout, True, base)], 2)
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    seconds = json.loads((folder / "seconds-0.json").read_text())
    return Reference(config, base, losses(folder / "whole"), last_manifest(folder / "whole"), seconds)


def last_manifest(run: Path) -> str:
    """Checksums of the last checkpoint's tensors."""
    entries = json.loads((sorted((run / "checkpoints").glob("step-*"))[-1] / "manifest.json").read_text())["files"]
    return json.dumps({name: entry for name, entry in entries.items() if name.startswith("tensors/")})


def draw(generator: random.Random, phase: str, reference: Reference, layout: str, asynchronous: bool) -> Case:
    """An instant within an occurrence of the phase, as long as that took in the undisturbed run."""
    seconds = reference.seconds[phase]
    occurrence = generator.randrange(len(seconds))
    delay = generator.random() * seconds[occurrence]
    return Case(layout, asynchronous, phase, 1 + occurrence, delay, generator.choice(WHO))


def kill(case: Case, reference: Reference, folder: Path) -> Outcome:
    """Run, die, resume, compare."""
    folder.mkdir()
    run = folder / "run"
    arguments = arguments_of(reference.config, folder / "run", case.layout, case.asynchronous, reference.base)
    plan = json.dumps({**case._asdict(), "log": str(folder)})
    killed = run_program_ranks(WRAPPER, [plan, *arguments], 2)  # a rank that hangs fails here
    codes = [result.exit_code for result in killed]
    deaths = [json.loads(path.read_text()) for path in folder.glob("killed-*.json")]
    if not deaths:
        return Outcome(case, [], False, 0, "" if codes == [0, 0] else f"nobody was killed, yet exit codes are {codes}")
    found = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    resumed = run_program_ranks("launch/train.py", [*arguments, "--resume"], 2)
    at = re.search(r"resumed from .* at step (\d+)", resumed[0].stdout)
    resumed_step = int(at[1]) if at else 0
    newest = int(found[-1].removeprefix("step-")) if found else 0
    done = max(death["steps_done"] for death in deaths)
    in_work = [death["active"]["saving"] for death in deaths if "saving" in death["active"]]
    allowed = SAVE_EVERY + (done - min(in_work) if in_work and case.asynchronous else 0)
    fault = ""
    if [result.exit_code for result in resumed] != [0, 0]:
        fault = f"the resumed run failed: {resumed[0].stderr[-300:]}"
    elif resumed_step != newest:
        fault = f"resumed at step {resumed_step} though there was a checkpoint of step {newest}"
    elif done - resumed_step > allowed:
        fault = f"{done - resumed_step} steps were lost, {allowed} may be"
    elif losses(run) != reference.records:
        fault = "other records"
    elif last_manifest(run) != reference.manifest:
        fault = "other weights or moments"
    phases = sorted({phase for death in deaths for phase in death["active"]})
    return Outcome(case, phases, True, done - resumed_step, fault)


def run_cases(cases: int, seed: int, layouts: list[str]) -> Iterator[Outcome]:
    """Phases, layouts and ways of saving take turns; the instants, and who dies, are random."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        references = {layout: undisturbed(Path(name, layout), layout) for layout in layouts}
        for number in range(cases):
            turn = number // len(PHASES)
            layout = layouts[(number + turn) % len(layouts)]
            phases = RL_PHASES if layout in RL else PHASES
            phase = phases[number % len(phases)]
            asynchronous = (number + turn + turn // len(layouts)) % 2 == 1
            case = draw(generator, phase, references[layout], layout, asynchronous)
            yield kill(case, references[layout], Path(name, str(number)))
            shutil.rmtree(Path(name, str(number)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    arguments = parser.parse_args()
    outcomes = []
    for outcome in run_cases(arguments.cases, arguments.seed, arguments.layouts):
        case = outcome.case
        who = "all ranks" if len(case.ranks) == 2 else f"rank {case.ranks[0]}"
        how = "in the background" if case.asynchronous else "waited for"
        during = " and ".join(outcome.phases) or "nothing in particular"
        print(
            f"{len(outcomes) + 1:>3}: {case.layout}, saves {how}: {who} killed {case.delay * 1000:.0f} ms into "
            f"{case.phase} {case.occurrence}, during {during}; {outcome.lost} steps again: "
            f"{outcome.fault or 'as undisturbed'}",
            flush=True,
        )
        outcomes.append(outcome)
    good = sum(not outcome.fault for outcome in outcomes)
    most = max(outcome.lost for outcome in outcomes)
    killed = sum(outcome.was_killed for outcome in outcomes)
    print(f"seed {arguments.seed}: {killed} of {len(outcomes)} runs were killed, at most {most} steps were done again")
    print(f"{good} of {len(outcomes)} resumed and ended as undisturbed runs")
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
