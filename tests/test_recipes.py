"""Every built-in recipe rehearses, says what it costs, and trains on real images."""

from __future__ import annotations

import math

import numpy as np
import pytest

from robustmail import Recipe
from robustmail.catalog import recipe_files, summary
from robustmail.config.loader import load_recipe, load_source
from robustmail.config.overrides import apply_overrides
from robustmail.records import AttackResult, EpochFinished, StepFinished
from robustmail.train.dry_run import dry_run
from robustmail.train.run import preflight, run

pytestmark = pytest.mark.long

FILES = recipe_files()
VARIANTS = [
    name if variable == "recipe" else f"{name}:{variable}"
    for name, path in FILES.items()
    for variable, value in vars(load_source(path)).items()
    if isinstance(value, Recipe)
]


def test_the_recipes_are_there():
    methods = "at trades mart fat awp trades_awp gairat gair_trades gair_mart mail_at mail_trades mail_mart"
    ours = "mail_trades_awp mail_trades_best trades_dm at_fast_benchmark quickstart"
    since_mail = "wmmr wmmr_trades vir_at vir_trades arow weat sovr dro gairat_awp mail_at_awp hat self_adaptive"
    assert set(FILES) == {*methods.split(), *ours.split(), *since_mail.split()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recipe_rehearses_and_says_what_it_is(name):
    recipe = load_recipe(name)
    preflight(recipe)
    dry_run(recipe)
    assert recipe.formula.startswith("loss = mean(")
    assert summary(FILES[name.partition(":")[0]]).endswith((".", "needed."))


@pytest.mark.parametrize(
    ("name", "attack", "total"), [("at", (10, 10), (11, 11)), ("mail_at", (10, 10), (11, 11)),
                                  ("trades", (11, 10), (13, 12)), ("mail_trades", (11, 10), (13, 12)),
                                  ("mart", (10, 10), (12, 12)), ("gairat", (10, 10), (11, 11)),
                                  ("awp", (10, 10), (12, 12))],
)  # fmt: skip
def test_passes_per_step_are_the_analytic_numbers(name, attack, total):
    for passes in dry_run(load_recipe(name)).values():
        assert passes.attack == attack
        assert passes.total == total


WEIGHTINGS = {
    "lps": ["margin=lps", "weighter=Tanh(lam=-1, steps=10)"],
    "pm_nat": ["margin=pm_nat"],
    "pm_adv": ["margin=pm_adv"],
}


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("name", ["mail_at", "mail_mart", "mail_trades"])
def test_the_nine_cells_of_table_1_are_two_overrides_away(name, weighting):
    kl = ", loss='kl', start='gaussian'" if name == "mail_trades" else ""
    recipe = apply_overrides(load_recipe(name), [f"attack=PGD(steps=10{kl})", *weighting])
    dry_run(recipe)
    assert weighting[0] == f"margin={recipe.margin.__name__}"


def test_wrn_rows_and_presets_of_the_authors_code_are_sentences():
    for name in ("at", "trades", "mart", "fat", "awp", "gairat", "mail_at", "mail_trades"):
        wide = load_recipe(f"{name}:wrn")
        assert (wide.model, wide.optimizer.weight_decay, wide.at(0).optimizer.lr) == ("cifar_wrn32_10", 7e-4, 0.1)
    for name in ("at", "trades", "mart", "mail_at", "mail_trades", "mail_mart"):
        code = load_recipe(f"{name}:code")
        assert (code.attack.eps, code.attack.alpha, code.epochs, code.select) == (0.031, 0.007, 120, "last")
        assert code.weighter is None or (code.weighter.normalize, code.weighter.scale, code.burn_in) == (False, 3.0, 76)


def test_a_burn_in_that_covers_every_epoch_is_said_aloud():
    assert "NEVER USED: burn_in=74 covers all 3 epochs" in apply_overrides(load_recipe("mail_at"), ["epochs=3"]).formula


def test_a_margin_that_needs_another_look_costs_a_forward():
    recipe = apply_overrides(load_recipe("mail_at"), ["margin=pm_nat", "burn_in=1"])
    assert [p.total for p in dry_run(recipe).values()][:2] == [(11, 11), (12, 11)]


@pytest.mark.parametrize("name", sorted(set(FILES) - {"quickstart"}))
def test_a_recipe_trains_two_epochs_on_real_images_to_a_finished_table(name, tiny_path, tmp_path):
    changes = [
        f"data=subset(npz('{tiny_path}', validation=16), train=32)", "model=cifar_resnet18_w8", "epochs=2",
        "burn_in=1", "batch=16", "evaluate=nat", "test_size=16", "optimizer=SGD(lr=0.01)",
        "validate=nat",
    ]  # fmt: skip
    if load_recipe(name).teacher is not None:
        changes += ["teacher=ema", "ema=0.9"]
    records = list(run(apply_overrides(load_recipe(name), changes), tmp_path / "run", name))
    assert all(math.isfinite(r.loss) for r in records if isinstance(r, StepFinished))
    assert len([r for r in records if isinstance(r, EpochFinished)]) == 2
    assert tuple(r.name for r in records if isinstance(r, AttackResult)) == ("nat",)


@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (3, 3), (100, 1)])
@pytest.mark.parametrize("name", ["mail_trades", "gair_mart", "fat"])
def test_any_number_of_classes_grey_or_colour_and_images_that_are_not_square(name, classes, channels, tmp_path):
    rng = np.random.default_rng(0)
    images = {s: rng.integers(0, 256, (2 * classes + 20, channels, 9, 14), dtype=np.uint8) for s in ("train", "test")}
    labels = {s: np.arange(len(x)) % classes for s, x in images.items()}
    np.savez(tmp_path / "set.npz", **{f"x_{s}": images[s] for s in images}, **{f"y_{s}": labels[s] for s in labels})
    evaluate = ("nat", "pgd2", "cw") if name == "mail_trades" else ("nat",)
    changes = [
        f"data=npz('{tmp_path / 'set.npz'}', validation=9)", "model=small_cnn", "epochs=2", "burn_in=1", "batch=16",
        "attack.steps=3", f"evaluate={','.join(evaluate)}", "optimizer=SGD(lr=0.01)",
    ]  # fmt: skip
    changes += ["weighter.steps=3"] if name == "gair_mart" else []
    changes += ["burn_in=0"] if name == "fat" else []
    records = list(run(apply_overrides(load_recipe(name), changes), tmp_path / "run", name))
    assert [r.n for r in records if isinstance(r, AttackResult)] == [2 * classes + 20] * len(evaluate)


