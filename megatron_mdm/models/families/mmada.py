"""MMaDA: LLaDA with a table that also holds image codes."""

from __future__ import annotations

from megatron_mdm.models.families.family import Json
from megatron_mdm.models.families.llada import DEFAULTS, FIELDS, FIXED, KEYS, SILENT, LladaFamily


class MmadaFamily(LladaFamily):
    """The table has new_vocab_size rows: text and image codes."""

    def flatten(self, config: Json, where: str) -> Json:
        flat = super().flatten(config, where)
        flat["vocab_size"] = config.get("new_vocab_size") or flat["vocab_size"]
        return flat

    def unflatten(self, base: Json, changes: Json) -> Json:
        if "vocab_size" not in changes:
            return {**base, **changes}
        return {**super().unflatten(base, changes), "new_vocab_size": changes["vocab_size"]}


MMADA = MmadaFamily(
    name="mmada",
    architecture="MMadaModelLM",
    model_type="mmada",
    keys=KEYS,
    fields=FIELDS,
    fixed={**FIXED, "w_clip_vit": (False,)},
    silent=SILENT
    | {
        "codebook_size",
        "llm_model_path",
        "llm_vocab_size",
        "new_vocab_size",
        "num_new_special_tokens",
        "num_vq_tokens",
        "pretrained_model_path",
    },
    defaults=DEFAULTS,
    mask_id=126336,
)
