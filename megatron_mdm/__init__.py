"""megatron-mdm: distributed training of masked-diffusion language models."""

__version__ = "0.1.0"
