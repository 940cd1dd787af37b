"""A recipe says what to do, as a frozen value: which data, model, attack, loss, weights, and for how long."""

from __future__ import annotations

import dataclasses
import inspect
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
from robustmail.fields import check_types, describe, field_values, iter_schedules, map_schedules, matches_type
from robustmail.models.precision import Precision
from robustmail.norms import Norm, check_budget, norm_of
from robustmail.optimizers import SGD, Optimizer
from robustmail.plugin_calls import call_plugin, is_third_party, plugin_error, plugin_name
from robustmail.runtime import distributed
from robustmail.schedules import Schedule
from robustmail.step import Attack, Margin, Objective, Perturbation, Step, Terms, Weighter, counted_steps, module_mode

__all__ = ["Loss", "Recipe"]

METHOD = [name for name, kind in KINDS.items() if kind.is_method]
"""fields that are plugins of the method, and may be schedules"""


class Loss(NamedTuple):
    """The batch's loss and what went into it: total = mean(weights * weighted + plain)."""

    total: Tensor
    terms: Terms
    margin: Tensor | None = None
    """[B], or None where nothing is weighted"""
    weights: Tensor | None = None
    """[B], or None where nothing is weighted"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, and how; a value that can be compared, printed and derived from.

    data: where images come from, e.g. cifar10(). model: a timm name, ours included, or a function
    (classes, channels) -> nn.Module. normalize: (mean, std) per channel inside the model, or None as in the paper.
    attack, objective, margin, weighter, perturbation: the method. burn_in: epochs with all weights one.
    eps: budget of validation and evaluation, by default the attack's own. attack_mode: mode of BatchNorm and dropout
    while attacking. validate: the attack that picks the best epoch on images held out of the training set.
    ema: decay d of an exponential moving average of the weights, which is then what is validated, kept and evaluated.
    The update after t others keeps min(d, (1 + t) / (10 + t)) of the average, so that short runs forget their random
    start; BatchNorm's statistics are copied. The live weights are validated beside it, and it is said where they are
    better.
    evaluate: what is run on the test set at the end, on the weights that `select` names; test_size: on the first so
    many test images only. precision: of training alone, evaluation is always exact: "fp32"; "bf16", in autocast and
    with a folded twin for attacks; or "auto", what suits device and model.
    Fields of attack, objective, weighter, perturbation and optimizer may be schedules such as Stairs, and so may
    attack, objective, margin, weighter and perturbation themselves.
    """

    data: Callable[[], Any]
    model: str | Callable[[int, int], nn.Module]
    attack: Attack
    objective: Objective
    margin: Margin | None = None
    weighter: Weighter | None = None
    burn_in: int = 0
    perturbation: Perturbation | None = None
    epochs: int
    batch: int = 128
    optimizer: Optimizer = SGD()
    ema: float | None = None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    eps: float | None = None
    attack_mode: Literal["eval", "train"] = "eval"
    validate: str = "pgd10"
    evaluate: tuple[str, ...] = ("nat", "pgd100")
    select: Literal["best", "last"] = "best"
    test_size: int | None = None
    device: str = "auto"
    precision: Precision = "auto"
    seed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "attack", adopted(self.attack))
        self._check_schedules()
        check_types(self)
        if isinstance(self.evaluate, list):
            object.__setattr__(self, "evaluate", tuple(self.evaluate))
        self._check_ranges()
        self._check_method()

    def but(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed. Raises RecipeError for a field that does not exist."""
        fields = field_values(self)
        for name in changes:
            if name not in fields:
                raise RecipeError(f"Recipe (given {name}=...)", f"no field {name!r}", did_you_mean(name, fields))
        return dataclasses.replace(self, **changes)

    def at(self, epoch: float) -> Recipe:
        """The recipe in force at a 0-based epoch: schedules resolved, no weights during the burn-in."""
        now = self._resolved(epoch)
        return dataclasses.replace(now, margin=None, weighter=None) if epoch < self.burn_in else now

    def change_points(self) -> list[int]:
        """The epochs, 0 first, at which something new begins."""
        turns = {0, self.burn_in, *(turn for s in iter_schedules(self) for turn in s.change_points())}
        return sorted(turn for turn in turns if turn < self.epochs)

    def compute_loss(self, step: Step) -> Loss:
        """The loss of one batch with its ingredients.

        The objective goes first: it alone decides which forward passes run in train mode, and in which order. The
        margin looks second, through a detached window; so it can act through the weights and in no other way.
        Raises PluginError if a plugin returns something of the wrong shape.
        """
        terms = call_plugin("objective", self.objective, step)
        if not isinstance(terms, Terms):
            raise plugin_error(
                "objective", self.objective, f"returned {type(terms).__name__}, not Terms(weighted, plain)"
            )
        _expect_batch("objective", self.objective, terms.weighted, len(step.y))
        if not isinstance(terms.plain, (int, float)):
            _expect_batch("objective", self.objective, terms.plain, len(step.y))
        if self.margin is None or self.weighter is None:
            return Loss(distributed.global_mean(terms.weighted + terms.plain), terms)
        with torch.no_grad(), _watching(step.model):
            margin = call_plugin("margin", self.margin, step.detached())
            _expect_batch("margin", self.margin, margin, len(step.y))
            whole = distributed.gather_batch(margin)  # weights have mean one over the batch of all processes
            weights = call_plugin("weighter", self.weighter, whole)
            _expect_batch("weighter", self.weighter, weights, len(whole))
            weights = distributed.local_rows(weights)
        return Loss(distributed.global_mean(weights * terms.weighted + terms.plain), terms, margin, weights)

    def loss(self, step: Step) -> Tensor:
        """The loss of one batch: mean(w * weighted + plain), w = weight(margin), detached."""
        return self.compute_loss(step).total

    def own_plugins(self) -> dict[str, Any]:
        """The plugins that are not robustmail's own, by kind."""
        now = self.at(self.epochs - 1)
        plugins = {kind: getattr(now, kind) for kind in METHOD}
        return {kind: plugin for kind, plugin in plugins.items() if plugin is not None and is_third_party(plugin)}

    def _resolved(self, epoch: float) -> Recipe:
        """Every schedule as at an epoch, the weights included though it lie in the burn-in."""
        return map_schedules(self, lambda schedule: schedule.at_epoch(epoch))

    @property
    def _last(self) -> Recipe:
        return self._resolved(self.epochs - 1)

    @property
    def budget(self) -> float:
        """eps of validation and evaluation: the same for all epochs, the last one's where it is a schedule."""
        attack = self._last.attack
        eps = self.eps if self.eps is not None else eps_of(attack)
        if eps is None:
            raise RecipeError(
                "Recipe", f"the attack {plugin_name(attack)} has no eps to evaluate with", "Add eps=8/255."
            )
        return float(eps)

    @property
    def norm(self) -> Norm:
        """The norm of validation and evaluation: the attack's, in the last epoch where it is a schedule."""
        return norm_of(self._last.attack) or "linf"

    @property
    def formula(self) -> str:
        """The loss in one line, with the weights spelt out on a second where there are any; as in the last epoch."""
        now = self._last
        weighted, plain = _said(now.objective, tuple[str, str], (f"{plugin_name(now.objective)}.weighted", "plain"))
        inner = f"w * {weighted}" if now.weighter else weighted
        changes = any(True for part in (self.objective, self.margin, self.weighter) for _ in iter_schedules(part))
        text = f"loss = mean( {inner}{' + ' + plain if plain else ''} ){', in the last epoch' if changes else ''}"
        if now.perturbation is not None:
            text += f"\n   at weights perturbed by {describe(self.perturbation)}"
        if now.weighter is None:
            return text
        weight = _said(now.weighter, str, f"{describe(now.weighter)} of {{m}}").replace("{m}", plugin_name(now.margin))
        start = f"; from epoch {self.burn_in + 1} on, 1 before" if self.burn_in else ""
        if self.burn_in >= self.epochs:
            start = f"; NEVER USED: burn_in={self.burn_in} covers all {self.epochs} epochs"
        return f"{text}\n   w = {weight}{start}"

    def _check_schedules(self) -> None:
        for name, value in field_values(self).items():
            if isinstance(value, Schedule) and name not in METHOD:
                raise RecipeError(f"Recipe (given {name}={describe(value)})", f"{name} cannot change with the epoch")

    def _check_ranges(self) -> None:
        if len(set(self.evaluate)) < len(self.evaluate):
            raise RecipeError(f"Recipe (given evaluate={describe(self.evaluate)})", "an attack is named twice")
        if self.normalize is not None and min(self.normalize[1], default=0) <= 0:
            raise RecipeError(f"Recipe (given normalize={self.normalize})", "a standard deviation must be positive")
        for name, least in {"epochs": 1, "batch": 1, "burn_in": 0, "test_size": 1, "seed": 0}.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise RecipeError(f"Recipe (given {name}={value})", f"{name} must be at least {least}")
        if isinstance(self.ema, (int, float)) and not 0 < self.ema < 1:
            raise RecipeError(
                f"Recipe (given ema={self.ema:g})", "the decay must lie between 0 and 1", "Write ema=0.999."
            )
        for who, eps in {"Recipe": self.eps, plugin_name(self.attack): eps_of(self.attack)}.items():
            check_budget(who, self.norm, eps=eps)

    def _check_method(self) -> None:
        try:
            inspect.signature(self.data).bind()
        except (TypeError, ValueError):
            given = f"Recipe (given data={describe(self.data)})"
            raise RecipeError(given, "data must be a source, called without arguments", "Write cifar10().") from None
        if (self.margin is None) != (self.weighter is None):
            missing, there = ("weighter", "margin") if self.weighter is None else ("margin", "weighter")
            raise RecipeError(
                f"Recipe (given {there}={describe(getattr(self, there))})",
                f"a {there} does nothing without a {missing}",
                f"Add {missing}={'Sigmoid(slope=2.0, bias=0.0)' if missing == 'weighter' else 'pm_adv'}.",
            )
        # The rehearsal looks at the trace of any attack; what somebody's own calls `steps` is its own business.
        taken = None if is_third_party(self.attack) else getattr(self.attack, "steps", None)
        counted = counted_steps(self.weighter)
        if counted is not None and isinstance(taken, int) and counted != taken:
            raise RecipeError(
                f"Recipe (given weighter.steps={counted}, attack.steps={taken})",
                "the weighter counts steps of the attack, so the two must be equal",
                f"Set weighter.steps={taken} too.",
            )


def _said(plugin: Any, kind: Any, otherwise: Any) -> Any:
    """The formula that a plugin says, where it is of the kind that is read."""
    said = getattr(plugin, "formula", None)
    return said if matches_type(said, kind) else otherwise


def _watching(model: Any) -> AbstractContextManager[object]:
    """A margin that calls the model itself moves none of its statistics."""
    return module_mode(model, "eval") if isinstance(model, nn.Module) else nullcontext()


def _expect_batch(kind: str, plugin: Any, value: Any, size: int) -> None:
    if not isinstance(value, Tensor):
        raise plugin_error(kind, plugin, f"returned {type(value).__name__}, not a tensor of shape [B]")
    if value.shape != (size,):
        raise plugin_error(
            kind, plugin, f"returned shape {list(value.shape)} for a batch of {size}, expected [{size}]",
            "Return one number per example.",
        )  # fmt: skip
