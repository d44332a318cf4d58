"""Model families: one file each, found by what config.json calls its architecture. README.md says how to add one."""

from __future__ import annotations

from megatron_mdm.config.errors import UserError
from megatron_mdm.models.families.dream import DREAM
from megatron_mdm.models.families.family import Family, Json
from megatron_mdm.models.families.llada import LLADA
from megatron_mdm.models.families.llama import LLAMA
from megatron_mdm.models.families.mmada import MMADA
from megatron_mdm.models.families.qwen2 import QWEN2
from megatron_mdm.models.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, MMADA, DREAM, LLAMA, QWEN2, QWEN3)}


def family_of(config: Json, where: str) -> Family:
    """The family of a config.json by its `architectures`, since two families share a model_type. Raises UserError
    naming what is not supported."""
    architectures = config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    for family in FAMILIES.values():
        if family.architecture in architectures:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise UserError(f"{where}: 'architectures' {architectures} is not supported, only {supported}")
