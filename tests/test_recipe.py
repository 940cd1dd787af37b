"""The law: a margin acts through the weights and in no other way."""

from __future__ import annotations

import pytest
import torch

from robustmail import AT, AWP, MART, PGD, SGD, TRADES, Recipe, Sigmoid, Stairs, Tanh, digits, lps, pm_adv
from robustmail.catalog import catalog_entries
from robustmail.config.overrides import parse_value
from robustmail.runtime.rng import fork_rng, seed_all
from robustmail.step import Context
from robustmail.train.memory import MemoryTables
from robustmail.train.train_step import train_step

OBJECTIVES = {"AT": AT(), "TRADES": TRADES(), "MART": MART()}
MARGINS = list(catalog_entries("margins"))


def recipe(**changes):
    base = Recipe(
        data=digits(), model="small_cnn", attack=PGD(steps=3), objective=AT(), epochs=1, optimizer=SGD(lr=0.1)
    )
    return base.but(**changes)


def trained(recipe, batch, steps=3):
    """Weights and statistics after a few steps."""
    from tests.conftest import Small

    with fork_rng():
        seed_all("law")
        model = Small()
        optimizer = recipe.optimizer(model.parameters())
        index, tables = torch.arange(len(batch[1])), MemoryTables(recipe.memory, [batch[1]], 10, batch[0].device)
        for i in range(steps):
            context = Context(index, 0, 1, tables.declared, tables.rows(index, batch[1]))
            train_step(recipe, model, *batch, (0, i), optimizer, context=context)
    return model.state_dict()


def identical(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("margin", MARGINS)
def test_with_uniform_weights_every_margin_trains_the_bit_identical_model(margin, objective, batch):
    plain = trained(recipe(objective=objective), batch)
    weighted = trained(recipe(objective=objective, margin=parse_value(margin), weighter=torch.ones_like), batch)
    assert identical(plain, weighted)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_other_weights_train_another_model(objective, batch):
    plain = trained(recipe(objective=objective), batch)
    weight = Sigmoid(slope=10.0, bias=-0.5)
    assert not identical(plain, trained(recipe(objective=objective, margin=pm_adv, weighter=weight), batch))


def test_gairat_with_infinite_lambda_is_its_parent(batch):
    plain = trained(recipe(), batch)
    gairat = trained(recipe(margin=lps, weighter=Tanh(lam=float("inf"), steps=3)), batch)
    assert all(torch.allclose(plain[name].float(), gairat[name].float(), atol=1e-6) for name in plain)


def test_mail_with_slope_zero_is_its_parent(batch):
    plain = trained(recipe(), batch)
    mail = trained(recipe(margin=pm_adv, weighter=Sigmoid(slope=0.0, bias=-0.5)), batch)
    assert all(torch.allclose(plain[name].float(), mail[name].float(), atol=1e-6) for name in plain)


def test_fat_with_the_patience_of_all_steps_is_its_parent(batch):
    assert identical(trained(recipe(), batch), trained(recipe(attack=PGD(steps=3, patience=3)), batch))


def test_awp_of_gamma_zero_is_nothing(batch):
    assert identical(trained(recipe(), batch), trained(recipe(perturbation=AWP(gamma=0.0)), batch))


def test_awp_perturbs_each_weight_by_gamma_of_its_norm_and_restores_exactly(small, batch):
    x, y = batch
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    statistics = [b.clone() for b in small.buffers()]

    def loss():
        return torch.nn.functional.cross_entropy(small.train()(x), y)

    with pytest.raises(KeyError), AWP(gamma=0.01)(small, loss):
        moved = {n: ((p - before[n]).norm() / before[n].norm()).item() for n, p in small.named_parameters()}
        assert moved["conv.weight"] == pytest.approx(0.01, rel=1e-3)
        assert moved["head.weight"] == pytest.approx(0.01, rel=1e-3)
        assert moved["bn.weight"] == moved["conv.bias"] == 0
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(small.buffers(), statistics, strict=True))


def test_awp_restores_exactly_also_from_a_gradient_that_is_nan(small, batch):
    before = small.head.weight.detach().clone()
    with AWP(gamma=0.01)(small, lambda: small(batch[0]).sum() * float("nan")):
        assert small.head.weight.isnan().all()
    assert torch.equal(small.head.weight, before)


def test_awp_keeps_what_the_optimiser_did_inside(batch):
    assert not identical(trained(recipe(), batch), trained(recipe(perturbation=AWP(gamma=0.05)), batch))


def test_the_burn_in_has_no_weights_and_schedules_resolve_in_any_field():
    made = recipe(margin=pm_adv, weighter=Sigmoid(slope=Stairs({0: 1.0, 3: 5.0}), bias=0.0), burn_in=2, epochs=5)
    assert made.at(1).weighter is None
    assert made.at(2).weighter == Sigmoid(slope=1.0, bias=0.0)
    assert made.at(4).weighter == Sigmoid(slope=5.0, bias=0.0)
    assert made.change_points() == [0, 2, 3]
