"""A batch in micro-batches is that batch; memory that runs out doubles them, and nothing of the failed step stays."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustmail import (
    AT,
    AWP,
    MART,
    PGD,
    SGD,
    TRADES,
    Sigmoid,
    State,
    Terms,
    fit,
    lps,
    pm_adv,
    pm_dif,
    pm_nat,
    torch_optimizer,
)
from robustmail.errors import RecipeError, RunError
from robustmail.records import EpochFinished, MemoryExceeded, RunStarted, StepFinished
from robustmail.report.log_lines import log_line
from robustmail.runtime.distributed import shard_batch
from robustmail.runtime.rng import fork_rng
from robustmail.train import accumulate, step_queue
from robustmail.train.dry_run import dry_run
from robustmail.train.loop import collapsed
from robustmail.train.run import run
from robustmail.train.train_step import train_step
from tests.conftest import Small
from tests.train import limited
from tests.train.conftest import recipe

PGD_CE, PGD_KL = PGD(eps=0.1, alpha=0.05, steps=3), PGD(eps=0.1, alpha=0.05, steps=3, loss="kl", start="gaussian")
PLAIN = {"margin": None, "weighter": None, "burn_in": 0}
MAIL = {"margin": pm_adv, "weighter": Sigmoid(slope=5.0, bias=0.0), "burn_in": 0}
METHODS = {
    "AT": {"attack": PGD_CE, "objective": AT(), **PLAIN},
    "TRADES": {"attack": PGD_KL, "objective": TRADES(natural_passes=2), **PLAIN},
    "MART": {"attack": PGD_CE, "objective": MART(), **MAIL, "margin": lps},
    "MAIL-AT": {"attack": PGD_CE, "objective": AT(), **MAIL, "margin": pm_dif},
    "MAIL-TRADES": {"attack": PGD_KL, "objective": TRADES(), **MAIL, "margin": pm_nat},
    "AWP": {"attack": PGD_CE, "objective": AT(), **MAIL, "perturbation": AWP(gamma=0.1)},
    "clipped": {"attack": PGD_CE, "objective": AT(), **PLAIN, "clip": 0.01},
}
X, Y = torch.rand(13, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(13) % 10


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).double()


def stepped(made, model, micro_batches, x=X):
    """What a step computes, and the weights and statistics after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fork_rng(), shard_batch(len(x), micro_batches):
        step, loss = train_step(made.at(0), model, x, Y[: len(x)], (0, 0), optimizer)
    values = {f"grad {name}": p.grad for name, p in model.named_parameters()} | dict(model.state_dict())
    values |= {"loss": loss.total.detach(), "x_adv": step.x_adv, "trace": step.trace.p_true, "logits": step.logits_adv}
    return values | ({} if loss.weights is None else {"weights": loss.weights, "margin": loss.margin})


@pytest.mark.parametrize("micro_batches", [2, 5])
@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_without_batchnorm_micro_batches_compute_what_the_batch_does(changes, micro_batches):
    made = recipe.but(**changes)
    whole = stepped(made, smooth(), 1, X.double())
    parts = stepped(made, smooth(), micro_batches, X.double())
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-12, msg=name)
    if "weights" in parts:
        assert parts["weights"].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("changes", [METHODS["MAIL-TRADES"], METHODS["AWP"]])
def test_the_second_forward_pass_is_the_first_one_again_and_leaves_no_mark(changes, monkeypatch):
    """With dropout and BatchNorm: gradient and statistics are those of a graph that is kept."""
    objective = changes["objective"]

    def drawing(step):
        return Terms(objective(step).weighted * (1 + torch.rand(()) + random.random() + np.random.rand()))

    made = recipe.but(**changes | {"objective": drawing})
    replayed = stepped(made, model_with_dropout(), 3)
    monkeypatch.setattr(accumulate, "checkpoint", lambda work, x, **_: work(x))
    for name, value in stepped(made, model_with_dropout(), 3).items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-6, atol=1e-6, msg=name)


def model_with_dropout():
    torch.manual_seed(0)
    return Small()


def test_batchnorm_takes_the_statistics_of_each_micro_batch_once():
    made = recipe.but(**METHODS["AT"])
    model, alone = model_with_dropout(), model_with_dropout()
    images = stepped(made, model, 2, X[:12])["x_adv"]
    alone.train()
    for part in images.split(6):
        alone.bn(alone.conv(part))
    torch.testing.assert_close(model.bn.running_mean, alone.bn.running_mean)
    torch.testing.assert_close(model.bn.running_var, alone.bn.running_var)
    assert model.bn.num_batches_tracked == 2


