"""The vocabulary of a plugin author: what an attack returns, and what margins and objectives look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robustmail.errors import ModelError

__all__ = [
    "Adversarial", "Attack", "Margin", "Objective", "Perturbation", "Step", "Terms", "Trace", "Weighter",
    "counted_steps", "logits_of", "means_one", "module_mode", "restored",
]  # fmt: skip


class Trace(NamedTuple):
    """What an attack of K steps saw at each iterate, before it moved on."""

    correct: Tensor
    """[K, B] bool: was the iterate classified correctly?"""
    p_true: Tensor
    """[K, B] probability of the true class, in [0, 1]"""

    @property
    def first_wrong(self) -> Tensor:
        """The first iterate that is misclassified, 0 ... K-1, and K where there is none; [B] int64."""
        return self.correct.long().cumprod(0).sum(0)


class Adversarial(NamedTuple):
    """What an attack found."""

    x: Tensor
    """[B, C, H, W] in [0, 1]"""
    trace: Trace | None = None


class Terms(NamedTuple):
    """Per-example losses of an objective: loss = mean(w * weighted + plain)."""

    weighted: Tensor
    """[B], multiplied by the weights"""
    plain: Tensor | float = 0.0
    """[B], never weighted"""


class Step:
    """One batch at one setting of the weights; each of its logits is computed at most once.

    `x`, `x_adv`: [B, C, H, W] in [0, 1]; `y`: [B] int64; `trace`: what the attack saw, or None.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, trace: Trace | None = None) -> None:
        self.model, self.x, self.y, self.x_adv, self.trace = model, x, y, x_adv, trace
        self._logits: dict[str, Tensor] = {}

    @property
    def logits_nat(self) -> Tensor:
        """Logits of the natural images, [B, classes]."""
        return self._forward("nat")

    @property
    def logits_adv(self) -> Tensor:
        """Logits of the adversarial images, [B, classes]."""
        return self._forward("adv")

    @property
    def probs_nat(self) -> Tensor:
        """softmax of `logits_nat`, [B, classes], float32 at least."""
        return _softmax(self.logits_nat)

    @property
    def probs_adv(self) -> Tensor:
        """softmax of `logits_adv`, [B, classes], float32 at least."""
        return _softmax(self.logits_adv)

    def has(self, which: str) -> bool:
        """Are the logits of "nat" or "adv" there already, so that looking at them costs nothing?"""
        return which in self._logits

    def again(self, model: nn.Module | None = None) -> Step:
        """The same batch with nothing computed: for when the weights have moved (AWP)."""
        return Step(model or self.model, self.x, self.y, self.x_adv, self.trace)

    def detached(self) -> Step:
        """A window on this step: what was computed, without its graph; what was not is computed
        in eval mode and forgotten here, so that looking moves no BatchNorm statistic and no gradient."""
        window = DetachedStep(self.model, self.x, self.y, self.x_adv, self.trace)
        window._logits = {which: logits.detach() for which, logits in self._logits.items()}
        return window

    def _forward(self, which: str) -> Tensor:
        if which not in self._logits:
            self._logits[which] = self._compute(self.x if which == "nat" else self.x_adv)
        return self._logits[which]

    def _compute(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


class DetachedStep(Step):
    def _compute(self, images: Tensor) -> Tensor:
        with torch.no_grad(), module_mode(self.model, "eval"):
            return super()._compute(images)


def logits_of(said: Any) -> Tensor:
    """The logits of what a network returned: it itself, or its `logits`, as Hugging Face's networks have it.

    Raises ModelError for anything else, a tuple for one.
    """
    found = said.get("logits") if isinstance(said, Mapping) else getattr(said, "logits", said)
    if isinstance(found, Tensor):
        return found
    wrong = f"returned {type(said).__name__}, expected logits [B, classes], or an output that has .logits"
    raise ModelError("the model", wrong, "Return the logits alone, or wrap it in a module that does.")


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put tensors back to what they were, as BatchNorm's statistics after a pass that they shall not see."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


class module_mode:
    """Put every module of `model` in "train" or "eval" mode inside a with block, then each back in its own."""

    def __init__(self, model: nn.Module, which: str) -> None:
        self.model, self.which = model, which

    def __enter__(self) -> None:
        self._was = [(module, module.training) for module in self.model.modules()]
        self.model.train(self.which == "train")

    def __exit__(self, *_: object) -> None:
        for module, training in self._was:
            module.training = training


@runtime_checkable
class Attack(Protocol):
    """(model, x, y) -> images in the ball around x, [B, C, H, W] in [0, 1], bare or as `Adversarial`."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, /) -> Adversarial | Tensor: ...


@runtime_checkable
class Margin(Protocol):
    """step -> [B]: how far each example is from being misclassified; low = needs help."""

    def __call__(self, step: Step, /) -> Tensor: ...


@runtime_checkable
class Weighter(Protocol):
    """margin [B] -> weights [B], not negative."""

    def __call__(self, margin: Tensor, /) -> Tensor: ...


@runtime_checkable
class Objective(Protocol):
    """step -> the per-example losses, split into what is weighted and what is not."""

    def __call__(self, step: Step, /) -> Terms: ...


@runtime_checkable
class Perturbation(Protocol):
    """(model, loss) -> a context in which the weights are perturbed; `loss()` computes the batch's loss anew."""

    def __call__(self, model: nn.Module, loss: Callable[[], Tensor], /) -> AbstractContextManager[None]: ...


def counted_steps(weight: object) -> int | None:
    """K of a weight whose margins are numbers of the attack's steps, 0 ... K, as it says by `counted_steps`."""
    steps = getattr(weight, "counted_steps", None)
    return steps if isinstance(steps, int) else None


def means_one(weight: object) -> bool:
    """Has a weight mean one over a batch? All but those that say `mean_one = False`."""
    return getattr(weight, "mean_one", True) is not False


def _softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
