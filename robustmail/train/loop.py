"""The training loop: a generator of plain records; the caller iterates over them and shows them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from robustmail.checkpoints import load_saved
from robustmail.errors import RecipeError
from robustmail.evaluation.attack_specs import attack_spec, in_turn, passes_per_image
from robustmail.evaluation.evaluator import evaluate_attacks
from robustmail.evaluation.statistics import wilson
from robustmail.fields import describe
from robustmail.models.classifier import build
from robustmail.models.freezing import freeze, trained_parameters
from robustmail.models.precision import PrecisionChoice, backends, compute_models
from robustmail.plugin_calls import call_plugin
from robustmail.recipe import Recipe
from robustmail.records import AttackResult, EpochFinished, Forecast, Record, RunStarted, StepFinished
from robustmail.runtime.devices import describe_device, pick_device
from robustmail.runtime.distributed import shard_batch, world_size
from robustmail.runtime.rng import fork_rng
from robustmail.step import Context
from robustmail.text import percent
from robustmail.train.batches import augmentation_text, epoch_batches
from robustmail.train.dry_run import dry_run_step
from robustmail.train.optimizer_schedule import apply_schedules, scheduled_fields
from robustmail.train.state import State, kept_epoch_name, micro_batches
from robustmail.train.step_queue import StepQueue
from robustmail.train.train_step import train_step

__all__ = ["collapsed", "fit", "reproduce", "worse"]

WARM_UP = 5  # steps before a forecast


def fit(recipe: Recipe, state: State | None = None, name: str = "recipe") -> Generator[Record, None, None]:
    """Train, yielding a record after each step and each epoch; the state is saved on the way.

        for record in fit(recipe): print(record)

    recipe: what to train.
    state: where to start; None: at the beginning, without a folder.
    name: of the recipe, for the first record.

    Leaving the loop early (break, close()) completes the state, which can then be saved. Raises NonFiniteError at a
    loss or gradient that is not finite; the model is then as it was before that step.
    """
    state = state or State.fresh(recipe)
    yield _run_started(recipe, state, name)
    queue, forecaster, parameters = StepQueue(state), _Forecaster(recipe, state), trained_parameters(state.model)
    scheduled = scheduled_fields(
        recipe.optimizer, lambda spec: call_plugin("optimizer", spec, parameters), recipe.epochs, state.steps
    )
    try:
        while state.epoch < recipe.epochs:
            current = recipe.at(state.epoch)
            order = epoch_batches(len(state.train.y), recipe.batch, recipe.seed, state.epoch, state.images.extra)
            for indices in order[state.step :]:
                apply_schedules(scheduled, state.optimizer, state.epoch + state.step / state.steps)  # within an epoch
                yield from queue.launch(current, indices)
                for finished in _read_and_save(queue, state, is_last=state.step == len(order)):
                    yield finished
                    if (forecast := forecaster.tick(finished)) is not None:
                        yield forecast
            yield _end_epoch(recipe, current, state)
    except GeneratorExit:
        queue.drain()
        raise


def reproduce(dump: str | Path, recipe: Recipe) -> float:
    """The loss of the batch in a run's nonfinite.pt, computed again with the recipe of that run.

    On the recipe's device; bits depend on it, and on a CPU's number of threads. Raises NonFiniteError where the attack
    already met NaN. A finite loss means that its gradient was not finite. RecipeError for a recipe with a teacher.
    """
    if recipe.teacher is not None:
        raise RecipeError("reproduce", "a recipe with a teacher cannot be reproduced from the batch alone")
    device = pick_device(recipe.device)
    content = load_saved(Path(dump), device)
    x, y, epoch, step = (content[name] for name in ("x", "y", "epoch", "step"))
    model = build(recipe.model, content["classes"], x.shape[1], recipe.normalize).to(device)
    model.load_state_dict(content["model"])
    freeze(model, recipe.freeze)
    compute = compute_models(model, PrecisionChoice(content["precision"], "as it was"), recipe.attack_mode, x)
    parts = micro_batches(recipe.batch, content.get("accumulate", 1), len(x))
    with fork_rng(), backends(), shard_batch(len(x), parts):
        context = Context(content["indices"], epoch, recipe.epochs, recipe.memory, content.get("memory", {}))
        _, loss = train_step(
            recipe.at(epoch), model, x, y, (epoch, step), compute=compute, targets=content.get("targets"),
            context=context,
        )  # fmt: skip
    return loss.total.item()


def _read_and_save(queue: StepQueue, state: State, is_last: bool) -> list[StepFinished]:
    """Read the steps that may not wait: all of them at the end of an epoch and before a save. Save where it is due."""
    should_save = state.should_save
    records = queue.drain(0 if is_last or should_save else queue.max_queued)
    if should_save:
        state.save()
    return records


def _end_epoch(recipe: Recipe, current: Recipe, state: State) -> EpochFinished:
    """Validate, write the weights, save; current: `recipe.at(epoch)`."""
    means = {name: total / count for name, (total, count) in state.sums.items() if count}
    state.averages.after_epoch(state.epoch, state.train)
    scores = {name: _validate(recipe, state, model) for name, model in state.averages.models().items()}
    kept = scores.pop(recipe.kept_weights) if recipe.kept_weights in scores else scores["live"]
    columns = ("loss", "weighted", "plain", "nat", "adv", "ess", "top", "right", "wrong")
    row = {
        "epoch": state.epoch, "lr": current.optimizer.lr, "weights": "on" if current.weighter else "off",
        **{f"train_{name}": means.get(name, "") for name in columns}, **kept,
        **{f"{column}_{name}": score for name, row in scores.items() for column, score in row.items()},
    }  # fmt: skip
    # Before the SWA begins the live weights stand in for it, but they are never its best epoch.
    begins = recipe.kept_weights == "swa" and state.epoch == recipe.swa
    better = begins or kept["val_rob"] > state.best
    if better:
        state.best, state.best_epoch = kept["val_rob"], state.epoch
        state.write_weights("best")  # before the state: after a kill in between, epoch and file are made again
    state.history.append(row)
    state.write_weights("last")
    if recipe.keep_every and (state.epoch + 1) % recipe.keep_every == 0:
        state.write_weights(kept_epoch_name(state.epoch + 1))
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    state.save()
    warnings = (
        worse(row, len(state.validation.y), recipe.kept_weights), collapsed(state.history, state.validation.y)
    )  # fmt: skip
    return EpochFinished(row, better, ". ".join(filter(None, warnings)))


def worse(row: Mapping[str, Any], n: int, kept: str = "ema") -> str:
    """A warning if the average of the weights that is kept is clearly worse than the live weights; "" otherwise.

    row: of metrics.csv. n: number of validation images. kept: the set of weights that is kept. Clearly: the two 95 %
    Wilson intervals do not overlap.
    """
    pairs = [(row[name], row[f"{name}_live"]) for name in ("val_nat", "val_rob") if f"{name}_live" in row]
    is_worse = [wilson(round(average * n), n)[1] < wilson(round(live * n), n)[0] for average, live in pairs]
    if not any(is_worse):
        return ""
    (nat, nat_live), (rob, rob_live) = pairs
    return (
        f"the average of the weights ({kept}), which is kept, is worse than the live weights: validation natural "
        f"{nat:.1%} against {nat_live:.1%}, robust {rob:.1%} against {rob_live:.1%}. "
        f"{'Lower ema' if kept == 'ema' else 'Begin swa later'}, or keep the live weights: select=best-live"
    ).replace("%", " %")


def collapsed(history: Sequence[Mapping[str, Any]], y: torch.Tensor) -> str:
    """A warning, once, if the model has given every validation image the commonest class in two epochs; "" otherwise.

    history: rows of metrics.csv. y: labels of the validation images. Natural and robust accuracy are then both exactly
    that class's share, which a model that tells classes apart does not hit twice.
    """
    share = int(y.bincount().max()) / len(y)
    is_constant = [row["val_nat"] == row["val_rob"] == share for row in history]
    if is_constant[-2:] != [True, True] or is_constant[-3:] == [True] * 3:
        return ""
    return (
        f"training has collapsed: two epochs in a row, natural and robust accuracy in validation are the share of the "
        f"commonest class, {percent(share)}. Lower optimizer.lr, or let eps grow: "
        "attack.eps='Ramp(high=8/255, epochs=5)'"
    )


def _validate(recipe: Recipe, state: State, model: nn.Module) -> dict[str, float]:
    """Natural and robust accuracy on the validation images, with the same attack noise in every epoch."""
    specs = [
        in_turn([attack_spec(attack, recipe.budget, state.images.classes, recipe.norm) for attack in attacks])
        for attacks in (("nat",), recipe.validate_attacks)
    ]
    records = evaluate_attacks(model, state.validation, specs, recipe.seed)
    natural, robust = (record.accuracy for record in records if isinstance(record, AttackResult))
    return {"val_nat": natural, "val_rob": robust}


def _run_started(recipe: Recipe, state: State, name: str) -> RunStarted:
    sizes = len(state.train.y), len(state.validation.y), len(state.images.test.first(recipe.test_size).y)
    return RunStarted(
        name=name, formula=recipe.formula, model=describe(recipe.model).strip("'"),
        parameters=sum(p.numel() for p in state.model.parameters()), data=state.images.mixture, sizes=sizes,
        frozen=sum(p.numel() for p in state.model.parameters() if not p.requires_grad),
        device=_device_name(state.device), epochs=recipe.epochs, steps=state.steps, burn_in=recipe.burn_in,
        epoch=state.epoch, step=state.step, note=state.note,
        precision=state.compute_models.description, augmentation=augmentation_text(recipe, state.images),
    )  # fmt: skip


def _device_name(device: torch.device) -> str:
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    return f"{describe_device(device)}{processes}"


class _Forecaster:
    """Forecasts the duration of a run once, from the median of its first steps without the very first."""

    def __init__(self, recipe: Recipe, state: State) -> None:
        self.recipe, self.state = recipe, state
        self.seconds: list[float] = []
        self.is_done = False

    def tick(self, finished: StepFinished) -> Forecast | None:
        """Take the next step; the forecast, with the step that completes the warm-up."""
        self.seconds.append(finished.seconds * self.recipe.batch / finished.images)
        if self.is_done or len(self.seconds) < min(WARM_UP + 1, self.state.steps):
            return None
        self.is_done = True
        recipe, state = self.recipe, self.state
        per_step = median(self.seconds[1:] or self.seconds)
        # Steps and evaluations are both counted in passes of an image through the model.
        forward, backward = dry_run_step(recipe.at(recipe.epochs - 1), state.images.classes, state.images.shape).total
        per_pass = per_step / (forward + 2 * backward) / recipe.batch
        left = (recipe.epochs - state.epoch) * state.steps - state.step
        # Every set is validated, the SWA from its first epoch on, after a pass over the training images.
        epochs = recipe.epochs - state.epoch
        swa_epochs = 0 if recipe.swa is None else recipe.epochs - max(state.epoch, recipe.swa)
        validations = epochs * len([name for name in recipe.weight_sets if name != "swa"]) + swa_epochs
        passes = sum(map(passes_per_image, recipe.validate_attacks)) * len(state.validation.y) * validations
        validation = per_pass * (passes + swa_epochs * len(state.train.y))
        n = len(state.images.test.first(recipe.test_size).y)
        evaluation = per_pass * n * sum(map(passes_per_image, recipe.evaluate))
        return Forecast(left * per_step + validation, evaluation, per_step, state.device.type == "cpu")
