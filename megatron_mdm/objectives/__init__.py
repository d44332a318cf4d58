"""What is trained: the table of objectives, and the one that a configuration names."""

from __future__ import annotations

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import objective_options
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import validate
from megatron_mdm.objectives.autoregressive import Autoregressive
from megatron_mdm.objectives.base import Objective
from megatron_mdm.objectives.masked import Masked
from megatron_mdm.objectives.text_to_image import TextToImage

# By objective.name. Code outside the package may add to it before it reads a configuration.
OBJECTIVES: dict[str, type[Objective]] = {
    "masked": Masked,
    "text_to_image": TextToImage,
    "autoregressive": Autoregressive,
}


def objective_of(config: RunConfig) -> Objective:
    """The objective that the section `objective` asks for. Raises UserError naming the place of what is wrong there."""
    section = config.objective
    if section.name not in OBJECTIVES:
        where = section.places.get(("objective", "name"), "objective")
        known = ", ".join(OBJECTIVES)
        raise UserError(f"{where}: 'objective.name': must be one of {known}, got {section.name!r}")
    kind = OBJECTIVES[section.name]
    return kind(config, objective_options(section, kind.Options))


def check_run(config: RunConfig, world_size: int) -> Objective:
    """Check a configuration against itself, its objective and the number of ranks. Raises UserError with the remedy."""
    validate(config, world_size)
    objective = objective_of(config)
    objective.check()
    if config.image.caption_dropout and not objective.caption_dropout:
        raise UserError(
            f"'image.caption_dropout' {config.image.caption_dropout} has no meaning for 'objective.name' "
            f"{objective.options.name}; use text_to_image, or 0"
        )
    return objective
