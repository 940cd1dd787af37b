"""A training step on four random images and a linear model: a wrong plugin fails here, before anything expensive."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustmail.attacks.view import eps_of
from robustmail.errors import in_brief
from robustmail.functional import one_hot
from robustmail.norms import max_distance, norm_of, tolerance
from robustmail.plugin_calls import call_plugin, is_third_party, plugin_error
from robustmail.recipe import Loss, Recipe
from robustmail.runtime.distributed import shard_batch, world_size
from robustmail.runtime.rng import fork_rng, generator, seed_all
from robustmail.step import Context, Step, counted_steps
from robustmail.train.accumulate import batch_loss, each_micro_batch, joined
from robustmail.train.batches import Batch, augment_batch
from robustmail.train.memory import MemoryTables
from robustmail.train.train_step import run_attack, weight_perturbation

__all__ = ["Passes", "dry_run", "dry_run_step"]


class Passes(NamedTuple):
    """Cost of one training step, in passes of the whole batch through the model."""

    attack: tuple[int, int]
    """forward, backward"""
    update: tuple[int, int]
    """forward, backward, of the loss, the margin and the weight perturbation"""

    @property
    def total(self) -> tuple[int, int]:
        """forward, backward"""
        return self.attack[0] + self.update[0], self.attack[1] + self.update[1]


def dry_run(recipe: Recipe, classes: int = 10, shape: tuple[int, int, int] = (3, 8, 8)) -> dict[int, Passes]:
    """Run one step of every phase of a recipe on four random images and a linear model.

    classes: number of classes. shape: of an image, (C, H, W). Returns the passes of a step by the epoch, from 0, at
    which each phase begins. Raises PluginError or RecipeError, naming the plugin and its file.
    """
    return {epoch: dry_run_step(recipe.at(epoch), classes, shape) for epoch in recipe.change_points()}


def dry_run_step(recipe: Recipe, classes: int, shape: tuple[int, int, int]) -> Passes:
    """Run one training step of a recipe without schedules, checking what each plugin returns; count its passes."""
    with fork_rng(), torch.enable_grad(), ExitStack() as stack:
        seed_all("rehearsal")
        model = _CountingModel(classes, shape)
        x, y, targets = _augmented(recipe, torch.rand(4, *shape), torch.arange(4) % classes, classes)
        micro_batches = min(recipe.accumulate, 4) if world_size() == 1 else 1
        stack.enter_context(shard_batch(4, micro_batches) if micro_batches > 1 else nullcontext())
        attacked = each_micro_batch(4, lambda rows: run_attack(recipe, model, x[rows], y[rows]))
        adversarial = joined(recipe, attacked)
        attack_passes = model.pop_passes(micro_batches)
        _check_images(recipe, x, adversarial.x)
        step = Step(model, x, y, adversarial.x, adversarial.trace, targets, _context(recipe, model, y, classes))
        with weight_perturbation(recipe, model, step):
            loss = batch_loss(recipe, step)
            _check_loss(recipe, loss, len(adversarial.trace.correct) if adversarial.trace else None)
            loss.total.backward()  # type: ignore[no-untyped-call]
            if not is_third_party(recipe.optimizer):  # which may count on its own network's parameters
                _try_optimizer(recipe, model)
        return Passes(attack_passes, model.pop_passes(micro_batches))


def _try_optimizer(recipe: Recipe, model: nn.Module) -> None:
    optimizer = call_plugin("optimizer", recipe.optimizer, model.parameters())
    try:
        optimizer.step()
    except Exception as error:  # a knob may make it fail in any way
        raise plugin_error("optimizer", recipe.optimizer, f"its step fails ({in_brief(error)})") from error


class _CountingModel(nn.Module):
    """A linear classifier that counts the passes through it."""

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(shape[0] * shape[1] * shape[2], classes)
        self.passes = [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        self.passes[0] += 1
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, _: Tensor) -> None:
        self.passes[1] += 1

    def pop_passes(self, micro_batches: int) -> tuple[int, int]:
        """(forward, backward) of the whole batch since the last call; each micro-batch makes its own."""
        forward, backward = (round(passes / micro_batches) for passes in self.passes)
        self.passes = [0, 0]
        return forward, backward


def _context(recipe: Recipe, model: _CountingModel, y: Tensor, classes: int) -> Context:
    """The context of the first step; the teacher is a network like the model, whose passes are not counted."""
    index = torch.arange(len(y))
    tables = MemoryTables(recipe.memory, [y], classes, y.device)

    def teacher(images: Tensor) -> Tensor:
        logits: Tensor = model.linear(images.flatten(1))
        return logits.detach()

    rows = tables.rows(index, y)
    return Context(index, 0, recipe.epochs, recipe.memory, rows, teacher if recipe.teacher else None)


def _augmented(recipe: Recipe, x: Tensor, y: Tensor, classes: int) -> Batch:
    """The batch as the recipe's augmentations leave it; what each of them returns is checked."""
    own = recipe.augment or ()
    for i, augmentation in enumerate(own):
        batch = augment_batch(recipe.but(augment=own[: i + 1]), x.clone(), y, classes, generator("rehearsal"))
        if not (batch.x.min() >= 0 and batch.x.max() <= 1):  # NaN, too
            wrong = f"left the box: pixels span [{batch.x.min():.3g}, {batch.x.max():.3g}]"
            raise plugin_error("augmentation", augmentation, wrong, "Clamp to [0, 1].")
        targets = one_hot(y, classes) if batch.targets is None else batch.targets
        if not (targets.min() >= 0 and (targets.sum(1) - 1).abs().max() < 1e-4):
            wrong = f"returned targets {[round(t, 3) for t in targets[0].tolist()]}"
            raise plugin_error("augmentation", augmentation, wrong, "Probabilities are not negative and add up to 1.")
    return augment_batch(recipe, x, y, classes, generator("rehearsal"))


