"""AutoAttack (Croce and Hein 2020) at its reference settings, built from torchattacks' classes.

torchattacks ships a class of that name which runs 10 iterations instead of 100 and another Square schedule; the
settings here are those of the reference code, each spelt out.
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
    """The standard AutoAttack: APGD-CE, APGD-T, FAB-T, Square; each sees only what the ones before left standing.

    100 iterations, 1 restart, 9 target classes at most, Square with 5,000 queries and no rescaled schedule.
    With fewer than 4 classes the targeted DLR loss does not exist; APGD-T is then replaced by APGD-DLR (3 classes) or
    left out (2 classes), and `replaced` says so.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("AutoAttack", self.norm, eps=self.eps)

    def stages(self, classes: int) -> dict[str, Any]:
        """The attacks in order, by name."""
        shared = {"norm": {"linf": "Linf", "l2": "L2"}[self.norm], "eps": self.eps, "n_restarts": 1}
        second = {
            "apgd-t": torchattack("APGDT", steps=100, rho=0.75, n_classes=min(10, classes), **shared),
            "apgd-dlr": torchattack("APGD", steps=100, rho=0.75, loss="dlr", **shared),
        }
        chosen = "apgd-t" if classes >= 4 else "apgd-dlr" if classes == 3 else None
        fab = {"multi_targeted": True, "n_classes": min(10, classes), "alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
        return {
            "apgd-ce": torchattack("APGD", steps=100, rho=0.75, loss="ce", **shared),
            **({chosen: second[chosen]} if chosen else {}),
            "fab-t": torchattack("FAB", steps=100, **fab, **shared),
            "square": torchattack("Square", n_queries=5000, p_init=0.8, loss="margin", resc_schedule=False, **shared),
        }

    def replaced(self, classes: int) -> str | None:
        """Where this is not quite the standard, or None."""
        if classes >= 4:
            return None
        return f"APGD-T needs 4 classes, here are {classes}: " + ("APGD-DLR instead" if classes == 3 else "left out")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("AutoAttack", x)
        with model_view(model) as view:
            found = x.detach().clone()
            with torch.no_grad():
                logits = view(x)
            standing = (logits.argmax(1) == y).nonzero().squeeze(1)
            for attack in self.stages(logits.shape[1]).values():
                if not len(standing):
                    break
                tried = attack(view, x[standing], y[standing]).x
                with torch.no_grad():
                    broken = view(tried).argmax(1) != y[standing]
                found[standing[broken]] = tried[broken]
                standing = standing[~broken]
            return Adversarial(check_result("AutoAttack", view, x, found, self.eps, self.norm))
