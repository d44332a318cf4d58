"""The section `objective`: what is trained."""

from __future__ import annotations

from pydantic import ConfigDict, PrivateAttr

from megatron_mdm.config.sections.section import Section

DEFAULT = "masked"


class ObjectiveConfig(Section):
    """A name, and further keys: those of the objective's own model, which checks them (objectives/base.py)."""

    model_config = ConfigDict(extra="allow")

    name: str = DEFAULT  # of objectives/: masked, autoregressive, or one that code outside the package has added
    _places: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)  # where each key was written

    def written_at(self, places: dict[tuple[str, ...], str]) -> None:
        """Keep what an error of these keys can name: file and line, or override, by key from the whole's root."""
        self._places = places

    @property
    def places(self) -> dict[tuple[str, ...], str]:
        return self._places

    def __eq__(self, other: object) -> bool:
        """Compare the values: where they were written does not count."""
        return isinstance(other, ObjectiveConfig) and self.model_dump() == other.model_dump()


class ObjectiveOptions(Section):
    """What an objective's section may hold; an objective with keys of its own has a subclass with them."""

    name: str = DEFAULT
