"""Attacks whose examples are made on another model; the model that is evaluated only judges them."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

from torch import Tensor, nn

from robustmail.evaluation.exact_inference import exact_inference
from robustmail.step import Adversarial, Attack

__all__ = ["Transferred", "inner"]


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """An attack on another model than the one that it is called with.

    attack: the attack. source: name of the other model and fingerprint of its weights. model: the other model.
    """

    attack: Attack
    source: str
    model: InitVar[nn.Module]

    def __post_init__(self, model: nn.Module) -> None:
        object.__setattr__(self, "_network", model)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        with exact_inference(self._network) as view:  # type: ignore[attr-defined]
            result = self.attack(view, x, y)
        return Adversarial(result.x if isinstance(result, Adversarial) else result)


def inner(attack: Attack) -> Attack:
    """The attack that makes the examples: that of a `Transferred`, else the attack itself."""
    return attack.attack if isinstance(attack, Transferred) else attack
