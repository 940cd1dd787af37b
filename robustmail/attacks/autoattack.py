"""AutoAttack (Croce and Hein 2020) at its reference settings, built from torchattacks' classes.

torchattacks' class of that name runs 10 iterations instead of 100, and Square with another schedule. Here every
setting is written out, as it is in the reference code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.norms import Norm, check_budget
from robustmail.step import Adversarial

__all__ = ["AutoAttack"]


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """The standard AutoAttack: APGD-CE, APGD-T, FAB-T, Square; each attacks only images still classified correctly.

    100 iterations, 1 restart, at most 9 target classes, Square with 5,000 queries and no rescaled schedule.
    The targeted DLR loss needs 4 classes: with 3 classes APGD-DLR runs instead of APGD-T, with 2 classes neither;
    `replaced` returns a note on it. eps: radius of the ball, in pixels of [0, 1]. norm: "linf" or "l2".
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("AutoAttack", self.norm, eps=self.eps)

    def stages(self, classes: int) -> dict[str, Any]:
        """The attacks by name, in the order in which they run, for a model of `classes` classes."""
        shared = {"norm": {"linf": "Linf", "l2": "L2"}[self.norm], "eps": self.eps, "n_restarts": 1}
        targeted = {"n_classes": min(10, classes)}
        stages = {"apgd-ce": torchattack("APGD", steps=100, rho=0.75, loss="ce", **shared)}
        if classes >= 4:
            stages["apgd-t"] = torchattack("APGDT", steps=100, rho=0.75, **targeted, **shared)
        elif classes == 3:
            stages["apgd-dlr"] = torchattack("APGD", steps=100, rho=0.75, loss="dlr", **shared)
        fab = {"multi_targeted": True, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
        stages["fab-t"] = torchattack("FAB", steps=100, **fab, **targeted, **shared)
        square = {"n_queries": 5000, "p_init": 0.8, "loss": "margin", "resc_schedule": False}
        stages["square"] = torchattack("Square", **square, **shared)
        return stages

    def replaced(self, classes: int) -> str | None:
        """Note on how the attack for `classes` classes differs from the standard, or None if it does not."""
        if classes >= 4:
            return None
        return f"APGD-T needs 4 classes, here are {classes}: " + ("APGD-DLR instead" if classes == 3 else "left out")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("AutoAttack", x)
        with model_view(model) as view:
            x_adv = x.detach().clone()
            with torch.no_grad():
                logits = view(x)
            robust = (logits.argmax(1) == y).nonzero().squeeze(1)  # indices of the images not broken yet
            for attack in self.stages(logits.shape[1]).values():
                if not len(robust):
                    break
                candidates = attack(view, x[robust], y[robust]).x
                with torch.no_grad():
                    broken = view(candidates).argmax(1) != y[robust]
                x_adv[robust[broken]] = candidates[broken]
                robust = robust[~broken]
            return Adversarial(check_result("AutoAttack", view, x, x_adv, self.eps, self.norm))
