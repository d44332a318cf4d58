"""One check in a process of its own: python -m tools.gpu_check.child NAME DEVICE FOLDER [--quick]"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_mdm.parallel.defaults import set_defaults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_defaults()
    from megatron_mdm.parallel import platform

    platform.quiet_libraries()
    from tools.gpu_check.checks import run_here
    from tools.gpu_check.outcome import Setting

    run_here(arguments.name, Setting(arguments.device, arguments.quick, arguments.folder)).write(arguments.folder)


if __name__ == "__main__":
    main()
