"""Configurations by name: those of configs/, which come with the package."""

from __future__ import annotations

import glob
from pathlib import Path

import megatron_mdm
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig

_PACKAGE = Path(megatron_mdm.__file__).parent


def config_path(name: str) -> Path:
    """The file that --config names: a path, or, where no such file exists, a packaged configuration's name (quickstart,
    pretrain/8b, configs/quickstart.yaml). Raises UserError for a name of neither."""
    if Path(name).is_file():
        return Path(name)
    packaged = _folder() / name.removeprefix("configs/").removesuffix(".yaml")
    if packaged.with_name(f"{packaged.name}.yaml").is_file():
        return packaged.with_name(f"{packaged.name}.yaml")
    if name.endswith((".yaml", ".yml")):
        return Path(name)  # whoever reads it says that it is not there
    raise UserError(f"{name}: no such configuration file, nor is one of that name packaged ({', '.join(names())})")


def absent_inputs(config: RunConfig, path: Path) -> list[str]:
    """Files that a packaged configuration names and that its reader has yet to make; empty for any other one, where an
    absent file is a mistake. path: what config was read from."""
    if not path.resolve().is_relative_to(_folder().resolve()):
        return []
    train = config.data.train
    named = [config.data.tokenizer, *([train] if isinstance(train, str) else train), config.data.validation]
    named += [config.image.tokenizer, config.image.preview]
    return [name for name in named if name and not _exists(Path(name))]


def _exists(path: Path) -> bool:
    """Whether there is such a file, or, of a corpus, files with such a prefix."""
    return path.exists() or any(path.parent.glob(f"{glob.escape(path.name)}.*"))


def names() -> list[str]:
    """Names of the packaged configurations of whole runs; configs/models and configs/methods hold parts of such."""
    paths = sorted(path.relative_to(_folder()).with_suffix("") for path in _folder().rglob("*.yaml"))
    return [path.as_posix() for path in paths if path.parts[0] not in ("models", "methods")]


def _folder() -> Path:
    """The folder of the packaged configurations: in a wheel within the package, in a checkout beside it."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"
