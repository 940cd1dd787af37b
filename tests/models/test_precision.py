"""Precision is decided once, said aloud, and changes nothing but the rounding."""

from __future__ import annotations

import json

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
    Classifier,
    Recipe,
    Sigmoid,
    State,
    build,
    digits,
    fit,
    pm_adv,
    reproduce,
    subset,
    torchattack,
)  # fmt: skip
from robustmail.catalog import catalog_entries
from robustmail.config.overrides import parse_value
from robustmail.errors import NonFiniteError, RecipeError, RunError
from robustmail.models.folded import Autocast, FoldedModel
from robustmail.models.precision import PrecisionChoice, choose_precision, compute_models, flops
from robustmail.records import AttackResult, EpochFinished, RunStarted, StepFinished
from robustmail.runtime.rng import fork_rng, seed_all
from robustmail.step import Context
from robustmail.train.memory import MemoryTables
from robustmail.train.run import run
from robustmail.train.train_step import train_step
from tests.rounding import needs_bf16

recipe = Recipe(
    data=subset(digits(), train=512), model="small_cnn", attack=PGD(eps=0.1, alpha=0.05, steps=2), objective=TRADES(),
    epochs=2, margin=pm_adv, weighter=Sigmoid(slope=2.0, bias=0.0), batch=128, validate="pgd2",
    evaluate=("nat", "pgd2"), optimizer=SGD(lr=0.1), test_size=100, precision="bf16",
)  # fmt: skip
OBJECTIVES = {"AT": AT(), "TRADES": TRADES(), "MART": MART()}


def test_flops_are_those_of_the_network():
    model = build("cifar_resnet18", 10, 3).train()
    assert flops(model, torch.rand(1, 3, 32, 32)) == 2 * 555_422_720
    assert model.training


def test_auto_is_fp32_for_what_is_too_small_or_grouped_and_what_is_asked_for_is_done():
    x = torch.rand(2, 3, 32, 32)
    tiny = build("small_cnn", 10, 1)
    assert choose_precision("auto", tiny, torch.rand(2, 1, 8, 8)).name == "fp32"
    grouped = Classifier(nn.Sequential(nn.Conv2d(3, 300, 3, groups=3), nn.Flatten(), nn.Linear(270000, 10)))
    assert choose_precision("auto", grouped, x).name == "fp32"
    assert choose_precision("bf16", tiny, x) == ("bf16", "as asked")
    assert choose_precision("auto", build("cifar_resnet18", 10, 3), x).name in ("fp32", "bf16")


@needs_bf16
def test_fp32_is_the_model_itself_and_bf16_its_twin_or_the_reason_why_not():
    x = torch.rand(2, 3, 32, 32)
    model = build("cifar_resnet18_w8", 10, 3)
    assert compute_models(model, PrecisionChoice("fp32", "as asked"), "eval", x) == (model, model, "fp32 (as asked)")
    fast = compute_models(model, PrecisionChoice("bf16", "as asked"), "eval", x)
    assert (type(fast.attack), type(fast.loss)) == (FoldedModel, Autocast)
    assert model.training, "it was folded in eval mode, and put back"
    batch_statistics = compute_models(model, PrecisionChoice("bf16", "as asked"), "train", x)
    assert type(batch_statistics.attack) is Autocast
    assert "no train mode" in batch_statistics.description
    own = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert (
        "Sequential: no convolutions to fold" in compute_models(own, PrecisionChoice("bf16", ""), "eval", x).description
    )


def test_a_precision_that_does_not_exist_is_one_error():
    with pytest.raises(RecipeError, match="precision must be 'auto' or 'fp32' or 'bf16'"):
        recipe.but(precision="fp16")


def trained(now, batch, precision):
    """Weights and statistics after a few steps in a precision."""
    from tests.conftest import Small

    with fork_rng():
        seed_all("law")
        model = Classifier(Small())
        made = compute_models(model, PrecisionChoice(precision, ""), "eval", batch[0])
        optimizer = now.optimizer(model.parameters())
        index, tables = torch.arange(len(batch[1])), MemoryTables(now.memory, [batch[1]], 10, batch[0].device)
        for i in range(3):
            context = Context(index, 0, 1, tables.declared, tables.rows(index, batch[1]))
            train_step(now, model, *batch, (0, i), optimizer, made, context=context)
    return model.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("margin", list(catalog_entries("margins")))
