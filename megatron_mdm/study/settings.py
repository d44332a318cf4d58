"""What a study is told: bases, tasks, methods, seeds, learning rates, budgets. A YAML file; see configs/study/."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import read_mapping, validated
from megatron_mdm.config.schema import Section
from megatron_mdm.evaluation.measures import MEASURES

Overrides = tuple[str, ...]  # section.key=value of a run's configuration
Find = Callable[[str], Path]  # a configuration's name or path → its file
FIRST_BASE = "first"


class PlanSettings(Section):
    """What a plan is told of a task's data, of which it reads none."""

    samples: int = Field(default=0, ge=0)  # of the training set
    mean_length: float = Field(default=0.0, ge=0)  # tokens of a row, eos padding included; 0: data.max_length
    eligible: float = Field(default=0.0, ge=0)  # share of the tokens that is learnt; 0: of images, else all
    hours: dict[str, float] = Field(default_factory=dict)  # published, by method: shown beside the plan's


class TaskSettings(Section):
    title: str = ""  # in tables; empty: the task's name
    config: str = ""  # the runs' configuration, where it is another than the study's
    # Folders of checkpoints that runs begin with, by the name that methods call them by; empty: random weights.
    bases: dict[str, str]
    overrides: Overrides = ()
    measure: str  # of evaluation/measures.py
    test: str  # what is asked
    settings: Overrides = ()  # key=value of generation or likelihoods
    clip: str = ""  # folder of the CLIP model of clip_score
    limit: int = Field(default=0, ge=0)  # questions to ask; 0: all
    score: str = "exact_match"  # the result's figure that is compared
    scale: float = Field(default=100.0, gt=0)  # what it is multiplied by in tables
    without: tuple[str, ...] = ()  # methods that have no meaning here
    methods: dict[str, Overrides] = Field(default_factory=dict)  # overrides of single methods on this task
    plan: PlanSettings = PlanSettings()
    response_tokens: float = Field(default=0.0, ge=0)  # of a usual response, for the claim on long ones; 0: unknown

    @field_validator("measure")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in MEASURES:
            raise ValueError(f"must be one of {', '.join(sorted(MEASURES))}")
        return value


class MethodSettings(Section):
    title: str = ""  # in tables; empty: the method's name
    file: str = ""  # a configuration's name or path; empty: methods/NAME
    overrides: Overrides = ()
    base: str = FIRST_BASE  # which of the task's
    comparable: bool = True  # trains what the others train, so that gradient variances can be ranked


class PartSettings(Section):
    """Runs: the product of its lists. What several parts ask for is done once."""

    name: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ()  # empty: all
    seeds: tuple[int, ...] = ()  # empty: the study's
    lr_factors: tuple[float, ...] = (1.0,)
    # samples: as the configuration has it. compute: as many rows a step as the study's reference has, in as many steps.
    # time: as many steps as take the reference's seconds.
    budget: Literal["samples", "compute", "time"] = "samples"


class VarianceSettings(Section):
    """Gradient variances at the base checkpoints."""

    draws: int = Field(default=0, ge=0)  # samples per way of masking; 0: they are not measured
    tasks: tuple[str, ...] = ()  # empty: all


class ClaimSettings(Section):
    """Which methods the paper's claims are about."""

    standard: str = "standard"
    ppots: str = "ppots_paper"
    mirror: str = "mirror"
    both: str = "ppots_mirror_paper"
    clipped: str = "clipped"
    causal: str = ""  # next tokens, causally: the reference for the spread over seeds
    curve: str = "ppots_epr"
    polynomial: str = "ppots_polynomial"
    ours: tuple[str, ...] = ()


class StudySettings(Section):
    folder: str
    config: str  # of the runs: a configuration's name or path
    seeds: tuple[int, ...] = (42, 731, 20231)
    reference: str = ""  # the method whose rows and seconds budgets are compared by; empty: no such budgets
    tasks: dict[str, TaskSettings]
    methods: dict[str, MethodSettings]
    parts: tuple[PartSettings, ...]
    variance: VarianceSettings = VarianceSettings()
    claims: ClaimSettings = ClaimSettings()
    ranks: int = Field(default=1, gt=0)  # of each run
    keep_checkpoints: bool = False  # of runs that are done; else what they said is kept


def read_study(path: Path) -> StudySettings:
    """Raises UserError naming file, line and key."""
    tree, origins = read_mapping(path, StudySettings)
    methods = tree.get("methods")
    if isinstance(methods, dict):  # a name alone stands for its file
        tree["methods"] = {name: value or {} for name, value in methods.items()}
    settings = validated(StudySettings, tree, origins, str(path))
    _check_names(settings, path)
    return settings


def _check_names(settings: StudySettings, path: Path) -> None:
    for part in settings.parts:
        where = f"{path}: 'parts', {part.name}"
        _all_known(part.methods, settings.methods, f"{where}: method")
        _all_known(part.tasks, settings.tasks, f"{where}: task")
        if part.budget != "samples" and settings.reference not in settings.methods:
            raise UserError(f"{where}: budget {part.budget} needs 'reference', the name of a method")
    for name, task in settings.tasks.items():
        where = f"{path}: 'tasks.{name}"
        _all_known(task.without, settings.methods, f"{where}.without': method")
        _all_known(task.methods, settings.methods, f"{where}.methods': method")
        if not task.bases:
            raise UserError(f"{where}.bases': name one at least, such as first: FOLDER (first: '' for random weights)")
        for method, chosen in settings.methods.items():
            if method not in task.without and chosen.base != FIRST_BASE and chosen.base not in task.bases:
                raise UserError(f"{where}.bases': method {method} asks for base '{chosen.base}', which is not there")


def _all_known(names: Iterable[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where} '{name}' is not among {', '.join(known)}")
