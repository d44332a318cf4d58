"""Check that this code is right and fast on this machine's GPU, within ten minutes: bash launch/gpu_check.sh

Runs the checks one after another, each in a process of its own, on the first GPU that is visible. Prints how each ended
and its figures, writes gpu_check.json, and ends with 1 where one failed. --device cpu --quick tries the program itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from megatron_mdm.parallel.defaults import set_defaults
from tools.gpu_check import report
from tools.gpu_check.checks import CHECKS
from tools.gpu_check.runner import Record, run_check

SECONDS = 595.0  # for all of them


def main() -> int:
    set_defaults()  # which the checks' processes inherit
    arguments = parse()
    if arguments.device == "cuda":
        missing = missing_device()
        if missing:
            print(f"error: {missing}", file=sys.stderr)
            return 1
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="gpu_check_"))
    began = time.monotonic()
    records: list[Record] = []
    for number, name in enumerate(arguments.checks, 1):
        check = CHECKS[name]
        left = SECONDS - (time.monotonic() - began)
        print(f"[{number}/{len(arguments.checks)}] {name}: {check.what} (at most {min(check.seconds, left):.0f} s)")
        sys.stdout.flush()
        command = [sys.executable, "-m", "tools.gpu_check.child", name, arguments.device, str(folder / name)]
        command += ["--quick"] if arguments.quick else []
        records.append(run_check(name, check.what, command, min(check.seconds, left), folder / name))
        print(report.line_of(records[-1]), flush=True)
        settings = {"device": arguments.device, "quick": arguments.quick, "seconds": time.monotonic() - began}
        report.write(arguments.output, settings, records)  # so far: what is known is kept whatever happens
    print(f"\n{report.table(records)}\nwritten: {arguments.output}; what the checks printed: {folder}")
    return int(any(record.verdict == "failed" for record in records))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="check", help=f"{', '.join(CHECKS)}; all, where none is named")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes: a trial of the program")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--folder", default="", help="for what the checks write; empty: a temporary one")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.checks if name not in CHECKS]
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)} (known: {', '.join(CHECKS)})")
    arguments.checks = arguments.checks or list(CHECKS)
    return arguments


def missing_device() -> str:
    """Why torch sees no GPU; empty: it sees one."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built for the CPU; install its CUDA build"
    else:
        why = "torch sees no CUDA device; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"{why}, or try the program itself by --device cpu --quick"


if __name__ == "__main__":
    sys.exit(main())
