"""Norms and eps: distances between images, valid budgets, and the rounding error that checks tolerate."""

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

NORMS: dict[str, Norm] = {"linf": "linf", "inf": "linf", "l2": "l2", "2": "l2", "2.0": "l2"}
"""Our name of each norm, by the spellings that libraries use."""

MAX_EPS = {"linf": 1.0, "l2": 64.0}
"""The largest eps that an attack accepts; 64 in l2 is enough to turn every image of CIFAR's size grey."""

ROUNDING = 1e-6
"""Rounding error of a pixel or a distance in float32."""


def norm_of(attack: object) -> Norm | None:
    """Return the norm in which an attack's distances are measured; None if it has neither `norm` nor `eps`.

    Read from the attribute `norm`, a text or a number (a function may have one too), or, as torchattacks needs it, from
    the end of the attack's name. Raises RecipeError for a norm other than linf and l2.
    """
    given = getattr(attack, "norm", None)
    if not (hasattr(attack, "eps") or isinstance(given, (str, Real))):
        return None
    names = getattr(attack, "__given__", (getattr(attack, "__name__", type(attack).__name__),))
    by_name = "l2" if str(names[0]).endswith("L2") else "linf"
    norm = str(given if isinstance(given, (str, Real)) else by_name).lower()
    if norm not in NORMS:
        raise RecipeError(
            f"attack {names[0]} (given norm={norm})", "the norm is neither linf nor l2", "Use one of these two."
        )
    return NORMS[norm]


def distances(x: Tensor, x_adv: Tensor, norm: str | None) -> Tensor:
    """Distance of each image in `x_adv` from its original in `x`, [B]; measured in linf unless norm is "l2"."""
    delta = (x_adv - x.detach()).flatten(1)
    return delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)


def max_distance(x: Tensor, x_adv: Tensor, norm: str | None) -> Tensor:
    """Largest of the batch's `distances`, a scalar."""
    return distances(x, x_adv, norm).amax()


def tolerance(eps: float) -> float:
    """How much larger than eps a distance may be because of rounding."""
    return ROUNDING * max(1.0, 100 * eps)


def check_budget(who: str, norm: str | None = "linf", **lengths: object) -> None:
    """Check that lengths such as eps and alpha are valid distances between images in [0, 1]; skips non-numbers.

    Raises RecipeError for a negative length, or one above MAX_EPS, such as eps=8 where 8/255 is meant.
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


def check_counts(who: str, minimum: int = 1, **counts: object) -> None:
    """Check that whole numbers such as steps are at least `minimum`; skips anything else.

    Raises RecipeError: with an attack of zero steps every model would seem robust.
    """
    for name, value in counts.items():
        if isinstance(value, int) and value < minimum:
            raise RecipeError(f"{who} (given {name}={value})", f"{name} must be at least {minimum}")