def test_a_gradient_is_clipped_to_the_norm_and_a_shorter_one_is_left_alone():
    made = recipe.but(**METHODS["AT"])
    free = stepped(made, smooth(), 1, X.double())
    gradients = [value for name, value in free.items() if name.startswith("grad")]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    for clip, expected in ((norm / 2, norm / 2), (2 * norm, norm)):
        held = stepped(made.but(clip=clip), smooth(), 1, X.double())
        for name, value in free.items():
            if name.startswith("grad"):
                torch.testing.assert_close(held[name], value * expected / norm, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("changes", "said"), [
    ({"accumulate": 0}, "at least 1"), ({"accumulate": 600}, "more micro-batches than images"),
    ({"clip": 0.0}, "above 0"), ({"clip": -1.0}, "above 0"), ({"clip": math.inf}, "above 0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        recipe.but(**changes)


def test_show_counts_the_forward_passes_that_are_made_twice_and_speaks_of_batchnorm():
    made = recipe.but(**METHODS["TRADES"], optimizer=SGD(lr=0.1))
    (whole,), (parts,) = dry_run(made).values(), dry_run(made.but(accumulate=2)).values()
    assert parts.attack == whole.attack
    assert parts.update == (2 * whole.update[0], whole.update[1])
    assert "2 micro-batches, each with BatchNorm statistics of its own" in made.but(accumulate=2).formula
    assert "micro" not in made.formula


def test_no_pass_has_more_images_than_a_micro_batch_and_metrics_are_of_the_whole_batch(monkeypatch):
    monkeypatch.setitem(limited.MOST, "images", 10_000)
    state = State.fresh(limited.recipe.but(accumulate=4, objective=AT(), margin=None, weighter=None))
    state.model.net.seen.clear()
    records = iter(fit(state.recipe, state))
    step = next(record for record in records if isinstance(record, StepFinished))
    assert max(state.model.net.seen) == 128
    assert step.images == sum(step.histogram) == 512
    assert step.nat is not None


def steps_of(records):
    return [dataclasses.replace(record, seconds=0.0) for record in records if isinstance(record, StepFinished)]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "changes"), [
    ("recipe", {"optimizer": torch_optimizer("AdamW", fused=True)}), ("normed", {"ema": 0.9}),
    ("normed", {"perturbation": AWP(gamma=0.05)}),
])  # fmt: skip
def test_memory_that_runs_out_makes_the_run_that_had_the_micro_batches_from_the_start(kind, changes, monkeypatch):
    monkeypatch.setattr(step_queue, "max_queued", lambda state: int("optimizer" in changes))  # as on a GPU
    made = getattr(limited, kind).but(**changes)
    state, given = State.fresh(made), State.fresh(made.but(accumulate=8))
    records = list(fit(made, state))
    exceeded = [record for record in records if isinstance(record, MemoryExceeded)]
    assert [(r.images, r.accumulate) for r in exceeded] == [(512, 2), (256, 4), (128, 8)]
    assert ("BatchNorm" in exceeded[-1].note) == (kind == "normed")
    assert "epoch 1 step 1: out of memory with 512 images at once, tried again with accumulate=2" in log_line(
        exceeded[0]
    )
    assert steps_of(records) == steps_of(fit(made.but(accumulate=8), given))
    for name, value in given.eval_model.state_dict().items():
        assert torch.equal(value, state.eval_model.state_dict()[name]), name


@pytest.mark.long
def test_memory_may_run_out_at_any_step(monkeypatch):
    monkeypatch.setitem(limited.MOST, "images", 10_000)
    whole, state = State.fresh(limited.recipe), State.fresh(limited.recipe)
    list(fit(limited.recipe, whole))
    exceeded = []
    for record in fit(limited.recipe, state):
        exceeded += [record] if isinstance(record, MemoryExceeded) else []
        if isinstance(record, StepFinished) and record.step == 1:
            limited.MOST["images"] = 300
    assert [(record.step, record.accumulate) for record in exceeded] == [(1, 2)]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_a_resumed_run_goes_on_with_the_micro_batches_and_its_results_say_so(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    records = run(limited.normed, folder, "limited", save_every=0.0)
    for record in records:
        if isinstance(record, StepFinished) and record.step == 2:
            break
    records.close()
    records = list(run(limited.normed, folder, "limited"))
    started, finished = next(r for r in records if isinstance(r, RunStarted)), records[-1]
    assert started.step > 0
    assert not any(isinstance(record, MemoryExceeded) for record in records)
    for note in (started.note, finished.note):
        assert "accumulate=8; BatchNorm has statistics of its own" in note


@pytest.mark.long
def test_where_one_image_does_not_fit_it_is_one_line(monkeypatch):
    state = State.fresh(limited.recipe.but(batch=4))
    monkeypatch.setitem(limited.MOST, "images", 0)
    with pytest.raises(
        RunError, match=r"epoch 1, step 1: out of memory, also with 1 image at once \(OutOf.* Use a smal"
    ):
        list(fit(state.recipe, state))


def test_out_of_memory_in_the_optimiser_is_one_line_for_the_batch_is_not_to_blame(monkeypatch):
    monkeypatch.setitem(limited.MOST, "images", 10_000)
    state = State.fresh(limited.recipe)

    def step(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes")

    monkeypatch.setattr(state.optimizer, "step", step)
    with pytest.raises(RunError, match=r"the optimiser's step: out of memory .* less state"):
        list(fit(state.recipe, state))


def test_out_of_memory_after_the_update_does_not_make_it_twice(monkeypatch):
    monkeypatch.setitem(limited.MOST, "images", 10_000)
    state = State.fresh(limited.recipe)

    def metrics(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_queue, "step_metrics", metrics)
    with pytest.raises(RunError, match=r"out of memory after the update .* Use accumulate=2"):
        list(fit(state.recipe, state))


def test_a_model_that_gives_one_class_is_told_once(monkeypatch):
    monkeypatch.setitem(limited.MOST, "images", 10_000)
    made = limited.recipe.but(epochs=4, optimizer=SGD(lr=0.0), batch=2000)
    state = State.fresh(made)
    with torch.no_grad():
        state.model.net.head.bias[state.validation.y.bincount().argmax()] = 1000.0
    notes = [record.note for record in fit(made, state) if isinstance(record, EpochFinished)]
    assert [bool(note) for note in notes] == [False, True, False, False]
    assert "the commonest class" in notes[1]
    row = {"val_nat": 0.4, "val_rob": 0.3}
    assert not collapsed([row, row], torch.tensor([0, 0, 1, 2, 3]))
