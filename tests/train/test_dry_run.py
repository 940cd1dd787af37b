"""What people write in files of their own: it works as they mean it, or they are told in one line why not."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robustmail import (
    AT,
    AWP,
    MART,
    PGD,
    SGD,
    TRADES,
    Adversarial,
    Classifier,
    Cosine,
    Cyclic,
    ImageData,
    Sigmoid,
    Stairs,
    State,
    Tanh,
    Terms,
    Trace,
    art,
    build,
    fit,
    kappa,
    load_recipe,
    pm_adv,
    pm_nat,
)  # fmt: skip
from robustmail.config.loader import load_source
from robustmail.config.overrides import apply_overrides
from robustmail.contracts import assert_lawful
from robustmail.data.dataset import Split
from robustmail.errors import ModelError, PluginError, RecipeError, RunError
from robustmail.fields import flatten
from robustmail.models.folded import FoldedModel
from robustmail.records import EpochFinished, StepFinished
from robustmail.train.dry_run import dry_run
from robustmail.train.run import run
from robustmail.train.train_step import run_attack
from tests.train.conftest import recipe

UNIFORM = Sigmoid(slope=0.0, bias=0.0)
L2 = PGD(norm="l2", eps=0.5, alpha=0.2, steps=2)


def trained(made):
    state = State.fresh(made)
    records = list(fit(made, state))
    return state, [r for r in records if isinstance(r, EpochFinished)]


# Schedules


class Braces:
    def __repr__(self):
        return "{0} {m}"

    def __call__(self, margin):
        return torch.ones_like(margin)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weighter": Sigmoid(slope=Stairs({0: 1.0, 1: 2.0}), bias=0.0)}, "sigmoid(-2 pm_adv)"),
        ({"weighter": Sigmoid(slope=1.0, bias=Stairs({0: 0.0, 1: 0.5}))}, "sigmoid(-1 (pm_adv - 0.5))"),
        ({"weighter": Sigmoid(slope=1.0, bias=0.0, normalize=False, scale=Stairs({0: 1.0, 1: 3.0}))}, "w = 3 sigmoid"),
        ({"weighter": Tanh(lam=Stairs({0: float("inf"), 1: -1.0}), steps=2), "margin": kappa}, "tanh(-1 + "),
        ({"weighter": Stairs({0: UNIFORM, 1: Sigmoid(slope=Cosine(high=4.0, epochs=2), bias=0.0)})}, "sigmoid(-2 pm"),
        ({"objective": TRADES(beta=Stairs({0: 1.0, 1: 6.0}))}, "6 KL"),
        ({"objective": MART(beta=Stairs({0: 1.0, 1: 6.0}))}, "6 "),
    ],
)  # fmt: skip
def test_a_formula_is_that_of_the_last_epoch(changes, said):
    made = recipe.but(burn_in=0, **changes)
    assert said in made.formula
    assert made.formula.startswith("loss = mean(")
    assert "in the last epoch" in made.formula
    assert set(dry_run(made)) == {0, 1}
    assert "in the last epoch" not in recipe.formula


def test_braces_in_the_words_of_an_own_weight_are_only_words():
    assert "of pm_adv" in recipe.but(weighter=Braces()).formula


def test_schedules_within_schedules_are_resolved():
    made = recipe.but(perturbation=Stairs({0: None, 1: AWP(gamma=Stairs({0: 0.0, 3: 0.01}))}), epochs=5)
    assert [made.at(epoch).perturbation for epoch in (0, 1, 3)] == [None, AWP(gamma=0.0), AWP(gamma=0.01)]
    assert set(made.change_points()) == {0, 1, 3}
    dry_run(made)


def test_a_rate_that_is_a_schedule_in_a_schedule_is_a_number_in_the_optimiser():
    made = recipe.but(optimizer=SGD(lr=Stairs({0: 0.1, 1: Cosine(high=0.4, epochs=2)})))
    rates = [record.lr for record in fit(made) if isinstance(record, StepFinished)]
    steps = len(rates) // 2
    assert rates[:steps] == [0.1] * steps
    assert rates[steps:] == pytest.approx([Cosine(high=0.4, epochs=2).at_epoch(1 + i / steps) for i in range(steps)])


def test_a_scheduled_attack_is_evaluated_in_its_own_norm():
    made = recipe.but(attack=Stairs({0: L2, 1: dataclasses.replace(L2, eps=1.0)}))
    assert (made.norm, made.budget) == ("l2", 1.0)
    assert made.but(burn_in=9).norm == "l2"


def test_an_attack_that_is_a_function_may_say_its_norm():
    def far(model, x, y):
        return L2(model, x, y)

    assert recipe.but(attack=far, eps=0.5).norm == "linf"
    far.norm = "l2"
    assert recipe.but(attack=far, eps=0.5).norm == "l2"


def test_a_norm_in_which_nothing_is_judged_is_refused():
    with pytest.raises(RecipeError, match=r"given norm=1\): the norm is neither linf nor l2"):
        art("ProjectedGradientDescent", norm=1, eps=0.9)


# Margins and weights


def asking(step):
    """Calls the model itself, once directly and once through the step."""
    step.model(step.x)
    return step.again().probs_nat.amax(1)


def test_a_margin_that_calls_the_model_acts_through_the_weights_alone():
    plain, _ = trained(recipe.but(margin=pm_nat, weighter=UNIFORM, burn_in=0))
    own, _ = trained(recipe.but(margin=asking, weighter=UNIFORM, burn_in=0))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, own.model.state_dict()[name]), name


def test_a_weight_for_a_margin_that_counts_steps_is_not_asked_about_negative_ones():
    dry_run(recipe.but(margin=kappa, weighter=lambda steps: 1 / (1 + steps), burn_in=0))
    with pytest.raises(PluginError, match="weighter"):
        dry_run(recipe.but(margin=pm_adv, weighter=lambda margin: 1 / (1 + margin), burn_in=0))


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """A weight whose fields have the names of some of ours, and meanings of their own."""

    steps: int = 3
    scale: float = 2.0
    formula: int = 7

    def __call__(self, margin):
        weights = (self.scale - margin) ** (1 / self.steps)
        return weights / weights.mean()


@dataclasses.dataclass(frozen=True)
class Louder:
    """A weight that is meant not to have mean one."""

    normalize = False

    def __call__(self, margin):
        return 2 - margin


def test_what_an_own_weight_calls_its_fields_is_its_own_business():
    made = recipe.but(weighter=Smoothed(), burn_in=0, epochs=1)
    assert "of pm_adv" in made.formula
    dry_run(made)
    assert_lawful(Smoothed(), "weighter")
    assert trained(made)[1][0].row["train_loss"] > 0
    with pytest.raises(PluginError, match="mean one over the batch"):
        assert_lawful(lambda margin: Louder()(margin), "weighter")  # a function says nothing of itself
    assert_lawful(Louder(), "weighter")


@dataclasses.dataclass(frozen=True)
class Longer:
    """An attack of three steps, whose fields have meanings of their own."""

    eps: tuple = (0.1, 0.2)
    norm: object = nn.Identity()
    steps: int = 9

    def __call__(self, model, x, y):
        return turned(model, x, y)._replace(trace=Trace(torch.ones(3, len(x)) > 0, torch.ones(3, len(x))))


def test_an_attack_is_known_by_its_trace_and_by_an_eps_that_is_a_number():
    made = recipe.but(attack=Longer(), eps=0.1, margin=kappa, weighter=Tanh(steps=3), burn_in=0)
    dry_run(made)
    assert made.norm == "linf"
    with pytest.raises(RecipeError, match="the attack Longer has no eps to evaluate with"):
        _ = made.but(eps=None).budget
    with pytest.raises(PluginError, match=r"weighter Tanh .*counts 9 steps, the attack takes 3"):
        dry_run(made.but(weighter=Tanh(steps=9)))
    with pytest.raises(RecipeError, match=r"given weighter.steps=9, attack.steps=2"):
        recipe.but(margin=kappa, weighter=Tanh(steps=9))


# Optimisers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """No decay of biases and BatchNorm, a rate ten times higher for the last layer."""

    lr: object = 0.01
    weight_decay: float = 0.1

    def __call__(self, parameters):
        parameters = list(parameters)
        return torch.optim.SGD([
            {"params": [p for p in parameters[:-1] if p.ndim > 1]},
            {"params": [p for p in parameters[:-1] if p.ndim == 1], "weight_decay": 0.0},
            {"params": parameters[-1:], "lr": 10 * self.lr},
        ], lr=self.lr, weight_decay=self.weight_decay)  # fmt: skip


@pytest.mark.parametrize(("lr", "after"), [(0.01, 0.01), (Stairs({0: 0.01, 1: 0.001}), 0.001)])
def test_the_groups_of_an_own_optimiser_keep_their_knobs(lr, after):
    state, _ = trained(recipe.but(optimizer=Grouped(lr=lr)))
    groups = state.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    assert [group["lr"] for group in groups] == pytest.approx([after, after, 10 * after])


@pytest.mark.parametrize(
    ("lr", "decay"),
    [
        (Cyclic(high=0.1, peak=1, epochs=2), 0.1),
        (Cyclic(high=0.1, peak=1, epochs=2), Stairs({0: 0.0, 1: 0.1})),
        (Stairs({0: 0.1, 1: 0.0}), Stairs({0: 0.1, 1: 0.0})),
        (Stairs({0: 0.0, 1: Cyclic(high=0.1, peak=1, epochs=2)}), 0.1),
        (0.1, Stairs({0: 0.0, 1: 0.1})),
    ],
)
def test_groups_keep_their_proportions_through_a_schedule_that_is_0(lr, decay):
    made = recipe.but(optimizer=Grouped(lr=lr, weight_decay=decay))
    state = State.fresh(made)
    seen = [
        [(group["lr"], group["weight_decay"]) for group in state.optimizer.param_groups]
        for record in fit(made, state)
        if isinstance(record, StepFinished)
    ]
    now = [made.at(i // 3 + i % 3 / 3).optimizer for i in range(6)]
    for knobs, (first, second, third) in zip(now, seen, strict=True):
        assert first == pytest.approx((knobs.lr, knobs.weight_decay))
        assert second == pytest.approx((knobs.lr, 0.0))
        assert third == pytest.approx((10 * knobs.lr, knobs.weight_decay))
    assert any(third[0] > 0 for _, _, third in seen)


def test_an_own_optimiser_that_fails_is_named():
    class Mine(Grouped):
        def __call__(self, parameters):
            raise ValueError("beta is wrong")

    with pytest.raises(PluginError, match=r"optimizer Mine .*failed with ValueError: beta is wrong"):
        State.fresh(recipe.but(optimizer=Mine()))


# Which run it is


def lead(step, k=1):
    return k * step.probs_adv.amax(1)


class Held:
    def __init__(self, k):
        self.k = k

    def __call__(self, step):
        return lead(step, self.k)


def closed(k):
    def margin(step):
        return lead(step, k)

    return margin


@pytest.mark.parametrize(
    "make", [lambda k: functools.partial(lead, k=k), Held, closed], ids=["partial", "object", "closure"]
)
def test_a_run_with_other_contents_of_a_plugin_is_another_run(make, tmp_path):
    list(run(recipe.but(margin=make(1), epochs=1), tmp_path, "own"))
    assert list(run(recipe.but(margin=make(1), epochs=1), tmp_path, "own"))[-1].before
    with pytest.raises(RunError, match=r"margin: .*k=1\) there, .*k=7\) here"):
        list(run(recipe.but(margin=make(7), epochs=1), tmp_path, "own"))


class Falling:
    def __init__(self, high):
        self.high = high

    def at_epoch(self, epoch, /):
        return self.high / (1 + epoch)

    def change_points(self):
        return (0,)


def test_an_own_schedule_is_told_by_what_it_holds():
    said = [flatten(SGD(lr=Falling(high)))["lr"] for high in (0.1, 0.1, 0.2)]
    assert said == ["Falling(high=0.1)", "Falling(high=0.1)", "Falling(high=0.2)"]


# Networks


class Spare(nn.Module):
    """Has a layer that its forward pass does not use, as the wide networks of TRADES and MART have."""

    def __init__(self, classes, channels):
        super().__init__()
        self.used, self.spare = nn.Linear(64 * channels, classes), nn.Linear(64 * channels, classes)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_awp_leaves_alone_what_the_network_does_not_use_and_a_class_is_a_model():
    made = recipe.but(model=Spare, perturbation=AWP(gamma=0.1))
    before = State.fresh(made).model.net.spare.weight.detach().clone()
    state, (first, *_) = trained(made.but(optimizer=SGD(lr=0.1, momentum=0.0, weight_decay=0.0)))
    assert torch.equal(state.model.net.spare.weight, before)
    assert first.row["train_loss"] > 0


class Viewing(Spare):
    def forward(self, x):
        return self.used(x.view(len(x), -1))


def test_a_network_that_needs_plain_strides_is_trained_with_them():
    state = State.fresh(recipe.but(model=Viewing, data=image_like()))
    assert state.model.memory_format == torch.contiguous_format


def image_like():
    x = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    part = Split(x, torch.arange(40) % 10)
    return lambda: ImageData("three channels", part, part, 10, validation=10)


class Normed(nn.Sequential):
    def __init__(self, classes, channels):
        conv = nn.utils.spectral_norm(nn.Conv2d(channels, 4, 3))
        super().__init__(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def test_lending_a_twin_moves_no_buffer_whatever_the_mode():
    model = build(Normed, 10, 1)
    with suppress(ModelError):  # a network that cannot be folded has nothing that could move
        twin = FoldedModel(model.eval(), torch.rand(2, 1, 8, 8))
        model.train()
        before = {name: value.clone() for name, value in model.named_buffers()}
        twin.refresh()
        assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


# Plugins that break their contract


def writing(model, x, y):
    """Ordinary notebook code: x and its attacked image are one tensor."""
    x += 0.5
    return x.clamp_(0, 1)


def test_an_attack_that_writes_into_its_images_does_not_take_its_ball_along():
    writing.eps = 0.1
    with pytest.raises(PluginError, match=r"attack writing .*left its ball: 0\.\d+ from the image, eps is 0.1"):
        dry_run(recipe.but(attack=writing, eps=0.1))
    x, y = torch.rand(4, 1, 8, 8) / 2, torch.arange(4)
    before = x.clone()
    found = run_attack(recipe.but(attack=writing, eps=0.1), torch.nn.Flatten(), x, y)
    assert torch.equal(x, before)
    assert torch.allclose(found.x, x + 0.5)


def double(model, x, y):
    return x.double()


def turned(model, x, y):
    trace = Trace(torch.ones(len(x), 3, dtype=torch.bool), torch.ones(len(x), 3))
    return Adversarial(x, trace)


def nothing(model, loss):
    return None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack": double, "eps": 0.1}, r"attack double .*returned float64 \[4, .*as it was given, float32"),
        ({"attack": turned, "eps": 0.1}, r"attack turned .*its trace.correct is \[4, 3\], expected \[steps, 4\]"),
        ({"perturbation": nothing}, r"perturbation nothing .*returned NoneType, not a context"),
    ],
)  # fmt: skip
def test_a_plugin_that_breaks_its_contract_is_named(changes, said):
    with pytest.raises(PluginError, match=said):
        dry_run(recipe.but(**changes))


def test_an_objective_may_weight_nothing():
    def plain(step):
        return Terms(torch.zeros(len(step.y)), cross_entropy(step.logits_adv, step.y, reduction="none"))

    _, epochs = trained(recipe.but(objective=plain, burn_in=0))
    reference = trained(recipe.but(objective=AT(), weighter=None, margin=None, burn_in=0))[1]
    assert [e.row["train_loss"] for e in epochs] == [e.row["train_loss"] for e in reference]


def test_a_perturbation_of_ones_own_is_asked_in_each_step():
    steps = []

    @contextmanager
    def noted(model, loss):
        if isinstance(model, Classifier):  # and not the linear model of a rehearsal
            steps.append(loss().item())
        yield

    records = list(fit(recipe.but(perturbation=noted, epochs=1)))
    assert len(steps) == sum(isinstance(record, StepFinished) for record in records) > 0


@dataclasses.dataclass(frozen=True)
class Derived:
    """A dataclass with a field that nobody gives."""

    slope: object = 1.0
    twice: float = dataclasses.field(init=False, default=0.0)

    def __call__(self, margin):
        return torch.ones_like(margin) * self.slope


def test_a_field_that_is_not_given_does_not_hinder_a_schedule():
    made = recipe.but(weighter=Derived(slope=Stairs({0: 1.0, 1: 2.0})))
    assert made.at(1).weighter == Derived(slope=2.0)


def test_an_annotation_for_type_checkers_alone_does_not_hinder_an_override(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, replace\n"
        "from typing import TYPE_CHECKING\nfrom robustmail import load_recipe\n"
        "if TYPE_CHECKING:\n    from somewhere import Number\n\n\n"
        "@dataclass(frozen=True)\nclass Flat:\n    height: Number = 1.0\n\n"
        "    def __call__(self, margin):\n        return margin * 0 + self.height\n\n\n"
        "recipe = load_recipe('quickstart').but(weighter=Flat())\n"
    )
    made = apply_overrides(load_recipe(str(tmp_path / "mine.py")), ["weighter.height=2.5"])
    assert made.weighter.height == 2.5


def test_a_file_is_read_as_python_reads_it(tmp_path):
    (tmp_path / "mine.py").write_text("def weight(margin: int) -> str: ...")
    assert load_source(tmp_path / "mine.py").weight.__annotations__ == {"margin": int, "return": str}
