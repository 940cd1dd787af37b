"""What every attack shares: a safe view of the model on the way in, a check of its images on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn

from robustmail.errors import AttackError, ModelError, NonFiniteError, asked_to_stop, in_brief
from robustmail.functional import precise
from robustmail.models.folded import FoldedModel
from robustmail.norms import ROUNDING, max_distance, tolerance
from robustmail.runtime.deferred import read_later
from robustmail.runtime.rng import fork_rng
from robustmail.step import logits_of, module_mode, restored

__all__ = ["eps_of", "ModelView", "call_model", "check_images", "check_result", "model_view"]


def call_model(model: nn.Module, x: Tensor) -> Tensor:
    """The logits that a model gives of images. Raises ModelError for one that returns none, or leaves by sys.exit."""
    try:
        said = model(x)
    except BaseException as error:
        if isinstance(error, Exception) or asked_to_stop(error):
            raise
        wrong = f"leaves with {in_brief(error)}"  # and the process would end as if all were well
        raise ModelError("the model", wrong, "Raise an error instead.") from error
    return logits_of(said)


class ModelView(nn.Module):
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
        logits = precise(call_model(self.model, x))
        finite = logits.detach().isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite  # read once, by `check_result`
        return logits

    def train(self, mode: bool = True) -> ModelView:
        """Do nothing: libraries put the model in eval and then all of it in train; its modes are ours to set."""
        return self


@contextmanager
def model_view(model: nn.Module, which: str = "eval") -> Iterator[ModelView]:
    """Lend the model to an attack; whatever it does, and also if it fails, leave no mark.

    Inside: all modules in eval (or "train") mode, parameters that need no gradient, gradients enabled, the global
    generators forked. Afterwards modes (of each module), `.grad`, `requires_grad`, buffers and generators are as
    they were. A noise that an attack draws is thus a function of the generator's state, which a caller must move on
    (as `fit` does) to get another one. Lending a view again is free and changes nothing. A twin follows the live
    weights here, each time it is lent.
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
            for p, needed, grad in parameters:
                p.requires_grad_(needed)
                p.grad = grad


def eps_of(attack: object) -> float | None:
    """The ball that an attack says it keeps to: its `eps`, where that is a number."""
    eps = getattr(attack, "eps", None)
    eps = eps.item() if isinstance(eps, Tensor) and eps.numel() == 1 else eps
    return float(eps) if isinstance(eps, Real) and not isinstance(eps, bool) else None


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
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise AttackError(
                who,
                f"images must lie in [0, 1], these span [{low:.3g}, {high:.3g}]",
                "Give the model a `normalize` instead of normalising its input.",
            )

    read_later(torch.stack(x.detach().aminmax()), judge)


def check_result(who: str, view: ModelView, x: Tensor, found: Tensor, eps: float | None, norm: str | None) -> Tensor:
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
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also true of NaN
            raise AttackError(who, f"left the box: pixels span [{low:.4g}, {high:.4g}], not [0, 1]")
        if eps is not None and norm is not None and not far <= eps + tolerance(eps):
            raise AttackError(
                who,
                f"left its ball: an image lies {far * 255:.2f}/255 away in {norm}, eps is {eps * 255:.2f}/255",
                "It bounds something else than the distance; take an attack that keeps to eps.",
            )

    read_later(torch.stack([ok.to(x), *found.aminmax(), max_distance(x, found, norm)]), judge, ok)
    return found.clamp(0, 1)