def test_a_margin_defined_in_the_recipe_file_needs_no_registration(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from robustmail import Step, load_recipe\n\n"
        "def doubt(s: Step):\n    return s.probs_adv.amax(1)\n\n"
        "recipe = load_recipe('quickstart').but(margin=doubt, epochs=2, burn_in=1, evaluate=('nat',))\n"
    )
    records = list(run(load_recipe(str(file)), tmp_path / "run", "mine", file))
    steps = [r for r in records if isinstance(r, StepFinished)]
    assert (steps[0].margin, steps[-1].margin) == ("pm_adv", "doubt")
    assert (tmp_path / "run" / "recipe.py").read_text() == file.read_text()


@pytest.mark.slow
def test_mail_trades_learns_on_two_thousand_real_images(mini_path, tmp_path):
    changes = [
        f"data=npz('{mini_path}')", "model=cifar_resnet18_w8", "data.validation=200", "epochs=5", "burn_in=3",
        "batch=50", "optimizer.lr=0.02", "attack.steps=5", "evaluate=nat,pgd20,cw", "test_size=500",
    ]  # fmt: skip
    rows = [
        r
        for r in run(apply_overrides(load_recipe("mail_trades"), changes), tmp_path / "r", "m")
        if isinstance(r, AttackResult)
    ]
    assert rows[0].accuracy > 0.15
    assert rows[0].accuracy > rows[1].accuracy


@pytest.mark.slow
def test_the_quickstart_ends_above_ninety_percent_and_robust(tmp_path):
    rows = [r for r in run(load_recipe("quickstart"), tmp_path / "r", "q") if isinstance(r, AttackResult)]
    found = {r.name: r.accuracy for r in rows}
    assert found["nat"] > 0.9
    assert min(found.values()) > 0.6
