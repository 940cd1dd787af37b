"""The laws of attacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.view import eps_of
from robustmail.contracts.samples import (
    Law,
    all_finite,
    changes_of_generators,
    changes_of_model,
    random_images,
    sample_model,
)
from robustmail.errors import AttackError, NonFiniteError
from robustmail.norms import max_distance, norm_of, tolerance
from robustmail.step import Adversarial

__all__ = ["ATTACK_LAWS"]


def _attacked(attack: Any) -> tuple[Tensor, Tensor]:
    """(x, x_adv) of a batch that contains two corners of [0, 1]: an image of zeros and an image of ones."""
    model, (x, y) = sample_model(), random_images()
    x = torch.cat([x[:-2], torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    return x, _images_of(attack(model, x, y))


def _images_of(result: Any) -> Any:
    return result.x if isinstance(result, Adversarial) else result


def _shape(attack: Any) -> str | None:
    x, x_adv = _attacked(attack)
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        return f"returned {getattr(x_adv, 'shape', type(x_adv).__name__)}, expected {list(x.shape)} of {x.dtype}"
    return "carries a graph" if x_adv.requires_grad else all_finite(x_adv)


def _box(attack: Any) -> str | None:
    _, x_adv = _attacked(attack)
    low, high = x_adv.min().item(), x_adv.max().item()
    return None if low >= 0 and high <= 1 else f"pixels span [{low:.3g}, {high:.3g}]"


def _ball(attack: Any) -> str | None:
    eps = eps_of(attack)
    if eps is None:
        return None
    x, x_adv = _attacked(attack)
    distance = max_distance(x, x_adv, norm_of(attack)).item()
    return None if distance <= eps + tolerance(eps) else f"an image lies {distance:.4g} away, eps is {eps:.4g}"


def _model_unchanged(attack: Any) -> str | None:
    model, (x, y) = sample_model(), random_images()
    return changes_of_model(model, lambda: attack(model, x, y))


def _model_unchanged_after_failure(attack: Any) -> str | None:
    model, (x, y) = sample_model(), random_images()

    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    def failing_attack() -> None:
        handle = model.head.register_forward_hook(fail)
        try:
            attack(model, x, y)
        except (ArithmeticError, AttackError):
            pass
        finally:
            handle.remove()

    return changes_of_model(model, failing_attack)


def _generators_unchanged(attack: Any) -> str | None:
    model, (x, y) = sample_model(), random_images()
    return changes_of_generators(lambda: attack(model, x, y))


def _inputs_unchanged(attack: Any) -> str | None:
    model, (x, y) = sample_model(), random_images()
    before = x.clone(), y.clone()
    attack(model, x, y)
    return None if torch.equal(x, before[0]) and torch.equal(y, before[1]) else "wrote into the images it was given"


def _no_nan(attack: Any) -> str | None:
    model, (x, y) = sample_model(), random_images()
    nn.init.constant_(model.head.weight, float("nan"))
    try:
        result = attack(model, x, y)
    except (NonFiniteError, AttackError):
        return None
    return all_finite(_images_of(result))


def _any_classes(attack: Any) -> str | None:
    for classes in (2, 100):
        model, (x, y) = sample_model(classes), random_images(classes=classes)
        try:
            attack(model, x, y)
        except AttackError:  # allowed: APGD-T, for one, refuses two classes with a message
            continue
    return None


ATTACK_LAWS: dict[str, Law] = {
    "images of the same shape, detached and finite": _shape,
    "stays in the box": _box,
    "stays in the ball": _ball,
    "leaves modes, gradients, BatchNorm statistics and weights alone": _model_unchanged,
    "leaves no mark when the model fails": _model_unchanged_after_failure,
    "leaves the generators alone": _generators_unchanged,
    "does not write into its input": _inputs_unchanged,
    "never returns NaN": _no_nan,
    "any number of classes": _any_classes,
}
