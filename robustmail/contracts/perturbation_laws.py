"""The laws of perturbations."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from robustmail.contracts.samples import Law, SampleModel, changes_of_model, random_images, sample_model

__all__ = ["PERTURBATION_LAWS"]


def _restores(perturbation: Any) -> str | None:
    for fails in (False, True):
        model, (x, y) = sample_model(), random_images()

        def work(model: SampleModel = model, x: Tensor = x, y: Tensor = y, fails: bool = fails) -> None:
            try:
                with perturbation(model, lambda: cross_entropy(model(x), y)):
                    if fails:
                        raise ArithmeticError("planted")
            except ArithmeticError:
                pass

        if wrong := changes_of_model(model, work):
            return wrong + (" after an exception inside" if fails else "")
    return None


PERTURBATION_LAWS: dict[str, Law] = {"restores the model exactly": _restores}
