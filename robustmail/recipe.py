"""A recipe is a frozen value with everything that a run does: data, model, attack, loss, weights, length."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustmail.attacks.instances import adopted
from robustmail.attacks.view import eps_of
from robustmail.catalog import KINDS
from robustmail.errors import RecipeError, did_you_mean
from robustmail.fields import check_types, describe, field_values, formula_of, iter_schedules, map_schedules
from robustmail.memory import Memory, joint_memory
from robustmail.models.precision import Precision
from robustmail.norms import Norm, check_budget, norm_of
from robustmail.notebook import recipe_card
from robustmail.optimizers import SGD, Optimizer
from robustmail.plugin_calls import call_plugin, expect_batch, is_third_party, plugin_error, plugin_name
from robustmail.runtime import distributed
from robustmail.schedules import is_schedule
from robustmail.step import (
    Attack,
    Augmentation,
    Margin,
    Objective,
    Perturbation,
    Step,
    Terms,
    Weighter,
    counted_steps,
    module_mode,
)

__all__ = ["Loss", "Recipe"]

Select = Literal["best", "last", "best-live", "best-ema", "best-swa", "last-live", "last-ema", "last-swa"]
"""Which weights are kept: of an epoch, and which set."""

METHOD = [name for name, kind in KINDS.items() if kind.is_method]
"""The fields that hold plugins of the method. Each may be a schedule."""


class Loss(NamedTuple):
    """The loss of a batch and its parts: total = mean(weights * weighted + plain)."""

    total: Tensor
    """scalar, with a graph"""
    terms: Terms
    margin: Tensor | None = None
    """[B]; None without a weighter and during the burn-in"""
    weights: Tensor | None = None
    """[B]; None without a weighter and during the burn-in"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train and how, as a value that can be compared, printed and changed with `but`.

    data: a source of images, called without arguments, e.g. cifar10().
    model: a timm name (our networks are registered there), a timm_model("NAME", ...) with arguments of its constructor,
        or a function (classes, channels) -> nn.Module.
    attack: (model, x, y) -> adversarial images to train on; an attack object of torchattacks or ART is converted.
    objective: step -> per-example losses, e.g. TRADES(beta=5.0).
    margin: step -> [B], how far each example is from being misclassified; needs a weighter.
    weighter: margin [B] -> weights [B]; needs a margin. Without the two every weight is one.
    burn_in: epochs at the start in which every weight is one.
    perturbation: perturbs the model's parameters while the loss is computed, e.g. AWP(gamma=0.005).
    augment: what is done to the training images and their labels, in turn, e.g. (Crop(4), Flip(), CutMix()); one that
        is no tuple is a tuple of one. () for nothing; None for the random crops and mirror images of the data source.
    label_smoothing: s in [0, 1): the loss learns (1 - s) t + s / classes instead of the labels t, as in torch.
    epochs: number of epochs, at least 1.
    batch: images per step, over all processes; the last batch of an epoch may be smaller.
    accumulate: number of micro-batches in which a whole batch is processed, 1 ... batch, to need less memory. Attack,
        loss and weights are those of the whole batch; but BatchNorm has statistics of its own in each micro-batch.
    clip: largest norm of the gradient of all parameters, above 0: a longer one is scaled down to it; None for no limit.
    optimizer: parameters -> a torch optimiser, e.g. SGD(lr=0.1).
    ema: decay d in (0, 1) of an exponential moving average of the parameters; None for no such average. Update number
        t + 1 keeps min(d, (1 + t) / (10 + t)) of the average, so that a short run forgets its random start.
        BatchNorm's statistics are copied.
    swa: 0-based epoch from which on the parameters at the ends of the epochs are averaged with equal weight
        (stochastic weight averaging); BatchNorm's statistics are estimated anew. None for no such average.
    normalize: (mean, std) per channel, applied inside the model; None, as in the paper, for images in [0, 1].
    init: a file with the initial weights, as `robustmail eval` takes it: a checkpoint of any origin, the folder of a
        run, or hf://OWNER/NAME/FILE. All but the head, on another number of classes, has to fit the model. The file's
        SHA-256 belongs to the run. None for random weights.
    freeze: patterns, as in fnmatch, of names of parameters that are not trained, e.g. ("conv1.*", "layer1.*"). A
        BatchNorm whose parameters are all frozen keeps its running statistics.
    eps: radius of the ball in validation and evaluation, in pixels of [0, 1]; None for the attack's own.
    teacher: a second network, which plugins ask with `step.teacher(images)`: a file, as `init` takes it, or "ema", the
        moving average of this run's own weights. None for none.
    attack_mode: mode of BatchNorm and dropout during the attack, "eval" or "train".
    validate: the attack that chooses the best epoch, on images held out of the training set; or several, each run on
        the images that the ones before left standing, e.g. ("pgd10", "cw").
    evaluate: the attacks that are run on the test set at the end.
    select: the weights that are kept and evaluated: those of the "best" epoch on the validation images, or the "last";
        "best-ema", "last-swa", "best-live", ... say which set of weights. Without that: the EMA where there is one,
        else the SWA, else the live weights. All sets are validated, and a note tells where the live ones are better.
    keep_every: write the weights of every n-th epoch too, as epoch-0010.safetensors; None for none. Changes no result.
    test_size: evaluate on the first so many test images; None for all.
    device: "auto", "cpu", "cuda", "cuda:1", ...
    precision: of training alone, since evaluation is always exact: "fp32"; "bf16", autocast for the loss and a folded
        model for attacks; or "auto", which chooses by device and model.
    seed: seeds initial weights, held-out images, order, augmentation and attacks; at least 0.

    The fields of attack, objective, weighter, perturbation, augmentations and optimizer may be schedules such as
    Stairs, and so may attack, objective, margin, weighter and perturbation themselves.
    Raises RecipeError for a field of the wrong type or range, and for fields that contradict each other.
    """

    data: Callable[[], Any]
    model: str | Callable[[int, int], nn.Module]
    attack: Attack
    objective: Objective
    margin: Margin | None = None
    weighter: Weighter | None = None
    burn_in: int = 0
    perturbation: Perturbation | None = None
    augment: tuple[Augmentation, ...] | None = None
    label_smoothing: float = 0.0
    epochs: int
    batch: int = 128
    accumulate: int = 1
    clip: float | None = None
    optimizer: Optimizer = SGD()
    ema: float | None = None
    swa: int | None = None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    init: str | None = None
    freeze: tuple[str, ...] = ()
    teacher: str | None = None
    eps: float | None = None
    attack_mode: Literal["eval", "train"] = "eval"
    validate: str | tuple[str, ...] = "pgd10"
    evaluate: tuple[str, ...] = ("nat", "pgd100")
    select: Select = "best"
    keep_every: int | None = None
    test_size: int | None = None
    device: str = "auto"
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "attack", adopted(self.attack))
        if callable(self.augment):
            object.__setattr__(self, "augment", (self.augment,))
        self._check_schedules()
        check_types(self)
        for name in ("evaluate", "validate", "augment", "freeze"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        self._check_ranges()
        self._check_method()

    def _repr_html_(self) -> str:
        return recipe_card(self)

    def but(self, **changes: Any) -> Recipe:
        """A copy with some fields changed. Raises RecipeError for a field that does not exist, or a wrong value."""
        fields = field_values(self)
        for name in changes:
            if name not in fields:
                raise RecipeError(f"Recipe (given {name}=...)", f"no field {name!r}", did_you_mean(name, fields))
        return dataclasses.replace(self, **changes)

    def at(self, epoch: float) -> Recipe:
        """The recipe at a 0-based epoch: schedules replaced by their values; no weighter during the burn-in."""
        recipe = self._resolved(epoch)
        return dataclasses.replace(recipe, margin=None, weighter=None) if epoch < self.burn_in else recipe

    def change_points(self) -> list[int]:
        """The epochs, in order and 0 first, at which the burn-in ends or a schedule changes its value at once."""
        points = {0, self.burn_in, *(epoch for s in iter_schedules(self) for epoch in s.change_points())}
        return sorted(epoch for epoch in points if epoch < self.epochs)

    def compute_loss(self, step: Step) -> Loss:
        """The loss of one batch with its parts.

        The objective is called first: it alone decides which forward passes run in train mode, and in which order. The
        margin is called second, on a detached step, so it can act through the weights and in no other way. Weights have
        mean one over the batch of all processes.
        Raises PluginError if a plugin fails, or returns something of the wrong type or shape.
        """
        terms = self.compute_terms(step)
        margin = self.compute_margin(step)
        return self.weighted_loss(terms, margin)

    def compute_terms(self, step: Step) -> Terms:
        """The objective's terms, with a graph. Raises PluginError as `compute_loss`."""
        terms = call_plugin("objective", self.objective, step)
        if not isinstance(terms, Terms):
            wrong = f"returned {type(terms).__name__}, not Terms(weighted, plain)"
            raise plugin_error("objective", self.objective, wrong)
        expect_batch("objective", self.objective, terms.weighted, len(step.y))
        if not isinstance(terms.plain, (int, float)):
            expect_batch("objective", self.objective, terms.plain, len(step.y))
        return terms

    def compute_margin(self, step: Step) -> Tensor | None:
        """The margin of a detached copy of the step, [B]; None without a weighter. Raises PluginError."""
        if self.margin is None or self.weighter is None:
            return None
        with torch.no_grad(), _eval_mode(step.model):
            margin = call_plugin("margin", self.margin, step.detached())
            expect_batch("margin", self.margin, margin, len(step.y))
        return margin

    def weighted_loss(self, terms: Terms, margin: Tensor | None) -> Loss:
        """The loss of terms and margin, [B] each; None for a margin: every weight is one. Raises PluginError."""
        if margin is None or self.weighter is None:
            return Loss(distributed.global_mean(terms.weighted + terms.plain), terms)
        with torch.no_grad():
            margin_of_all = distributed.gather_batch(margin)  # of all processes
            weights = call_plugin("weighter", self.weighter, margin_of_all)
            expect_batch("weighter", self.weighter, weights, len(margin_of_all))
            weights = distributed.local_rows(weights)
        return Loss(distributed.global_mean(weights * terms.weighted + terms.plain), terms, margin, weights)

    def loss(self, step: Step) -> Tensor:
        """The loss of one batch, a scalar: mean(w * weighted + plain), w = weighter(margin), detached."""
        return self.compute_loss(step).total

    def own_plugins(self) -> list[tuple[str, Any]]:
        """The user's own plugins (those that robustmail does not ship) in the last epoch, with their kinds.

        A weighter also counts where the margin is one's own: it is lawful or not on the range of that margin.
        """
        recipe = self.at(self.epochs - 1)
        plugins = [(kind, getattr(recipe, kind)) for kind in METHOD]
        plugins += [("augmentation", augmentation) for augmentation in recipe.augment or ()]
        own_margin = recipe.margin is not None and is_third_party(recipe.margin)
        return [
            (kind, plugin)
            for kind, plugin in plugins
            if plugin is not None and (is_third_party(plugin) or (kind == "weighter" and own_margin))
        ]

    def _resolved(self, epoch: float) -> Recipe:
        """All schedules evaluated at `epoch`. Unlike `at`, keeps margin and weighter during the burn-in."""
        return map_schedules(self, lambda schedule: schedule.at_epoch(epoch))

    @property
    def _last(self) -> Recipe:
        return self._resolved(self.epochs - 1)

    @property
    def budget(self) -> float:
        """eps of validation and evaluation, the same in every epoch: that of the last one where it is a schedule.

        Raises RecipeError if neither recipe nor attack has an eps.
        """
        attack = self._last.attack
        eps = self.eps if self.eps is not None else eps_of(attack)
        if eps is None:
            wrong = f"the attack {plugin_name(attack)} has no eps to evaluate with"
            raise RecipeError("Recipe", wrong, "Add eps=8/255.")
        return float(eps)

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The sets of weights that a run has: "live", and "ema" and "swa" where the fields of these names are set."""
        return ("live", *(name for name in ("ema", "swa") if getattr(self, name) is not None))

    @property
    def kept_weights(self) -> str:
        """The set of weights that is written and evaluated, one of `weight_sets`."""
        named = self.select.partition("-")[2]
        return named or next((name for name in ("ema", "swa") if name in self.weight_sets), "live")

    @property
    def kept_epoch(self) -> str:
        """The epoch whose weights are evaluated: "best" or "last", the stem of their file."""
        return self.select.partition("-")[0]

    @property
    def memory(self) -> dict[str, Memory]:
        """What the objective and the margin of any epoch remember, by name.

        Raises RecipeError where two of them declare one name in two ways.
        """
        phases = [self._resolved(epoch) for epoch in self.change_points()]
        return joint_memory([plugin for recipe in phases for plugin in (recipe.objective, recipe.margin)])

    @property
    def validate_attacks(self) -> tuple[str, ...]:
        """The attacks of validation."""
        return (self.validate,) if isinstance(self.validate, str) else self.validate

    @property
    def norm(self) -> Norm:
        """The norm of validation and evaluation: that of the attack in the last epoch."""
        return norm_of(self._last.attack) or "linf"

    @property
    def formula(self) -> str:
        """The loss of the last epoch as text, with further lines for a perturbation and for the weights."""
        recipe = self._last
        unknown = (f"{plugin_name(recipe.objective)}.weighted", "plain")
        weighted, plain = formula_of(recipe.objective, tuple[str, str], unknown)
        inner = f"w * {weighted}" if recipe.weighter else weighted
        changes = any(True for part in (self.objective, self.margin, self.weighter) for _ in iter_schedules(part))
        text = f"loss = mean( {inner}{' + ' + plain if plain else ''} ){', in the last epoch' if changes else ''}"
        if recipe.perturbation is not None:
            text += f"\n   at weights perturbed by {describe(self.perturbation)}"
        if recipe.accumulate > 1:
            text += f"\n   in {recipe.accumulate} micro-batches, each with BatchNorm statistics of its own"
        for name, memory in self.memory.items():
            text += f"\n   remembers {name}: {memory}"
        if recipe.weighter is None:
            return text
        weight = formula_of(recipe.weighter, str, f"{describe(recipe.weighter)} of {{m}}")
        weight = weight.replace("{m}", plugin_name(recipe.margin))
        start = f"; from epoch {self.burn_in + 1} on, 1 before" if self.burn_in else ""
        if self.burn_in >= self.epochs:
            start = f"; NEVER USED: burn_in={self.burn_in} covers all {self.epochs} epochs"
        return f"{text}\n   w = {weight}{start}"

    def _check_schedules(self) -> None:
        for name, value in field_values(self).items():
            if is_schedule(value) and name not in METHOD:
                raise RecipeError(f"Recipe (given {name}={describe(value)})", f"{name} cannot change with the epoch")

    def _check_ranges(self) -> None:
        if len(set(self.evaluate)) < len(self.evaluate):
            raise RecipeError(f"Recipe (given evaluate={describe(self.evaluate)})", "an attack is named twice")
        if self.normalize is not None and min(self.normalize[1], default=0) <= 0:
            raise RecipeError(f"Recipe (given normalize={self.normalize})", "a standard deviation must be positive")
        counts = {
            "epochs": 1, "batch": 1, "accumulate": 1, "burn_in": 0, "test_size": 1, "seed": 0, "swa": 0,
            "keep_every": 1,
        }  # fmt: skip
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise RecipeError(f"Recipe (given {name}={value})", f"{name} must be at least {least}")
        if self.accumulate > self.batch:
            given = f"Recipe (given accumulate={self.accumulate}, batch={self.batch})"
            raise RecipeError(given, "more micro-batches than images", f"Write at most accumulate={self.batch}.")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise RecipeError(f"Recipe (given clip={self.clip})", "the largest norm must be above 0", "Write clip=1.0.")
        if isinstance(self.ema, (int, float)) and not 0 < self.ema < 1:
            given = f"Recipe (given ema={self.ema:g})"
            raise RecipeError(given, "the decay must lie between 0 and 1", "Write ema=0.999.")
        self._check_averages()
        if not 0 <= self.label_smoothing < 1:
            given = f"Recipe (given label_smoothing={self.label_smoothing:g})"
            raise RecipeError(given, "label_smoothing must be at least 0 and less than 1", "Write label_smoothing=0.1.")
        for who, eps in {"Recipe": self.eps, plugin_name(self.attack): eps_of(self.attack)}.items():
            check_budget(who, self.norm, eps=eps)

    def _check_averages(self) -> None:
        if not self.validate_attacks or len(set(self.validate_attacks)) < len(self.validate_attacks):
            wrong = "an attack is named twice" if self.validate_attacks else "names no attack"
            raise RecipeError(f"Recipe (given validate={describe(self.validate)})", wrong, 'Write validate="pgd10".')
        if self.swa is not None and self.swa >= self.epochs:
            given = f"Recipe (given swa={self.swa}, epochs={self.epochs})"
            raise RecipeError(given, "averaging would begin after the last epoch", f"Set swa={self.epochs * 3 // 4}.")
        if self.kept_weights not in self.weight_sets:
            name = self.kept_weights
            todo = f"Set {name}={'0.999' if name == 'ema' else self.epochs * 3 // 4}, or select={self.kept_epoch}."
            raise RecipeError(f"Recipe (given select={self.select})", f"the recipe has no {name}", todo)

    def _check_method(self) -> None:
        try:
            inspect.signature(self.data).bind()
        except (TypeError, ValueError):
            given = f"Recipe (given data={describe(self.data)})"
            raise RecipeError(given, "data must be a source, called without arguments", "Write cifar10().") from None
        if self.teacher == "ema" and self.ema is None:
            raise RecipeError("Recipe (given teacher='ema')", "the recipe has no moving average", "Set ema=0.999 too.")
        _ = self.memory  # raises
        if (self.margin is None) != (self.weighter is None):
            missing, given = ("weighter", "margin") if self.weighter is None else ("margin", "weighter")
            raise RecipeError(
                f"Recipe (given {given}={describe(getattr(self, given))})",
                f"a {given} does nothing without a {missing}",
                f"Add {missing}={'Sigmoid(slope=2.0, bias=0.0)' if missing == 'weighter' else 'pm_adv'}.",
            )
        # Of a user's own attack, `steps` may mean anything: the dry run compares the length of its trace instead.
        attack_steps = None if is_third_party(self.attack) else getattr(self.attack, "steps", None)
        counted = counted_steps(self.weighter)
        if counted is not None and isinstance(attack_steps, int) and counted != attack_steps:
            raise RecipeError(
                f"Recipe (given weighter.steps={counted}, attack.steps={attack_steps})",
                "the weighter counts steps of the attack, so the two must be equal",
                f"Set weighter.steps={attack_steps} too.",
            )


def _eval_mode(model: Any) -> AbstractContextManager[object]:
    """Eval mode, so that a margin which calls the model itself changes no BatchNorm statistic."""
    return module_mode(model, "eval") if isinstance(model, nn.Module) else nullcontext()
