"""Plan a run: memory, communication, time and cost on a cluster: the program is megatron_mdm/cli/plan.py."""

from megatron_mdm.cli.plan import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
