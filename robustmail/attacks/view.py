"""What all attacks share: a protected view of the model, and checks of their input and result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.errors import AttackError, ModelError, NonFiniteError, asked_to_stop, in_brief
from robustmail.functional import precise
from robustmail.models.folded import FoldedModel
from robustmail.models.windowed import KnownImages
from robustmail.norms import ROUNDING, max_distance, tolerance
from robustmail.runtime.deferred import read_later
from robustmail.runtime.rng import fork_rng
from robustmail.step import logits_of, module_mode, restored

__all__ = ["eps_of", "ModelView", "call_model", "check_images", "check_result", "model_view", "rows_in_pass"]


def call_model(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of images [B, C, H, W], [B, classes].

    Raises ModelError if the model returns anything else than `logits_of` accepts, or calls sys.exit.
    """
    try:
        output = model(x)
    except BaseException as error:
        if isinstance(error, Exception) or asked_to_stop(error):
            raise
        wrong = f"leaves with {in_brief(error)}"  # without this the process would end with the model's own exit code
        raise ModelError("the model", wrong, "Raise an error instead.") from error
    return logits_of(output)


class ModelView(nn.Module):
    """The model as an attack sees it: float32 logits, and train and eval modes that no library can change.

    finite: scalar bool, whether all logits so far were finite; None before the first forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.finite: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> logits [B, classes], float32 or float64"""
        if x.requires_grad:  # libraries call .view on the gradient, whose strides would be channels-last
            x = x.view_as(x)
            x.register_hook(Tensor.contiguous)
        logits = precise(call_model(self.model, x))
        finite = logits.detach().isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite  # `check_result` reads it
        return logits

    @property
    def max_pass(self) -> int:
        """Most images in a pass of the model; 0 if it does not tell."""
        most = getattr(self.model, "max_pass", 0)
        return most if isinstance(most, int) else 0

    def known_images(self, x: Tensor, side: int) -> KnownImages | None:
        """The images [M, C, H, W], ready for changes in squares of `side` pixels; None for a model that cannot tell the
        logits without a pass of the whole images."""
        ready = getattr(self.model, "known_images", None)
        return ready(x, side) if callable(ready) else None

    def train(self, mode: bool = True) -> ModelView:
        """Do nothing: libraries would put all modules in train mode after the attack. `model_view` sets the modes."""
        return self


@contextmanager
def model_view(model: nn.Module, which: str = "eval") -> Iterator[ModelView]:
    """Yield the model for an attack, and restore it and the global generators on exit, also after an error.

    Inside the context: all modules in "eval" (or "train") mode, parameters without gradients, gradients enabled, the
    global generators forked. On exit: mode of each module, `.grad`, `requires_grad`, buffers and generators as before.
    So an attack's noise depends only on the state of the generators: a caller that wants other noise must advance or
    reseed them, as `fit` does. A ModelView passed as `model` is yielded unchanged. A FoldedModel is refreshed from the
    live weights first.
    """
    if isinstance(model, ModelView):
        yield model
        return
    if isinstance(model, FoldedModel):
        model.refresh()
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with (
        fork_rng(),
        module_mode(model, which),
        torch.inference_mode(False),
        restored(model.buffers()),
        torch.enable_grad(),
    ):
        try:
            for p, _, _ in parameters:
                p.requires_grad_(False)
                p.grad = None
            yield ModelView(model)
        finally:
            for p, requires_grad, grad in parameters:
                p.requires_grad_(requires_grad)
                p.grad = grad


def rows_in_pass(attack: Any, images: int) -> int:
    """How many rows an attack of torchattacks should ask about at once; `images`, if the model does not tell."""
    return (attack.model.max_pass if isinstance(attack.model, ModelView) else 0) or images


def eps_of(attack: object) -> float | None:
    """The radius of an attack's ball: its attribute `eps`, if that is a number; else None."""
    eps = getattr(attack, "eps", None)
    eps = eps.item() if isinstance(eps, Tensor) and eps.numel() == 1 else eps
    return float(eps) if isinstance(eps, Real) and not isinstance(eps, bool) else None


def check_images(who: str, x: Tensor) -> None:
    """Check that x is floats [B, C, H, W] in [0, 1], at least one image. Raises AttackError."""
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise AttackError(
            who,
            f"images must be floats of shape [B, C, H, W], not {str(x.dtype)[6:]} of {list(x.shape)}",
            "Divide bytes by 255.",
        )

    def check(span: list[float]) -> None:
        low, high = span
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise AttackError(
                who,
                f"images must lie in [0, 1], these span [{low:.3g}, {high:.3g}]",
                "Give the model a `normalize` instead of normalising its input.",
            )

    read_later(torch.stack(x.detach().aminmax()), check)


def check_result(who: str, view: ModelView, x: Tensor, x_adv: Tensor, eps: float | None, norm: str | None) -> Tensor:
    """Return the attack's images, detached, in the dtype and on the device of x, clamped to [0, 1].

    who: the attack's name in error messages.
    view: the view that the attack used; it knows whether all logits were finite.
    x, x_adv: the original and the adversarial images, [B, C, H, W].
    eps, norm: the ball around x, checked up to rounding; with None for either it is not checked.

    Raises NonFiniteError if the model returned NaN or infinity; AttackError for another shape, or images outside
    [0, 1] or outside the ball.
    """
    if x_adv.shape != x.shape:
        raise AttackError(who, f"returned images of shape {list(x_adv.shape)} for {list(x.shape)}")
    x_adv = x_adv.detach().to(x)
    ok = view.finite if view.finite is not None else torch.ones((), dtype=torch.bool, device=x.device)

    def check(values: list[float]) -> None:
        finite, low, high, distance = values
        if not finite:
            raise NonFiniteError(
                who, "the model returned NaN or infinite logits", "Lower the learning rate, or look for a broken layer."
            )
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also true of NaN
            raise AttackError(who, f"left the box: pixels span [{low:.4g}, {high:.4g}], not [0, 1]")
        if eps is not None and norm is not None and not distance <= eps + tolerance(eps):
            raise AttackError(
                who,
                f"left its ball: an image lies {distance * 255:.2f}/255 away in {norm}, eps is {eps * 255:.2f}/255",
                "Use an attack whose eps bounds the distance.",
            )

    read_later(torch.stack([ok.to(x), *x_adv.aminmax(), max_distance(x, x_adv, norm)]), check, ok)
    return x_adv.clamp(0, 1)
