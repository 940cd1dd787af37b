"""Which names the reference shows, and in which groups."""

from __future__ import annotations

from typing import NamedTuple, get_args

import robustmail
from robustmail import errors, records
from robustmail.catalog import KINDS

__all__ = ["GROUPS", "Group", "documented", "full_names"]


class Group(NamedTuple):
    """A section of the page: the public names that come from its modules, and types that these take or return."""

    title: str
    modules: tuple[str, ...]
    also: tuple[str, ...] = ()
    """types that are public in their module alone, as module.Name"""
    is_plugins: bool = False
    """plugins are values that are called: their members are their parameters"""


def full_names(group: Group) -> list[str]:
    """The names of a group with their modules: those of robustmail, then the types of its modules."""
    public = [name for module in group.modules for name in robustmail._NAMES.get(module, ())]
    also = [name for name in group.also if name.rpartition(".")[2] not in public]
    return [f"robustmail.{name}" for name in (*public, *also)]


def documented() -> dict[str, str]:
    """From each name that the reference shows to the same with its module."""
    return {full.rpartition(".")[2]: full for group in GROUPS for full in full_names(group)}


GROUPS = (
    Group(
        "Training",
        ("recipe", "config.loader", "train.loop", "train.state"),
        ("recipe.Loss",),
    ),
    Group(
        "Evaluation",
        (
            "evaluation.evaluator",
            "evaluation.verify",
            "evaluation.model_loading",
            "evaluation.pretrained",
            "export",
            "evaluation.data_loading",
            "checkpoints",
        ),
        (
            "evaluation.evaluator.Evaluation",
            "evaluation.ledger.Ledger",
            "evaluation.verify.Verified",
            "evaluation.model_loading.LoadedModel",
            "export.Exported",
            "data.testsets.TestSet",
            "checkpoints.inspection.Inspection",
            "checkpoints.source.WeightsSource",
            "data.image_files.Preprocess",
        ),
    ),
    Group(
        "What plugins see",
        ("step", "memory"),
        (
            "step.Context",
            "step.Attack",
            "step.Margin",
            "step.Weighter",
            "step.Objective",
            "step.Perturbation",
            "step.Augmentation",
            "memory.Memory",
        ),
    ),
    *(
        Group(KINDS[kind].plural.capitalize(), KINDS[kind].modules, is_plugins=True)
        for kind in (
            *("margin", "weighter", "objective", "attack", "perturbation"),
            *("augmentation", "schedule", "optimizer", "data"),
        )
    ),
    Group(
        "Networks and image data", ("data.dataset", "models.classifier", "models.timm_model"), ("data.dataset.Split",)
    ),
    Group(
        "Records of runs and evaluations",
        ("records",),
        (*(f"records.{record.__name__}" for record in get_args(records.Record)), "records.WeightStats"),
    ),
    Group("Errors", ("errors",), tuple(f"errors.{name}" for name in errors.__all__ if name.endswith("Error"))),
)
