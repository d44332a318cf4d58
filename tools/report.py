"""Look at runs: the program is megatron_mdm/cli/report.py."""

from megatron_mdm.cli.report import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
