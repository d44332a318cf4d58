"""A study: many methods on many tasks with many seeds. The program is megatron_mdm/cli/study.py."""

from megatron_mdm.cli.study import main

if __name__ == "__main__":
    from megatron_mdm.parallel.program import run_program

    run_program(main)
