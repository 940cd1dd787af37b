"""Overrides are read, not run; what `describe` prints reads back; installed plugins are found by name."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from robustmail import (
    AT,
    AWP,
    MART,
    PGD,
    SGD,
    TRADES,
    AutoAttack,
    Discrete,
    Recipe,
    Sigmoid,
    Stairs,
    Tanh,
    art,
    catalog,
    cifar100,
    digits,
    image_folder,
    kappa,
    load_recipe,
    npz,
    pm_adv,
    pm_nat,
    torchattack,
)
from robustmail.config.overrides import apply_overrides, parse_value
from robustmail.errors import PluginError, RecipeError
from robustmail.fields import describe
from robustmail.train.dry_run import dry_run


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("quickstart")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        ("-0.5", -0.5),
        ("+3", 3),
        ("(1 + 2) * 3 - 4", 5),
        ("1e-3", 1e-3),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("None", None),
        ("True", True),
        ("'a text'", "a text"),
        ("(0.5, 1/2, 'x')", (0.5, 0.5, "x")),
        ("()", ()),
        ("1, 2", (1, 2)),
        ("[1, (2,)]", [1, (2,)]),
        ("{0: 0.1, 60: 1/100}", {0: 0.1, 60: 0.01}),
        ("pm_nat", pm_nat),
        ("AT", AT()),
        ("TRADES()", TRADES(beta=5.0)),
        ("Sigmoid(slope=5, bias=-1/2)", Sigmoid(slope=5, bias=-0.5)),
        ("Tanh(lam=inf)", Tanh(lam=math.inf)),
        ("Stairs({0: 0.1, 6 * 10: 0.01})", Stairs({0: 0.1, 60: 0.01})),
        ("Stairs({0: 4/255, 5: Stairs({0: 1})})", Stairs({0: 4 / 255, 5: Stairs({0: 1})})),
        ("PGD(eps=4/255, loss='kl')", PGD(eps=4 / 255, loss="kl")),
        ("torchattack('TPGD', eps=4/255)", torchattack("TPGD", eps=4 / 255)),
        ("npz('a file.npz', classes=3)", npz("a file.npz", classes=3)),
    ],
)
def test_a_text_stands_for_a_value(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        '__import__("os")',
        "lambda: 3",
        "pm_nat.__globals__",
        "[x for x in (1, 2)]",
        "digits()()",
        "1 if True else 2",
        "f'{1}'",
        "2 ** 9",
        "1 < 2",
        "'a' * 3",
        "-'a'",
        "True + 1",
        "{**{}}",
        "digits(**{'pad': 1})",
        "open('x')",
        "x := 3",
        "3; 4",
        "",
    ],
)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises((RecipeError, PluginError)):
        parse_value(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("epochs=3", 3),
        (" epochs = 3 ", 3),
        ("attack.eps=8/255", 8 / 255),
        ("weighter.bias=-0.5", -0.5),
        ("weighter=Sigmoid(slope=10, bias=-0.5)", Sigmoid(slope=10, bias=-0.5)),
        ("weighter=Tanh(lam=inf)", Tanh(lam=math.inf)),
        ("margin=pm_nat", pm_nat),
        ("objective=AT", AT()),
        ("optimizer.lr=Stairs({0: 0.1, 9: 1/100})", Stairs({0: 0.1, 9: 0.01})),
        ("weighter=Stairs({0: Discrete, 9: Tanh(lam=0)})", Stairs({0: Discrete(), 9: Tanh(lam=0)})),
        ("evaluate=nat,pgd20", ("nat", "pgd20")),
        ("evaluate=nat, pgd20", ("nat", "pgd20")),
        ("evaluate=aa", ("aa",)),
        ("evaluate=('nat', 'cw')", ("nat", "cw")),
        ("evaluate=['nat']", ("nat",)),
        ("model=cifar_resnet18_w16", "cifar_resnet18_w16"),
        ("model='cifar_wrn16_2'", "cifar_wrn16_2"),
        ("model=resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("device=cuda:1", "cuda:1"),
        ("normalize=((0.5,), (1/4,))", ((0.5,), (0.25,))),
        ("normalize=None", None),
        ("test_size=None", None),
        ("data=cifar100", cifar100()),
        ("data.validation=None", None),
        ("data=image_folder('some/folder', flip=False)", image_folder("some/folder", flip=False)),
        ("perturbation=AWP(gamma=0.01)", AWP(gamma=0.01)),
    ],
)
def test_an_override_changes_that_field(recipe: Recipe, text: str, value: Any) -> None:
    field = attrgetter(text.partition("=")[0].strip())
    before = recipe.but(normalize=((0.1,), (0.1,)), test_size=9)
    assert field(before) != value
    found = field(apply_overrides(before, [text]))
    assert found == value
    assert type(found) is type(value)


def test_an_override_leaves_everything_else_and_the_recipe_itself_alone(recipe: Recipe) -> None:
    changed = apply_overrides(recipe, ["attack.eps=0.2"])
    assert changed != recipe
    assert changed == recipe.but(attack=torchattack("TPGD", eps=0.2, alpha=0.025, steps=10))
    assert recipe == load_recipe("quickstart")
    assert apply_overrides(recipe, []) == recipe


def test_overrides_apply_in_order_so_an_attack_can_be_replaced_and_then_changed(recipe: Recipe) -> None:
    texts = [
        "attack=PGD(steps=7, eps=0.3)",
        "attack.eps=0.2",
        "weighter=Tanh(steps=7)",
        "margin=kappa",
        "attack.alpha=0.1",
    ]
    changed = apply_overrides(recipe, texts)
    assert changed.attack == PGD(steps=7, eps=0.2, alpha=0.1)
    assert (changed.margin, changed.weighter) == (kappa, Tanh(steps=7))
    assert apply_overrides(recipe, ["epochs=3", "epochs=4"]).epochs == 4


def test_fields_that_only_fit_together_may_be_changed_together(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="a margin does nothing without a weight"):
        apply_overrides(recipe, ["weighter=None"])
    changed = apply_overrides(recipe, ["weighter=None", "margin=None"])
    assert (changed.margin, changed.weighter) == (None, None)


def test_a_plugin_in_a_file_is_found_beside_its_own_imports(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_it.py").write_text("SCALE = 3\n")
    (tmp_path / "my.py").write_text(
        "from beside_it import SCALE\nfrom dataclasses import dataclass\n\n"
        "def doubt(step):\n    return SCALE * step.probs_adv[:, 0]\n\n"
        "@dataclass(frozen=True)\nclass Linear:\n    slope: float = 2.0\n\n"
        "    def __call__(self, margin):\n        return 1 - self.slope * margin\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    changed = apply_overrides(
        recipe, ["margin=my.py:doubt", f"weighter={tmp_path / 'my.py'}:Linear", "weighter.slope=0.25"]
    )
    sys.modules.pop("beside_it")
    assert (changed.margin.__name__, changed.weighter.slope) == ("doubt", 0.25)
    assert set(dry_run(changed)) == set(recipe.change_points())
    assert sys.path == path


ROUND = [
    AT(),
    TRADES(beta=6),
    MART(beta=5.5),
    Sigmoid(slope=2.0, bias=-0.5),
    Sigmoid(slope=1 / 3, bias=0.0, normalize=False, scale=3.0),
    Tanh(lam=math.inf, steps=7),
    Tanh(lam=-math.inf),
    Discrete(),
    SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), nesterov=True),
    SGD(lr=0.1 + 0.2, weight_decay=1e-12),
    Stairs({0: Tanh(), 5: Sigmoid(slope=1.0, bias=0.0)}),
    AWP(gamma=Stairs({0: 0.0, 10: 0.005})),
    PGD(eps=8 / 255, alpha=1 / 255, start="gaussian", loss="kl"),
    PGD(eps=0.5, norm="l2"),
    AutoAttack(eps=8 / 255),
    torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),
    torchattack("APGDT", eps=8 / 255),
    torchattack("Square", eps=Stairs({0: 4 / 255, 9: 8 / 255})),
    art("FastGradientMethod", eps=8 / 255),
    npz("a 'quoted' file.npz"),
    digits(validation=None),
]


@pytest.mark.parametrize("value", ROUND, ids=describe)
def test_what_is_printed_reads_back_to_an_equal_value(value: Any) -> None:
    assert parse_value(describe(value)) == value


@pytest.mark.parametrize("name", [*catalog.recipe_files(), "mail_at:code", "mail_trades:code"])
def test_every_part_of_a_built_in_recipe_reads_back_as_an_override(name: str) -> None:
    made = load_recipe(name)
    for field in (
        "data",
        "model",
        "attack",
        "objective",
        "margin",
        "weighter",
        "perturbation",
        "optimizer",
        "evaluate",
        "select",
    ):
        assert apply_overrides(made, [f"{field}={describe(getattr(made, field))}"]) == made


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with one margin that works, one that cannot be imported, and one that is not where it says."""
    (tmp_path / "doubtful.py").write_text("def doubt(step):\n    return step.probs_adv[:, 0]\n")
    (tmp_path / "doubtful_broken.py").write_text("import a_module_that_nobody_has\n")
    info = tmp_path / "doubtful-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubtful\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[robustmail.margins]\ndoubt = doubtful:doubt\nbroken_doubt = doubtful_broken:doubt\n"
        "absent_doubt = doubtful:absent\npm_adv = doubtful:doubt\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for cached in (catalog.catalog_entries, catalog.installed_plugins):
        cached.cache_clear()
    yield
    for cached in (catalog.catalog_entries, catalog.installed_plugins):
        cached.cache_clear()
    for name in ("doubtful", "doubtful_broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("installed")
def test_an_installed_packages_margin_is_found_by_name_and_listed(recipe: Recipe) -> None:
    margin = apply_overrides(recipe, ["margin=doubt"]).margin
    assert (margin.__name__, margin.__module__) == ("doubt", "doubtful")
    assert catalog.catalog_entries("margins")["doubt"].summary == "from doubtful"
    assert "doubt" not in catalog.catalog_entries("weighters")
    with pytest.raises(PluginError, match="Did you mean 'doubt'"):
        apply_overrides(recipe, ["margin=doubtt"])


@pytest.mark.usefixtures("installed")
def test_an_installed_package_cannot_take_one_of_our_names(recipe: Recipe) -> None:
    assert apply_overrides(recipe, ["margin=pm_adv"]).margin is pm_adv


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken_doubt", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("absent_doubt", "AttributeError: module 'doubtful' has no attribute 'absent'"),
    ],
)
@pytest.mark.parametrize("field", ["margin", "objective"], ids=["its own field", "another field"])
def test_a_broken_plugin_is_named_with_its_package_and_its_reason(
    recipe: Recipe, field: str, name: str, reason: str
) -> None:
    with pytest.raises(PluginError) as caught:
        apply_overrides(recipe, [f"{field}={name}"])
    assert f"{field}={name}: plugin '{name}' (from doubtful): cannot be loaded: {reason}" in str(caught.value)
    assert apply_overrides(recipe, ["margin=doubt"]).margin.__name__ == "doubt"  # the others still work


@pytest.mark.usefixtures("installed")
def test_a_broken_plugin_elsewhere_does_not_stop_ours(recipe: Recipe) -> None:
    assert apply_overrides(recipe, ["margin=pm_nat", "objective=AT"]).margin is pm_nat
    assert "broken_doubt" in catalog.catalog_entries("margins")


@pytest.mark.parametrize("text", ["precision=fp32", "attack_mode=train", "select=last"])
def test_a_word_of_a_few_needs_no_quotes(text: str) -> None:
    field, word = text.split("=")
    assert getattr(apply_overrides(load_recipe("at"), [text]), field) == word
