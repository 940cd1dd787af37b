"""One training step, from top to bottom.

    adversarial = attack(model, x, y)
    step = Step(model, x, y, adversarial)
    at weights perturbed by AWP, or as they are:
        terms   = objective(step)                 # forward passes, with gradient
        weights = weighter(margin(step))          # detached, mean one
        loss    = mean(weights * terms.weighted + terms.plain)
        backward, sum the gradients over all processes, clip them, optimizer.step()

The middle three lines are `Recipe.compute_loss`; train/accumulate.py computes the same in micro-batches.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from robustmail.attacks.view import model_view
from robustmail.errors import NonFiniteError, RunError, in_brief
from robustmail.evaluation.exact_inference import is_out_of_memory
from robustmail.models.precision import ComputeModels
from robustmail.plugin_calls import call_plugin, plugin_error, plugin_name
from robustmail.recipe import Loss, Recipe
from robustmail.runtime.deferred import read_later
from robustmail.runtime.devices import wide
from robustmail.runtime.distributed import all_reduce_sum
from robustmail.runtime.rng import seed_all
from robustmail.step import Adversarial, Context, Step
from robustmail.train.accumulate import batch_loss, each_micro_batch, joined

__all__ = [
    "clip_gradients", "reduce_gradients", "run_attack", "train_step", "update_parameters", "weight_perturbation",
]  # fmt: skip


def train_step(
    recipe: Recipe,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    position: tuple[int, int],
    optimizer: torch.optim.Optimizer | None = None,
    compute: ComputeModels | None = None,
    targets: Tensor | None = None,
    context: Context | None = None,
) -> tuple[Step, Loss]:
    """Train on one batch; returns what the step computed, and its loss.

    recipe: the recipe in force in this epoch, `Recipe.at(epoch)`.
    model: its parameters are updated, and left in train mode.
    x, y: this process's rows of the batch, [b, C, H, W] in [0, 1] and [b] int64.
    position: (epoch, step), both from 0; attack and update draw from generators seeded with it.
    optimizer: None computes the loss and updates nothing.
    compute: the model as the attack and the loss call it, where that differs from `model` (precision bf16).
    targets: soft labels of these rows, [b, classes]; None where labels are hard. The attack gets y.
    context: places in the training set, memory and teacher of these rows; what plugins remember is then in it.

    Inside `shard_batch` with micro-batches, memory holds the activations of one of them at a time.
    The global generators are reseeded: call it inside `fork_rng`. Raises PluginError where a plugin breaks its
    contract, NonFiniteError where loss or gradient is not finite, inside `defer_reads` only once the values are read.
    """
    attack_model, loss_model = (compute.attack, compute.loss) if compute else (model, model)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)

    def attack(rows: slice) -> Adversarial:
        seed_all(recipe.seed, "attack", *position)  # noise is drawn for the whole batch, and its rows are taken
        return run_attack(recipe, attack_model, x[rows], y[rows])

    adversarial = joined(recipe, each_micro_batch(len(x), attack))

    seed_all(recipe.seed, "update", *position)
    step = Step(loss_model, x, y, adversarial.x, adversarial.trace, targets, context)
    model.train()
    with weight_perturbation(recipe, model, step):  # the update lies inside: the order of AWP's authors
        loss = batch_loss(recipe, step)
        if optimizer is not None:
            loss.total.backward()  # type: ignore[no-untyped-call]
            loss_and_norm = reduce_gradients(optimizer, loss.total)
            clip_gradients(recipe, optimizer, loss_and_norm[1])
            update_parameters(recipe, optimizer, loss, loss_and_norm)
    return step, loss


def run_attack(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
    """Attack a batch [B, C, H, W] through a view of the model that leaves no trace in it.

    Returns detached images of the shape of x, with the attack's trace if it keeps one. Raises PluginError for a result
    of another type or shape.
    """
    with model_view(model, recipe.attack_mode) as view:
        result = call_plugin("attack", recipe.attack, view, x.clone(), y.clone())  # the attack may write into them
    adversarial = Adversarial(result) if isinstance(result, Tensor) else result
    expected = f"{str(x.dtype)[6:]} {list(x.shape)}"
    if not isinstance(adversarial, Adversarial):
        wrong = f"returned {type(result).__name__}, expected images as it was given, {expected}"
        raise plugin_error("attack", recipe.attack, wrong)
    if (adversarial.x.shape, adversarial.x.dtype) != (x.shape, x.dtype):
        returned = f"{str(adversarial.x.dtype)[6:]} {list(adversarial.x.shape)}"
        wrong = f"returned {returned}, expected images as it was given, {expected}"
        raise plugin_error("attack", recipe.attack, wrong)
    for name, values in adversarial.trace._asdict().items() if adversarial.trace else ():
        if values.ndim != 2 or values.shape[1] != len(x):
            wrong = f"its trace.{name} is {list(values.shape)}, expected [steps, {len(x)}]"
            raise plugin_error("attack", recipe.attack, wrong)
    return Adversarial(adversarial.x.detach(), adversarial.trace)


def weight_perturbation(recipe: Recipe, model: nn.Module, step: Step) -> AbstractContextManager[object]:
    """The context in which loss and update are computed: at perturbed weights (AWP), or at the weights as they are.

    Raises PluginError for a perturbation that returns no context manager.
    """
    if recipe.perturbation is None:
        return nullcontext()
    context = call_plugin("perturbation", recipe.perturbation, model, lambda: batch_loss(recipe, step.again()).total)
    if not isinstance(context, AbstractContextManager):
        wrong = f"returned {type(context).__name__}, not a context"
        raise plugin_error("perturbation", recipe.perturbation, wrong, "Use contextmanager.")
    return context


def reduce_gradients(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Sum loss and gradients over all processes, the gradients in place; returns [2] float64: loss, gradient norm."""
    trained = _trained(optimizer)
    total, *gradients = all_reduce_sum(loss.detach(), *(p.grad for p in trained if p.grad is not None))
    for p, gradient in zip(trained, gradients, strict=True):
        p.grad = gradient
    norm = nn.utils.get_total_norm(gradients) if gradients else total
    return torch.stack([wide(total), wide(norm)])


