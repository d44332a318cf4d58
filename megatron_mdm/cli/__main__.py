"""`python -m megatron_mdm.cli NAME …`: what `mdm NAME …` does, for launchers: torchrun … -m megatron_mdm.cli train …"""

from megatron_mdm.cli.main import main

if __name__ == "__main__":
    main()
