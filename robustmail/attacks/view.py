"""What every attack shares: a safe view of the model on the way in, a check of its images on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from robustmail.errors import AttackError, ModelError, NonFiniteError, RecipeError, asked_to_stop, in_brief
from robustmail.later import look
from robustmail.models.twin import Twin
from robustmail.randomness import forked
from robustmail.scores import precise
from robustmail.step import logits_of, mode, unmoved

__all__ = [
    "MOST",
    "distances",
    "eps_of",
    "norm_of",
    "reach",
    "slack",
    "Norm",
    "View",
    "answer",
    "check_budget",
    "check_counts",
    "check_images",
    "settle",
    "viewed",
]

Norm = Literal["linf", "l2"]
NORMS: dict[str, Norm] = {"linf": "linf", "inf": "linf", "l2": "l2", "2": "l2", "2.0": "l2"}  # as libraries write them
MOST = {"linf": 1.0, "l2": 64.0}  # lengths that an attack takes; in l2 enough to make every image of CIFAR's size grey
SLACK = 1e-6  # what rounding may add to a distance in float32


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """The logits that a model gives of images. Raises ModelError for one that returns none, or leaves by sys.exit."""
    try:
        said = model(x)
    except BaseException as error:
        if isinstance(error, Exception) or asked_to_stop(error):
            raise
        wrong = f"leaves with {in_brief(error)}"  # and the process would end as if all were well
        raise ModelError("the model", wrong, "Raise an error instead.") from error
    return logits_of(said)


class View(nn.Module):
    """The model as an attack sees it: float32 logits, and modes that no library can flip."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.finite: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.requires_grad
        ):  # libraries call .view on gradients, which a channels-last network returns with other strides
            x = x.view_as(x)
            x.register_hook(Tensor.contiguous)
        logits = precise(answer(self.model, x))
        finite = logits.detach().isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite  # read once, by `settle`
        return logits

    def train(self, mode: bool = True) -> View:
        """Do nothing: libraries put the model in eval and then all of it in train; its modes are ours to set."""
        return self


@contextmanager
def viewed(model: nn.Module, which: str = "eval") -> Iterator[View]:
    """Lend the model to an attack; whatever it does, and also if it fails, leave no mark.

    Inside: all modules in eval (or "train") mode, parameters that need no gradient, gradients enabled, the global
    generators forked. Afterwards modes (of each module), `.grad`, `requires_grad`, buffers and generators are as
    they were. A noise that an attack draws is thus a function of the generator's state, which a caller must move on
    (as `fit` does) to get another one. Lending a view again is free and changes nothing. A twin follows the live
    weights here, each time it is lent.
    """
    if isinstance(model, View):
        yield model
        return
    if isinstance(model, Twin):
        model.refresh()
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with (
        forked(), mode(model, which), torch.inference_mode(False), unmoved(model.buffers()), torch.enable_grad(),
    ):  # fmt: skip
        try:
            for p, _, _ in parameters:
                p.requires_grad_(False)
                p.grad = None
            yield View(model)
        finally:
            for p, needed, grad in parameters:
                p.requires_grad_(needed)
                p.grad = grad


def eps_of(attack: object) -> float | None:
    """The ball that an attack says it keeps to: its `eps`, where that is a number."""
    eps = getattr(attack, "eps", None)
    eps = eps.item() if isinstance(eps, Tensor) and eps.numel() == 1 else eps
    return float(eps) if isinstance(eps, Real) and not isinstance(eps, bool) else None


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


def reach(x: Tensor, found: Tensor, norm: str | None) -> Tensor:
    """How far the farthest of some images lies from its original."""
    return distances(x, found, norm).amax()


def slack(eps: float) -> float:
    """What rounding may add to a distance."""
    return SLACK * max(1.0, 100 * eps)


def check_budget(who: str, norm: str | None = "linf", **lengths: object) -> None:
    """Refuse lengths that are no pixel distance: eps=8 where 8/255 is meant, or a negative one.

    Raises RecipeError.
    """
    for name, value in lengths.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if value < 0:
            raise RecipeError(f"{who} (given {name}={value:g})", f"{name} is negative", f"Write {name}=8/255.")
        if value > MOST["linf" if norm == "linf" else "l2"]:
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


def check_images(who: str, x: Tensor) -> None:
    """Refuse a batch that is not images in [0, 1] (raises AttackError)."""
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise AttackError(
            who,
            f"images must be floats of shape [B, C, H, W], not {str(x.dtype)[6:]} of {list(x.shape)}",
            "Divide bytes by 255.",
        )

    def judge(span: list[float]) -> None:
        low, high = span
        if not (low >= -SLACK and high <= 1 + SLACK):
            raise AttackError(
                who,
                f"images must lie in [0, 1], these span [{low:.3g}, {high:.3g}]",
                "Give the model a `normalize` instead of normalising its input.",
            )

    look(torch.stack(x.detach().aminmax()), judge)


def settle(who: str, view: View, x: Tensor, found: Tensor, eps: float | None, norm: str | None) -> Tensor:
    """The attack's images, detached, in x's dtype; checked to be finite, in the box and in the ball around x.

    Raises NonFiniteError if the model returned NaN or infinity meanwhile, AttackError if an image broke out.
    """
    if found.shape != x.shape:
        raise AttackError(who, f"returned images of shape {list(found.shape)} for {list(x.shape)}")
    found = found.detach().to(x)
    ok = view.finite if view.finite is not None else torch.ones((), dtype=torch.bool, device=x.device)

    def judge(facts: list[float]) -> None:
        finite, low, high, far = facts
        if not finite:
            raise NonFiniteError(
                who, "the model returned NaN or infinite logits", "Lower the learning rate, or look for a broken layer."
            )
        if not (low >= -SLACK and high <= 1 + SLACK):  # also true of NaN
            raise AttackError(who, f"left the box: pixels span [{low:.4g}, {high:.4g}], not [0, 1]")
        if eps is not None and norm is not None and not far <= eps + slack(eps):
            raise AttackError(
                who,
                f"left its ball: an image lies {far * 255:.2f}/255 away in {norm}, eps is {eps * 255:.2f}/255",
                "It bounds something else than the distance; take an attack that keeps to eps.",
            )

    look(torch.stack([ok.to(x), *found.aminmax(), reach(x, found, norm)]), judge, ok)
    return found.clamp(0, 1)
