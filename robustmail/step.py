"""The types that a plugin author meets: what an attack returns, what margins and objectives get, the protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from robustmail.errors import ModelError, RecipeError, did_you_mean
from robustmail.functional import one_hot
from robustmail.memory import Memory

__all__ = [
    "Adversarial", "Attack", "Augmentation", "Context", "Margin", "Objective", "Perturbation", "Step", "Terms", "Trace",
    "Weighter", "counted_steps", "logits_of", "margin_range", "means_one", "module_mode", "range_of", "restored",
]  # fmt: skip

MarginFunction = TypeVar("MarginFunction", bound=Callable[..., Tensor])


class Trace(NamedTuple):
    """The model's predictions at each of the K iterates from which an attack took a step."""

    correct: Tensor
    """[K, B] bool: was the iterate classified correctly?"""
    p_true: Tensor
    """[K, B] probability of the true class, in [0, 1]"""

    @property
    def first_wrong(self) -> Tensor:
        """Index of the first misclassified iterate, 0 ... K-1, or K if there is none; [B] int64."""
        return self.correct.long().cumprod(0).sum(0)


class Adversarial(NamedTuple):
    """Result of an attack: the adversarial images and, if the attack keeps one, its trace."""

    x: Tensor
    """[B, C, H, W] in [0, 1]"""
    trace: Trace | None = None


class Terms(NamedTuple):
    """Per-example losses of an objective: loss = mean(w * weighted + plain)."""

    weighted: Tensor
    """[B], multiplied by the weights"""
    plain: Tensor | float = 0.0
    """[B], never weighted"""


@dataclass
class Context:
    """What training knows of a batch beside its images and labels.

    index: places of the images in the training set, [B] int64; the k-th generated image has the place n + k.
    epoch, epochs: the epoch under way, from 0, and their number.
    declared: what plugins remember, by name.
    stored: the rows of these examples, {name: [B, ...]}, as the step found them.
    teacher: images [B, C, H, W] -> logits [B, classes] of a second network, without a graph; None without one.
    written: rows that plugins have handed back in this step; those of an example are mixed with the old ones.
    """

    index: Tensor
    epoch: int
    epochs: int
    declared: Mapping[str, Memory] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: Callable[[Tensor], Tensor] | None = None
    written: dict[str, Tensor] = field(default_factory=dict)

    def unwritten(self) -> Context:
        """The same, before anything was handed back."""
        return replace(self, written={})

    def part(self, rows: slice | Tensor) -> Context:
        """The context of some rows of the batch."""
        stored, written = ({k: v[rows] for k, v in table.items()} for table in (self.stored, self.written))
        return replace(self, index=self.index[rows], stored=stored, written=written)