def clip_gradients(recipe: Recipe, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Scale the gradients, whose norm is given, down to the recipe's `clip` where they are longer."""
    if recipe.clip is not None:
        nn.utils.clip_grads_with_norm_(_trained(optimizer), recipe.clip, norm)


def update_parameters(recipe: Recipe, optimizer: torch.optim.Optimizer, loss: Loss, loss_and_norm: Tensor) -> None:
    """Step the optimiser, unless the loss or the gradient norm, [2], is not finite (raises NonFiniteError).

    Inside `defer_reads` the host does not know yet: a fused optimiser then skips its update on the device, and the
    error is raised once the values are read.
    """

    def check_finite(values: list[float]) -> None:
        if not math.isfinite(values[0]):
            source, todo = _nonfinite_source(recipe, loss)
            raise NonFiniteError("the loss", f"is {values[0]}{source}", todo)
        if not math.isfinite(values[1]):
            raise NonFiniteError("the gradient", "is not finite")

    found_inf = read_later(loss_and_norm, check_finite, loss_and_norm.isfinite().all())
    if found_inf is None:
        _step(optimizer)
        return
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch's GradScaler passes it
    _step(optimizer)
    del optimizer.found_inf  # type: ignore[attr-defined]


def _step(optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(). Raises RunError where memory runs out: the weights may be changed in part."""
    try:
        optimizer.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        todo = "It needs the same for any batch: use a smaller model, an optimiser with less state, or another device."
        raise RunError("the optimiser's step", f"out of memory ({in_brief(error)})", todo) from None


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _nonfinite_source(recipe: Recipe, loss: Loss) -> tuple[str, str]:
    """(the first part of the loss that is not finite, what to do where the weighted term is not to blame)"""
    only_its_own = bool(loss.terms.weighted.isfinite().all())
    todo = "Look for a division or a logarithm of zero in it." if only_its_own else ""
    parts = {
        f"margin {plugin_name(recipe.margin)}": loss.margin,
        "weights": loss.weights,
        "weighted term": loss.terms.weighted,
        "plain term": loss.terms.plain,
    }
    for name, value in parts.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            return f" (first in the {name})", todo
    return "", ""
