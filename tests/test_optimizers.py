"""Optimisers of torch and timm as values of a recipe: knobs, groups without decay, states that resume, schedules."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from robustmail import SGD, Cosine, OneCycle, Ramp, Stairs, State, WarmupCosine, fit, load_recipe, torch_optimizer
from robustmail.config.overrides import apply_overrides, parse_value
from robustmail.errors import PluginError, RecipeError
from robustmail.fields import describe
from robustmail.records import StepFinished
from robustmail.train.dry_run import dry_run
from robustmail.train.optimizer_schedule import scheduled_fields
from tests.train.conftest import recipe

NAMES = ["AdamW", "NAdam", "Adafactor", "Rprop", "Lion", "Lamb", "Lars", "Adan", "Adopt", "Muon", "AdafactorBigVision",
         "RMSpropTF", "MADGRAD"]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def steps(model, optimizer, numbers):
    for i in numbers:
        torch.manual_seed(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(8, 3, 8, 8)), torch.arange(8)).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_an_optimiser_goes_on_from_its_saved_state_to_the_bit(name):
    make = torch_optimizer(name, lr=1e-3)
    model = network()
    optimizer = make(model.parameters())
    steps(model, optimizer, range(3))
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    whole = steps(model, optimizer, range(3, 5))
    content = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    resumed = network()
    again = make(resumed.parameters())
    resumed.load_state_dict(content["model"])
    again.load_state_dict(content["optimizer"])
    for name, value in steps(resumed, again, range(3, 5)).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("make", [
    SGD(lr=0.1, weight_decay=0.05, decay_norms=False), torch_optimizer("AdamW", weight_decay=0.05, decay_norms=False),
    torch_optimizer("Lion", weight_decay=0.05, decay_norms=False),
])  # fmt: skip
def test_norms_and_biases_are_in_a_group_without_decay(make):
    model = network()
    decayed, others = make(model.parameters()).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)


def test_decay_without_gradient_shrinks_all_but_the_norms():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch_optimizer("AdamW", lr=0.1, weight_decay=0.5, decay_norms=False)(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if p.ndim > 1 else 1))


def test_by_default_there_is_one_group_as_ever():
    assert len(SGD()(network().parameters()).param_groups) == 1
    assert len(torch_optimizer("AdamW")(network().parameters()).param_groups) == 1


@pytest.mark.long
def test_a_scheduled_decay_leaves_the_norms_at_zero_and_a_rate_moves_in_both_groups():
    make = torch_optimizer(
        "AdamW", lr=Cosine(high=0.1, epochs=2), weight_decay=Stairs({0: 0.1, 1: 0.2}), decay_norms=False
    )
    state = State.fresh(recipe.but(optimizer=make))
    rates = [r.lr for r in fit(state.recipe, state) if isinstance(r, StepFinished)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert [g["weight_decay"] for g in state.optimizer.param_groups] == [0.2, 0.0]
    assert len({g["lr"] for g in state.optimizer.param_groups}) == 1


def test_a_text_and_overrides_by_path_give_the_same_value():
    base = load_recipe("quickstart")
    made = apply_overrides(base, ['optimizer=torch_optimizer("AdamW", lr=1e-3)', "optimizer.weight_decay=0.05"])
    assert made.optimizer == torch_optimizer("AdamW", lr=1e-3, weight_decay=0.05)
    assert parse_value(describe(made.optimizer)) == made.optimizer


@pytest.mark.parametrize(("text", "said"), [
    ("torch_optimizer('AdamV')", r"AdamV'\): no such optimiser .* Did you mean 'Adam"),
    ("torch_optimizer('LBFGS')", "several times a step"), ("torch_optimizer('SparseAdam')", "sparse gradients"),
    ("torch_optimizer('Lookahead')", "wraps another"), ("torch_optimizer('AdamW', beta=1)", "no knob 'beta'.*'betas'"),
    ("torch_optimizer('AdamW', lr=-1)", "lr must be a finite number"),
    ("torch_optimizer('SGDP')", "no learning rate. Add lr"), ("torch_optimizer('AdamW', amsgrad=2)", "True or False"),
    ("torch_optimizer('Rprop', decay_norms=False)", "has no weight decay"), ("SGD(decay_norms=3)", "True or False"),
])  # fmt: skip
def test_what_is_no_optimiser_is_one_line(text, said):
    with pytest.raises((PluginError, RecipeError), match=said):
        parse_value(text)


@pytest.mark.parametrize(("knobs", "said"), [
    ({"betas": (2.0, 0.9)}, "Invalid beta"), ({"differentiable": True}, "its step fails"),
])  # fmt: skip
def test_a_knob_that_the_library_refuses_fails_in_the_dry_run(knobs, said):
    with pytest.raises(PluginError, match=said):
        dry_run(recipe.but(optimizer=torch_optimizer("AdamW", **knobs)))


def test_a_knob_that_no_step_reads_cannot_be_a_schedule():
    optimizer = torch_optimizer("AdamW", decay_norms=Stairs({0: True, 1: False}))
    model = network()
    with pytest.raises(RecipeError, match="decay_norms cannot change with the epoch"):
        scheduled_fields(optimizer, lambda made: made(model.parameters()), 2, 3)


def test_a_fused_optimiser_skips_an_update_that_is_not_finite_and_another_is_read_at_once():
    fused, plain = (torch_optimizer("AdamW", fused=f)(network().parameters()) for f in (True, None))
    assert getattr(fused, "_step_supports_amp_scaling", False)
    assert not getattr(plain, "_step_supports_amp_scaling", False)
    model = network()
    optimizer = torch_optimizer("AdamW", fused=True)(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(("schedule", "values", "points"), [
    (Ramp(high=8.0, epochs=4), {0: 0, 1: 2, 2.5: 5, 4: 8, 9: 8}, (0, 4)),
    (Ramp(low=2.0, high=1.0, epochs=2), {0: 2, 1: 1.5, 2: 1, 3: 1}, (0, 2)),
    (WarmupCosine(high=1.0, low=0.2, warmup=2, epochs=6), {0: 0.2, 1: 0.6, 2: 1, 4: 0.6, 6: 0.2, 8: 0.2}, (0, 2)),
    (WarmupCosine(high=1.0, warmup=0, epochs=2), {0: 1, 1: 0.5, 2: 0}, (0,)),
    (WarmupCosine(high=1.0, warmup=2, epochs=2), {0: 0, 1: 0.5, 2: 1}, (0, 2)),
    (OneCycle(high=1.0, peak=2, epochs=6),
     {0: 0, 0.5: (1 - math.cos(math.pi / 4)) / 2, 1: 0.5, 2: 1, 4: 0.5, 6: 0, 7: 0}, (0, 2)),
    (OneCycle(high=1.0, peak=0, epochs=2), {0: 1, 1: 0.5, 2: 0}, (0,)),
])  # fmt: skip
def test_a_schedule_has_its_closed_form(schedule, values, points):
    assert [schedule.at_epoch(t) for t in values] == pytest.approx(list(values.values()))
    assert schedule.change_points() == points
    assert parse_value(describe(schedule)) == schedule


@pytest.mark.parametrize("text", [
    "Ramp(high=1.0, epochs=0)", "WarmupCosine(high=1.0, warmup=3, epochs=2)", "OneCycle(high=1.0, peak=-1, epochs=2)",
    "OneCycle(high=1.0, peak=0, epochs=0)",
])  # fmt: skip
def test_a_schedule_outside_its_range_is_refused(text):
    with pytest.raises(RecipeError, match=r"must (lie|be)"):
        parse_value(text)


def test_eps_may_begin_at_zero():
    made = recipe.but(attack=apply_overrides(recipe, ["attack.eps=Ramp(high=0.1, epochs=1)"]).attack)
    assert [made.at(epoch).attack.eps for epoch in (0, 1)] == [0.0, 0.1]
    assert made.budget == 0.1
    dry_run(made)