def _check_images(recipe: Recipe, x: Tensor, x_adv: Tensor) -> None:
    if not x_adv.isfinite().all():
        raise plugin_error("attack", recipe.attack, "returned NaN or infinite pixels")
    if x_adv.min() < 0 or x_adv.max() > 1:
        wrong = f"left the box: pixels span [{x_adv.min():.3g}, {x_adv.max():.3g}]"
        raise plugin_error("attack", recipe.attack, wrong, "Clamp to [0, 1].")
    eps = eps_of(recipe.attack)
    if eps is not None and (distance := max_distance(x, x_adv, norm_of(recipe.attack)).item()) > eps + tolerance(eps):
        wrong = f"left its ball: {distance:.4g} from the image, eps is {eps:.4g}"
        raise plugin_error("attack", recipe.attack, wrong, "Clamp the difference.")


def _check_loss(recipe: Recipe, loss: Loss, attack_steps: int | None) -> None:
    """attack_steps: number of steps in the attack's trace, None without one."""
    if loss.margin is not None and not loss.margin.isfinite().all():
        raise plugin_error(
            "margin", recipe.margin, "returned NaN or infinity", "Look for a division or a logarithm of zero."
        )
    if recipe.weighter is not None:
        assert loss.margin is not None
        counted = counted_steps(recipe.weighter)
        if None not in (counted, attack_steps) and counted != attack_steps:
            raise plugin_error("weighter", recipe.weighter, f"counts {counted} steps, the attack takes {attack_steps}")
        counts = bool((loss.margin >= 0).all() and (loss.margin == loss.margin.round()).all())  # steps of the attack
        low, high = (0, attack_steps or 10) if counts else (-1, 1)
        for margin in (loss.margin, torch.linspace(low, high, 4)):  # four examples may all lie on one side
            weights = call_plugin("weighter", recipe.weighter, margin)
            if not (weights.isfinite().all() and weights.min() >= 0):
                raise plugin_error(
                    "weighter", recipe.weighter, f"returned {weights.tolist()}", "Weights are finite and not negative."
                )
    if not loss.total.requires_grad:
        raise plugin_error(
            "objective", recipe.objective, "returned a loss without a graph", "Do not detach, nor use no_grad."
        )
    if not loss.total.isfinite():
        raise plugin_error("objective", recipe.objective, f"returned a loss of {loss.total.item()}")