def test_with_uniform_weights_every_margin_trains_the_bit_identical_model(margin, objective, precision, batch):
    base = recipe.but(objective=objective, attack=PGD(steps=3), margin=None, weighter=None)
    plain = trained(base, batch, precision)
    weighted = trained(base.but(margin=parse_value(margin), weighter=torch.ones_like), batch, precision)
    assert all(torch.equal(plain[name], weighted[name]) for name in plain)


@needs_bf16
def test_a_run_says_its_precision_and_stores_it(tmp_path):
    records = list(run(recipe, tmp_path / "run", "name"))
    (begun,) = [r for r in records if isinstance(r, RunStarted)]
    assert (
        begun.precision
        == "bf16 (as asked); attacks see a copy of the model with BatchNorm folded into its convolutions"
    )
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["precision"] == "'bf16'"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["provenance"]["precision"] == begun.precision
    with pytest.raises(RunError, match=r"another recipe \(precision: 'bf16' there, 'fp32' here\)"):
        list(run(recipe.but(precision="fp32"), tmp_path / "run", "name"))


@needs_bf16
def test_what_auto_was_at_the_start_stays_when_a_run_goes_on_elsewhere(tmp_path):
    made = recipe.but(precision="auto")
    begun = State.fresh(made, tmp_path)
    begun.precision = PrecisionChoice("bf16", "of another machine")
    begun.save()
    again = State.fresh(made, tmp_path)
    assert again.precision.name == "fp32"
    again.load()
    assert again.precision == ("bf16", "as this run began")
    assert type(again.compute_models.attack) is FoldedModel


@pytest.mark.long
def test_evaluation_is_exact_whatever_the_precision_of_training(tmp_path):
    state = State.fresh(recipe)
    list(fit(recipe, state))
    from robustmail import evaluate

    exact = evaluate(state.model, state.images.test, ("nat", "pgd2"), eps=0.1, n=100)
    copied = build("small_cnn", 10, 1)
    copied.load_state_dict(state.model.state_dict())
    again = evaluate(copied, state.images.test, ("nat", "pgd2"), eps=0.1, n=100)
    assert [r.correct for r in exact] == [r.correct for r in again]


@pytest.mark.long
def test_awp_perturbs_the_live_weights_in_bf16_too():
    made = recipe.but(data=subset(digits(validation=16), train=96), batch=32, epochs=1)
    rows = [r.row for r in fit(made.but(perturbation=AWP(gamma=0.01))) if isinstance(r, EpochFinished)]
    plain = [r.row for r in fit(made) if isinstance(r, EpochFinished)]
    assert rows[-1]["train_loss"] != plain[-1]["train_loss"]


@pytest.mark.long
def test_a_step_that_explodes_in_bf16_leaves_no_mark_and_is_reproduced(tmp_path):
    made = recipe.but(optimizer=SGD(lr=1e30), margin=None, weighter=None, epochs=5)
    state, before = State.fresh(made, tmp_path), {}
    with pytest.raises(NonFiniteError, match="step"):
        for record in fit(made, state):
            if isinstance(record, StepFinished):
                before = {name: value.clone() for name, value in state.model.state_dict().items()}
    after = state.model.state_dict()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    with pytest.raises(NonFiniteError):
        reproduce(tmp_path / "nonfinite.pt", made)


@pytest.mark.slow
def test_both_precisions_train_models_that_are_equally_robust_over_seeds():
    made = recipe.but(
        attack=torchattack("TPGD", eps=0.1, alpha=0.025, steps=10), epochs=12, batch=128, test_size=None,
        optimizer=SGD(lr=0.05, momentum=0.9, weight_decay=5e-4),
    )  # fmt: skip
    from robustmail import evaluate

    found = {}
    for precision in ("fp32", "bf16"):
        found[precision] = []
        for seed in range(1, 6):
            state = State.fresh(made.but(precision=precision, seed=seed))
            list(fit(state.recipe, state))
            rows = evaluate(state.model, state.images.test, ("pgd20",), eps=0.1)
            found[precision] += [row.accuracy for row in rows if isinstance(row, AttackResult)]
    exact, half = (torch.tensor(found[p]) for p in ("fp32", "bf16"))
    noise = ((exact.var() + half.var()) / 5).sqrt()
    assert abs(exact.mean() - half.mean()) < 3 * noise + 0.005, found