class Step:
    """One batch at one state of the model's parameters; each of its logits is computed at most once, when first used.

    model: images [B, C, H, W] -> logits [B, classes].
    x, x_adv: natural and adversarial images, [B, C, H, W] in [0, 1].
    y: labels, [B] int64; of a mixed image the class with the largest share.
    trace: the attack's trace, or None if it keeps none.
    targets: soft labels, [B, classes]; None where labels are hard.
    context: what training knows beside: `index`, `epoch`, `epochs`, `memory`, `teacher`; None outside of training.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, trace: Trace | None = None,
        targets: Tensor | None = None, context: Context | None = None,
    ) -> None:  # fmt: skip
        self.model, self.x, self.y, self.x_adv, self.trace, self._soft = model, x, y, x_adv, trace, targets
        self.context = context
        self._logits: dict[str, Tensor] = {}

    @property
    def index(self) -> Tensor:
        """Places of the images in the training set, [B] int64. Raises RecipeError outside of training."""
        return self._known("index").index

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0. Raises RecipeError outside of training."""
        return self._known("epoch").epoch

    @property
    def epochs(self) -> int:
        """The number of epochs. Raises RecipeError outside of training."""
        return self._known("epochs").epochs

    def teacher(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of the recipe's teacher for images [B, C, H, W], in eval mode, without a graph.

        Raises RecipeError: the recipe has no teacher.
        """
        teacher = self._known("teacher").teacher
        if teacher is None:
            raise RecipeError("step.teacher", "the recipe has no teacher", 'Add teacher="FILE", or teacher="ema".')
        return teacher(images)

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """What plugins remember of this batch's examples, their classes or the run, {name: [B, ...]}.

        As stored before the step; but the rows of an example are new as soon as they are written. Raises RecipeError
        outside of training.
        """
        context = self._known("memory")
        own = {k: v for k, v in context.written.items() if context.declared[k].per == "example"}
        return {**context.stored, **own}

    def remember(self, **rows: Tensor) -> None:
        """Hand back new rows, [B, ...] as declared; they are detached, and committed after the update.

        Raises RecipeError for a name that no plugin of the recipe has declared, or rows of another shape.
        """
        context = self._known("memory")
        for name, values in rows.items():
            if name not in context.stored:
                todo = did_you_mean(name, context.stored) if context.stored else "Declare it with @remembers."
                raise RecipeError(f"step.remember({name}=...)", "no plugin declares it", todo)
            old = context.stored[name]
            if not isinstance(values, Tensor) or values.shape != old.shape:
                returned = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise RecipeError(f"step.remember({name}=...)", f"got {returned}, expected rows {list(old.shape)}")
            declared, new = context.declared[name], values.detach().to(old.dtype)
            own = declared.per == "example"  # others take a mean, and are mixed when that is known
            context.written[name] = declared.decay * old + (1 - declared.decay) * new if own else new

    def _known(self, name: str) -> Context:
        if self.context is None:
            todo = "Leave it to training, or give Step a context."
            raise RecipeError(f"step.{name}", "only training knows it", todo)
        return self.context

    @property
    def labels(self) -> Tensor:
        """What `ce` takes: `y`, [B] int64, where labels are hard, else `targets`, [B, classes]."""
        return self.y if self._soft is None else self._soft

    @property
    def targets(self) -> Tensor:
        """The probabilities to learn, [B, classes] float32: mixed and smoothed, or one-hot where labels are hard.

        One-hot ones are as wide as the logits; where none are computed, it computes those of the adversarial images.
        """
        if self._soft is not None:
            return self._soft
        logits = next(iter(self._logits.values())) if self._logits else self.logits_adv
        return one_hot(self.y, logits.shape[1])

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
        """Whether the logits of "nat" or "adv" are computed already."""
        return which in self._logits

    def again(self, model: nn.Module | None = None) -> Step:
        """The same batch with no logits computed: for parameters that have changed (AWP), or another model."""
        context = self.context.unwritten() if self.context else None
        return Step(model or self.model, self.x, self.y, self.x_adv, self.trace, self._soft, context)

    def part(self, rows: slice) -> Step:
        """The step of some rows of this batch, with their logits so far."""
        trace = None if self.trace is None else Trace(*(values[:, rows] for values in self.trace))
        targets = None if self._soft is None else self._soft[rows]
        context = self.context.part(rows) if self.context else None
        step = type(self)(self.model, self.x[rows], self.y[rows], self.x_adv[rows], trace, targets, context)
        step._logits = {which: logits[rows] for which, logits in self._logits.items()}
        return step

    def know(self, which: str, logits: Tensor) -> None:
        """Take logits [B, classes] of "nat" or "adv" that were computed elsewhere, such as in micro-batches."""
        self._logits[which] = logits

    def detached(self) -> Step:
        """A copy for margins, which changes neither a gradient nor a BatchNorm statistic.

        It has this step's logits so far without their graph, and computes others in eval mode, for itself alone. What
        it remembers, this step remembers.
        """
        step = DetachedStep(self.model, self.x, self.y, self.x_adv, self.trace, self._soft, self.context)
        step._logits = {which: logits.detach() for which, logits in self._logits.items()}
        return step

    def _forward(self, which: str) -> Tensor:
        if which not in self._logits:
            self._logits[which] = self._compute(self.x if which == "nat" else self.x_adv)
        return self._logits[which]

    def _compute(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


class DetachedStep(Step):
    """A step whose logits have no graph; missing ones are computed in eval mode."""

    def _compute(self, images: Tensor) -> Tensor:
        with torch.no_grad(), module_mode(self.model, "eval"):
            return super()._compute(images)


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: the tensor itself, or its `logits` (Hugging Face's networks).

    Raises ModelError for any other output, such as a tuple.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    wrong = f"returned {type(output).__name__}, expected logits [B, classes], or an output that has .logits"
    raise ModelError("the model", wrong, "Return the logits alone, or wrap it in a module that does.")


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the tensors' values on exit; used to keep BatchNorm's statistics unchanged by a forward pass."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


class module_mode:
    """Context: every module of `model` in "train" or "eval" mode; on exit each module gets its own mode back."""

    def __init__(self, model: nn.Module, which: str) -> None:
        self.model, self.which = model, which

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.train(self.which == "train")

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


@runtime_checkable
class Attack(Protocol):
    """(model, x, y) -> images in the ball around x, [B, C, H, W] in [0, 1], bare or as `Adversarial`."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, /) -> Adversarial | Tensor: ...


@runtime_checkable
class Augmentation(Protocol):
    """(x, targets, rng) -> (x, targets): training images [B, C, H, W] in [0, 1], and probabilities [B, classes].

    x and targets are not written into; rng is a generator on the host, from which everything is drawn.
    """

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator, /) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Margin(Protocol):
    """step -> [B]: how far each example is from being misclassified; low = needs help. Gets a detached step."""

    def __call__(self, step: Step, /) -> Tensor: ...


@runtime_checkable
class Weighter(Protocol):
    """margin [B] -> weights [B], not negative."""

    def __call__(self, margin: Tensor, /) -> Tensor: ...


@runtime_checkable
class Objective(Protocol):
    """step -> per-example losses, split into the term that weights multiply and the rest."""

    def __call__(self, step: Step, /) -> Terms: ...


@runtime_checkable
class Perturbation(Protocol):
    """(model, loss) -> a context in which the parameters are perturbed; `loss()` computes the batch's loss again."""

    def __call__(self, model: nn.Module, loss: Callable[[], Tensor], /) -> AbstractContextManager[None]: ...


def counted_steps(weighter: object) -> int | None:
    """K of a weighter whose margins count the attack's steps, 0 ... K: its attribute `counted_steps`, or None."""
    steps = getattr(weighter, "counted_steps", None)
    return steps if isinstance(steps, int) else None


def margin_range(low: float, high: float) -> Callable[[MarginFunction], MarginFunction]:
    """Declare the values that a margin can have: a decorator; the ends may be infinite.

        @margin_range(0, math.inf)
        def energy(step): ...

    A weighter is held to its laws on this range. A class declares it with an attribute `range = (low, high)`.
    """

    def declare(margin: MarginFunction) -> MarginFunction:
        vars(margin)["range"] = (float(low), float(high))
        return margin

    return declare


def range_of(margin: object) -> tuple[float, float] | None:
    """(low, high) that a margin declares, or None."""
    declared = getattr(margin, "range", None)
    if not isinstance(declared, tuple) or len(declared) != 2:
        return None
    low, high = declared
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high
    return (float(low), float(high)) if numbers else None


def means_one(weighter: object) -> bool:
    """Whether a weighter's weights have mean one over a batch: true unless its attribute `normalize` is False."""
    return getattr(weighter, "normalize", True) is not False


def _softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
