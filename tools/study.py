"""A study: many methods on many tasks with many seeds. The program is megatron_mdm/cli/study.py."""

if __name__ == "__main__":
    # Not above: the processes of runs import this file, and need none of it.
    from megatron_mdm.cli.study import main
    from megatron_mdm.parallel.program import run_program

    run_program(main)
