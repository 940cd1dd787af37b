"""Norms and eps: what a distance is, which budgets are valid, and what rounding may add."""

from __future__ import annotations

from numbers import Real
from typing import Literal

from torch import Tensor

from robustmail.errors import RecipeError

__all__ = [
    "Norm",
    "NORMS",
    "MAX_EPS",
    "ROUNDING",
    "norm_of",
    "distances",
    "max_distance",
    "tolerance",
    "check_budget",
    "check_counts",
]


Norm = Literal["linf", "l2"]


NORMS: dict[str, Norm] = {"linf": "linf", "inf": "linf", "l2": "l2", "2": "l2", "2.0": "l2"}  # as libraries write them


MAX_EPS = {
    "linf": 1.0,
    "l2": 64.0,
}  # lengths that an attack takes; in l2 enough to make every image of CIFAR's size grey


ROUNDING = 1e-6  # what rounding may add to a distance in float32


def norm_of(attack: object) -> Norm | None:
    """The norm in which an attack's distances are measured; None for an attack that says neither norm nor eps.

    Read from its `norm`, a text or a number (a function may have one, too), or, as torchattacks has it, from the end of
    its name. Raises RecipeError for a norm other than linf and l2.
    """
    given = getattr(attack, "norm", None)
    if not (hasattr(attack, "eps") or isinstance(given, (str, Real))):
        return None
    names = getattr(attack, "__given__", (getattr(attack, "__name__", type(attack).__name__),))
    by_name = "l2" if str(names[0]).endswith("L2") else "linf"
    said = str(given if isinstance(given, (str, Real)) else by_name).lower()
    if said not in NORMS:
        raise RecipeError(
            f"attack {names[0]} (given norm={said})", "the norm is neither linf nor l2", "No other is judged."
        )
    return NORMS[said]


def distances(x: Tensor, found: Tensor, norm: str | None) -> Tensor:
    """How far each image lies from its original, [B]."""
    delta = (found - x.detach()).flatten(1)
    return delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)


def max_distance(x: Tensor, found: Tensor, norm: str | None) -> Tensor:
    """How far the farthest of some images lies from its original."""
    return distances(x, found, norm).amax()


def tolerance(eps: float) -> float:
    """What rounding may add to a distance."""
    return ROUNDING * max(1.0, 100 * eps)


def check_budget(who: str, norm: str | None = "linf", **lengths: object) -> None:
    """Refuse lengths that are no pixel distance: eps=8 where 8/255 is meant, or a negative one.

    Raises RecipeError.
    """
    for name, value in lengths.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if value < 0:
            raise RecipeError(f"{who} (given {name}={value:g})", f"{name} is negative", f"Write {name}=8/255.")
        if value > MAX_EPS["linf" if norm == "linf" else "l2"]:
            raise RecipeError(
                f"{who} (given {name}={value:g})",
                f"images live in [0, 1], so {name}={value:g} is larger than any image",
                f"Write {name}={value:g}/255." if value <= 255 else f"Write {name}=8/255.",
            )


def check_counts(who: str, **counts: object) -> None:
    """Refuse fewer than one step: an attack that does nothing would pass for a strong defence (raises RecipeError)."""
    for name, value in counts.items():
        if isinstance(value, int) and value < 1:
            raise RecipeError(f"{who} (given {name}={value})", f"{name} must be at least 1")
