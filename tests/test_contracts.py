"""Faults planted in plugins are found, each under the name of the law that it breaks, also by `robustmail check`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from robustmail import (
    AT,
    CR,
    IDBH,
    LMPGD,
    MART,
    MD,
    PGD,
    SOVR,
    TRADES,
    Adversarial,
    Affine,
    ARoW,
    AutoAugment,
    Crop,
    CropShift,
    CutMix,
    Cutout,
    Discrete,
    Exp,
    Flip,
    Lowest,
    MeanOf,
    Mixup,
    RandAugment,
    Sigmoid,
    Softmax,
    Softplus,
    Step,
    Tanh,
    Terms,
    margin_range,
    torchattack,
)
from robustmail.catalog import catalog_entries
from robustmail.cli.main import main
from robustmail.config.overrides import parse_value
from robustmail.contracts import LAWS, assert_lawful, broken_laws, kind_of
from robustmail.errors import PluginError
from robustmail.perturbations import AWP

WEIGHTERS = (
    Sigmoid(slope=10.0, bias=-0.5), Sigmoid(slope=1e3, bias=0.0), Tanh(), Discrete(), Tanh(normalize=False),
    Discrete(normalize=False, scale=0.5), Exp(alpha=2.0), Exp(alpha=0.5, normalize=False),
    Affine(alpha=7.0, bias=0.007), Affine(alpha=8.0, bias=1.7, normalize=False), Softmax(temperature=0.1),
    Softmax(temperature=3.0, normalize=False), Softplus(), Softplus(normalize=False), Lowest(share=0.4),
    Lowest(share=0.01, normalize=False), MeanOf(weighter=Exp(alpha=2.0, normalize=False)),
)  # fmt: skip
OBJECTIVES = (
    AT(), TRADES(), TRADES(weigh="nat"), TRADES(weigh="both", reverse=True), TRADES(weigh="both", anchor="adv"), MART(),
    ARoW(), ARoW(anti=True), SOVR(),
)  # fmt: skip

LAWFUL = {
    **{name: parse_value(name) for name in catalog_entries("margins")},
    **{str(w): w for w in WEIGHTERS},
    "Tanh(inf)": Tanh(lam=float("inf")), "Sigmoid(scale)": Sigmoid(slope=2.0, bias=0.0, normalize=False, scale=3.0),
    **{str(o): o for o in OBJECTIVES},
    **{str(a): a for a in (PGD(steps=3), PGD(steps=3, patience=0, noise=0.001), LMPGD(steps=2))},
    **{str(a): a for a in (PGD(steps=2, loss="pm", eot=2), PGD(steps=2, targets=2), MD(steps=3))},
    "CR": CR(steps=30, restarts=1),
    "PGD l2": PGD(norm="l2", eps=0.5, alpha=0.2, steps=3), "TPGD": torchattack("TPGD", steps=3),
    "AWP": AWP(gamma=0.01),
    **{str(a): a for a in (
        Crop(2), Flip(), Cutout(3), CutMix(), Mixup(0.2), RandAugment(2, 14), AutoAugment("cifar10"),
        AutoAugment("svhn"), CropShift(0, 5), IDBH("weak"), IDBH("strong"))},
}  # fmt: skip


INSTALLED = {
    f"{kind}: {name}": entry.point.load()
    for kind in ("attacks", "weighters", "objectives", "perturbations")
    for name, entry in catalog_entries(kind).items()
    if entry.point is not None
}
LAWFUL |= {name: plugin() if isinstance(plugin, type) else plugin for name, plugin in INSTALLED.items()}


@pytest.mark.parametrize("plugin", LAWFUL.values(), ids=LAWFUL)
def test_what_ships_is_lawful(plugin):
    assert_lawful(plugin)


@pytest.mark.parametrize("margin", catalog_entries("margins"))
@pytest.mark.parametrize("weighter", WEIGHTERS, ids=str)
def test_a_weighter_that_ships_is_lawful_on_the_range_of_every_margin(weighter, margin):
    assert_lawful(weighter, "weighter", parse_value(margin))


def test_a_weighter_is_held_to_its_laws_on_the_range_of_its_margin():
    @margin_range(0, 5)
    def far(step: Step) -> Tensor:
        return step.logits_adv.abs().amax(1)

    def down_to_two(margin: Tensor) -> Tensor:
        return (2 - margin) / (2 - margin).mean()

    assert not broken_laws(down_to_two)
    assert set(broken_laws(down_to_two, "weighter", far)) >= {"finite and not negative"}
    assert "within the range that it declares" in broken_laws(far)


def logit_ratio(s: Step):
    return s.logits_adv.exp().amax(1) / s.logits_adv.exp().sum(1)


def fresh_look(s: Step):
    s.model.train()
    with torch.enable_grad():
        return torch.softmax(s.model(s.x_adv), 1).amax(1)


def drops_gradients(s: Step):
    s.model.zero_grad()
    return s.probs_adv.amax(1)


def scribbles(s: Step):
    s.logits_adv.mul_(2)
    return s.probs_adv.amax(1)


MARGINS = {
    "wrong shape": (lambda s: s.probs_adv, "one number per example"),
    "a mean over the batch": (lambda s: s.probs_adv.amax(1).mean(), "one number per example"),
    "not detached": (lambda s: s.probs_adv.amax(1).requires_grad_(), "detached"),
    "batch-dependent": (lambda s: s.probs_adv.amax(1) - s.probs_adv.amax(1).mean(), "independent of batch mates"),
    "position-dependent": (
        lambda s: s.probs_adv.amax(1) + torch.arange(len(s.y)), "independent of the order of examples"),
    "NaN at large logits": (logit_ratio, "finite at huge logits"),
    "touches torch's generator": (lambda s: s.probs_adv.amax(1) + 0 * torch.rand(1), "leaves the generators alone"),
    "touches numpy's generator": (
        lambda s: s.probs_adv.amax(1) + 0 * float(np.random.rand()), "leaves the generators alone"),
    "random": (lambda s: torch.rand(len(s.y)), "the same when asked again"),
    "moves BatchNorm": (fresh_look, "leaves modes, gradients, BatchNorm statistics and weights alone"),
    "drops gradients": (drops_gradients, "leaves modes, gradients, BatchNorm statistics and weights alone"),
    "ten classes only": (lambda s: s.probs_adv[:, 9] - s.probs_adv[:, 0], "any number of classes"),
    "squeezes": (lambda s: s.probs_adv.amax(1).squeeze(), "a batch of one"),
    "scribbles": (scribbles, "does not write into its input"),
    "fails": (lambda s: s.prbs_adv, "one number per example"),
}  # fmt: skip


def gaussian(margin: Tensor) -> Tensor:
    return torch.exp(-(margin**2)) / torch.exp(-(margin**2)).mean()


WEIGHTS = {
    "unnormalised": (lambda margin: torch.sigmoid(-margin), "mean one over the batch"),
    "negative": (lambda margin: 1 - margin + margin.mean() * 0 - 0.5, "finite and not negative"),
    "grows": (lambda margin: (margin * 2).softmax(0) * len(margin), "falls with the margin"),
    "not monotone": (gaussian, "falls with the margin"),
    "0 / 0": (lambda margin: (u := (margin < -0.9).float()) / u.mean(), "finite and not negative"),
    "a number": (lambda margin: torch.tensor(1.0), "one number per example"),
}


def graphless(step: Step) -> Terms:
    return Terms(step.logits_adv.detach().logsumexp(1))


def naive_kl(step: Step) -> Terms:
    p, q = step.probs_nat, step.probs_adv
    return Terms((p * (p / q).log()).sum(1))


def reduced(step: Step) -> Terms:
    return Terms(torch.nn.functional.cross_entropy(step.logits_adv, step.y))


OBJECTIVES = {
    "no graph": (graphless, "a finite gradient"),
    "naive KL": (naive_kl, "finite at huge logits"),
    "reduced": (reduced, "two terms, one number per example"),
}


def leaps(model, x, y):
    return (x + 0.5).detach()


@dataclass(frozen=True)
class Far:
    """Says eps and does not keep it."""

    eps: float = 0.01

    def __call__(self, model, x, y):
        return Adversarial((x + 0.1).clamp(0, 1))


def careless(model, x, y):
    model.eval()
    x = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return (x + 0.01 * x.grad.sign()).clamp(0, 1).detach()


def noisy(model, x, y):
    return (x + 0.01 * torch.randn_like(x)).clamp(0, 1)


ATTACKS = {
    "leaves the box": (leaps, "stays in the box"),
    "leaves the ball": (Far(), "stays in the ball"),
    "careless": (careless, "leaves modes, gradients, BatchNorm statistics and weights alone"),
    "noisy": (noisy, "leaves the generators alone"),
}


def brighter(x, targets, rng):
    return x + 0.5, targets


def grey(x, targets, rng):
    return x.mean(1, keepdim=True), targets


def global_noise(x, targets, rng):
    return (x + 0.1 * torch.rand_like(x)).clamp(0, 1), targets


def blacks_out(x, targets, rng):
    x[:, :, :4] = 0
    return x, targets


def twice(x, targets, rng):
    return x, 2 * targets


AUGMENTATIONS = {
    "leaves the box": (brighter, "stays in the box"),
    "drops channels": (grey, "images and targets of the same shape"),
    "draws elsewhere": (global_noise, "the same for the same generator"),
    "moves the generator": (global_noise, "leaves the global generators alone"),
    "writes into x": (blacks_out, "does not write into its input"),
    "no probabilities": (twice, "targets are probabilities"),
}


def batch_target(step: Step) -> Terms:
    return Terms(torch.nn.functional.cross_entropy(step.logits_adv, step.targets.mean(0).expand_as(step.logits_adv),
                                                   reduction="none"))  # fmt: skip


def log_target(step: Step) -> Terms:
    wrong = (step.targets / step.probs_adv).sum(1).log()
    return Terms(wrong)


def entropic(step: Step) -> Terms:
    return Terms(-(step.labels * step.logits_adv.log_softmax(1)).sum(1) if step.labels.ndim == 2
                 else step.logits_adv.sum(1))  # fmt: skip


OBJECTIVES |= {
    "a mean target": (batch_target, "independent of batch mates with soft labels"),
    "a target over p": (log_target, "finite with soft labels"),
    "another loss for soft labels": (entropic, "the same for labels and for one-hot targets"),
}
FAULTS = [
    pytest.param(plugin, kind, law, id=f"{kind}: {name}")
    for kind, faults in (
        ("margin", MARGINS),
        ("weighter", WEIGHTS),
        ("objective", OBJECTIVES),
        ("attack", ATTACKS),
        ("augmentation", AUGMENTATIONS),
    )
    for name, (plugin, law) in faults.items()
]


@pytest.mark.parametrize(("plugin", "kind", "law"), FAULTS)
def test_a_planted_fault_breaks_the_law_that_names_it(plugin, kind, law):
    assert law in broken_laws(plugin, kind)


@pytest.mark.parametrize(("plugin", "kind", "law"), [p for p in FAULTS if "<lambda>" not in str(p.values[0])])
def test_the_kind_of_a_plugin_is_told_from_how_it_is_written(plugin, kind, law):
    assert kind_of(plugin) == kind


def fgsm(model, x, y):
    x = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return (x + 0.01 * x.grad.sign()).clamp(0, 1).detach()


def test_an_own_attack_is_tried_as_runs_call_it_on_a_view():
    assert broken_laws(fgsm, "attack"), "on the model itself it leaves gradients and statistics behind"
    assert_lawful(fgsm)
    with pytest.raises(PluginError, match="stays in the box"):
        assert_lawful(leaps)


def soft(pm):
    return torch.sigmoid(-pm)


def sums(step):
    return Terms(step.probs_adv.sum(1))


def spread(step):
    return step.probs_adv.var(1)


@pytest.mark.parametrize(("plugin", "kind"), [(soft, "weighter"), (sums, "objective"), (spread, "margin")])
def test_what_says_nothing_of_its_kind_is_told_by_what_it_answers(plugin, kind):
    assert kind_of(plugin) == kind


def nets(classes, channels): ...


def steps_with(params): ...


def source(): ...


@pytest.mark.parametrize("other", [nets, steps_with, source])
def test_models_optimisers_and_data_are_no_plugins_that_have_laws(other):
    with pytest.raises(PluginError, match="so it is no plugin that has laws"):
        kind_of(other)


def test_what_breaks_all_laws_in_the_same_way_is_told_once():
    def fails(step):
        raise ArithmeticError("planted")

    with pytest.raises(PluginError) as told:
        assert_lawful(fails, "margin")
    assert str(told.value).count("ArithmeticError") == 1


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["robustmail", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_check_names_the_broken_law_of_a_margin_in_a_file(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\ndef doubt(s):\n    return s.probs_adv.amax(1) - s.probs_adv.amax(1).mean()\n")
    code, _, wrong = run(monkeypatch, capsys, "check", str(file))
    assert code == 2
    assert "margin doubt" in wrong
    assert "mine.py:3" in wrong
    assert "'independent of batch mates' (changes by" in wrong
    assert len(wrong.splitlines()) == 1


def recipe_with_margin(folder: Path, value: str) -> Path:
    file = folder / "mine.py"
    file.write_text(
        f"from robustmail import load_recipe\n\ndef sureness(s):\n    return {value}\n\n"
        "recipe = load_recipe('quickstart').but(margin=sureness)\n"
    )
    return file


def test_check_holds_the_plugins_of_a_recipe_to_their_laws(tmp_path: Path, monkeypatch, capsys):
    file = recipe_with_margin(tmp_path, "s.probs_adv.amax(1) / s.probs_adv.std()")
    code, _, wrong = run(monkeypatch, capsys, "check", str(file))
    assert (code, "independent of batch mates" in wrong) == (2, True)


def test_check_passes_lawful_plugins_and_says_so(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text("from robustmail import Step\n\ndef doubt(s: Step):\n    return s.probs_adv.amax(1)\n")
    code, said, _ = run(monkeypatch, capsys, "check", str(file))
    assert (code, said) == (0, f"doubt: margin, passes all {len(LAWS['margin'])} laws\n")
    assert run(monkeypatch, capsys, "check", f"{file}:doubt")[0] == 0


def test_check_says_which_laws_the_plugins_of_a_recipe_keep(tmp_path: Path, monkeypatch, capsys):
    file = recipe_with_margin(tmp_path, "s.probs_adv.amax(1)")
    code, said, _ = run(monkeypatch, capsys, "check", str(file))
    assert code == 0
    assert said.startswith(f"{file}: dry run passed in 4 phases (")
    assert f"; margin sureness passes all {len(LAWS['margin'])} laws" in said
    assert said.endswith("weighter Sigmoid passes all 7 laws on margins from -1 to 1\n")


@dataclass(frozen=True)
class Power:
    """A weight made for margins in [-1, 1], which is all that it owes."""

    p: float = 2.0

    def __call__(self, margin: Tensor) -> Tensor:
        u = (1.5 - margin) ** self.p
        return u / u.mean()


def test_a_weight_that_counts_no_steps_need_not_know_numbers_of_steps():
    assert_lawful(Power())


def test_one_line_in_a_plugin_authors_own_tests_is_enough():
    with pytest.raises(PluginError, match="breaks a law of plugins: 'finite at huge logits'"):
        assert_lawful(logit_ratio)
