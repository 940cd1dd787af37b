"""The teacher of a recipe: a second network that plugins may ask, and that is not trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustmail.data.dataset import ImageData, Split
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError, RobustmailError
from robustmail.evaluation.model_loading import load_model
from robustmail.step import logits_of, module_mode
from robustmail.train.averages import WeightAverages

__all__ = ["Teacher", "open_teacher"]


class Teacher(NamedTuple):
    """A second network."""

    model: nn.Module
    note: str
    """which network it is, for people"""
    sha256: str | None
    """of its file; None for the moving average"""

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, classes], float32, of images [B, C, H, W] in [0, 1], in eval mode, without a graph."""
        with torch.no_grad(), module_mode(self.model, "eval"):
            return logits_of(self.model(images)).float()


def open_teacher(
    teacher: str, images: ImageData, validation: Split, device: torch.device, averages: WeightAverages
) -> Teacher:
    """Open what the recipe's field `teacher` names, without running code that is in it.

    images, validation: of the recipe; the held-out images decide between several ways to read the file. Raises a
    RobustmailError: the file cannot be read, is in doubt, or has another number of classes.
    """
    if teacher == "ema":
        assert averages.ema is not None  # the recipe has been checked
        return Teacher(averages.ema.module, "the teacher is the moving average", None)
    try:
        labelled = TestSet(images.name, validation, images.classes, images.class_names)
        loaded = load_model(teacher, labelled.first_at_most(1000), device=device)
    except RobustmailError as error:
        raise type(error)(f"teacher={teacher}", error.wrong, error.todo) from error
    if loaded.classes != images.classes:
        wrong = f"knows {loaded.classes} classes, the data have {images.classes}"
        raise ModelError(f"teacher={teacher}", wrong, "Train one on these data.")
    loaded.model.requires_grad_(False)
    return Teacher(loaded.model, f"the teacher is {teacher} (SHA-256 {(loaded.sha256 or '')[:16]})", loaded.sha256)
