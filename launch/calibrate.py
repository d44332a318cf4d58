"""Calibrate P-POTS alone on the ranks that a launcher has started: the program is megatron_mdm/cli/calibrate.py."""

from megatron_mdm.cli.calibrate import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
