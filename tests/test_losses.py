"""Losses on fixed logits equal numbers computed from the published formulas in plain Python, without torch."""

from __future__ import annotations

import math

import pytest
import torch

from robustmail import AT, MART, PGD, TRADES, Discrete, Recipe, Sigmoid, Step, Tanh, digits, kappa, pm_adv, pm_nat
from robustmail.functional import ce, kl

pytestmark = pytest.mark.numeric

NAT = [[2.0, -1.0, 0.5, 0.0], [0.3, 0.1, -0.2, 1.7], [-3.0, 4.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [5.0, -5.0, 2.5, 1.0]]
ADV = [
    [0.5, 0.25, 1.5, -1.0],
    [1.0, -0.5, 0.3, 0.8],
    [-1.0, 0.5, 2.0, 0.1],
    [0.1, 0.4, -0.3, 0.2],
    [2.0, -1.0, 1.9, 0.0],
]
Y, KAPPA = [0, 3, 1, 2, 0], [3.0, 10.0, 0.0, 7.0, 5.0]
PM_ADV = [-0.3640263504, -0.0714095283, -0.5461353736, -0.1647227021, 0.0455332123]
PM_NAT = [0.5516552134, 0.471447909, 0.8888680671, 0.0, 0.8341299529]
KL = [0.6681188022, 0.2469317107, 1.5097197039, 0.0308564482, 0.4288308241]
BCE = [2.409359813, 1.6321663924, 3.0660745678, 2.2133253392, 1.3042672799]
MAIL_AT, MAIL = {"slope": 10.0, "bias": -0.5}, {"slope": 2.0, "bias": 0.0}
LOSSES = {
    "AT": (AT(), None, 1.418021522),
    "TRADES": (TRADES(beta=5.0), None, 3.3564351926),
    "MART": (MART(beta=5.0), None, 2.5708899716),
    "MAIL-AT": (AT(), Sigmoid(**MAIL_AT), 1.7636856074),
    "MAIL-TRADES": (TRADES(beta=5.0), Sigmoid(**MAIL), 3.6795975407),
    "MAIL-MART": (MART(beta=5.0), Sigmoid(**MAIL), 2.6676619192),
    "MAIL-AT, the authors' code": (AT(), Sigmoid(**MAIL_AT, normalize=False, scale=3.0), 0.9198528938),
    "MAIL-TRADES, the authors' code": (TRADES(beta=5.0), Sigmoid(**MAIL, normalize=False, scale=3.0), 6.2797672323),
    "MAIL-MART, the authors' code": (MART(beta=5.0), Sigmoid(**MAIL, normalize=False, scale=3.0), 4.468712213),
}
GAIRAT = {
    "tanh": (Tanh(lam=-1.0), [2.1996353268, 1.5344e-05, 2.496486119, 0.0061749402, 0.29768827]),
    "sigmoid": (
        Sigmoid(slope=1.0, bias=4.0), [1.7989422662, 0.0060844732, 2.4164768249, 0.1167025602, 0.6617938756]),
    "discrete": (Discrete(), [1.3333333333, 0.1666666667, 1.8333333333, 0.6666666667, 1.0]),
}  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def step(request) -> Step:
    step = Step(None, None, torch.tensor(Y), None)
    step._logits = {w: torch.tensor(z, dtype=request.param) for w, z in (("nat", NAT), ("adv", ADV))}
    return step


def close(value, expected):
    return torch.allclose(value, torch.tensor(expected, dtype=value.dtype), atol=1e-6)


@pytest.mark.parametrize(("objective", "weight", "expected"), LOSSES.values(), ids=LOSSES)
def test_the_loss_equals_its_formula(objective, weight, expected, step):
    margin = pm_adv if weight else None
    recipe = Recipe(
        data=digits(), model="small_cnn", attack=PGD(), objective=objective, margin=margin, weighter=weight, epochs=1
    )
    assert recipe.loss(step).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("weight", "expected"), GAIRAT.values(), ids=GAIRAT)
def test_gairats_weights_equal_their_formulas(weight, expected):
    assert close(weight(torch.tensor(KAPPA)), expected)


def test_gairats_table_of_unnormalised_weights():
    table = [0.999665, 0.997527, 0.982014, 0.880797, 0.5, 0.119203, 0.017986, 0.002473, 0.000335, 0.000045, 0.000006]
    weight = Tanh(lam=-1.0)(torch.arange(11.0))
    assert torch.allclose(weight / weight[4] * 0.5, torch.tensor(table), atol=1e-6)


def test_margins_and_terms_equal_their_formulas(step):
    assert close(pm_adv(step), PM_ADV)
    assert close(pm_nat(step), PM_NAT)
    assert close(kl(step.logits_nat, step.logits_adv), KL)
    assert close(MART()(step).weighted, BCE)


def test_trades_on_the_natural_image_itself_is_cross_entropy(step):
    same = Step(None, None, step.y, None)
    same._logits = {"nat": step.logits_nat, "adv": step.logits_nat}
    terms = TRADES()(same)
    assert torch.allclose(terms.weighted, torch.zeros_like(terms.weighted), atol=1e-6)
    assert torch.equal(terms.plain, ce(step.logits_nat, step.y))


@pytest.mark.parametrize("objective", [TRADES(), MART()], ids=["TRADES", "MART"])
def test_losses_and_gradients_stay_finite_where_a_probability_underflows(objective):
    nat = torch.tensor([[1e4, 0.0, -1e4], [0.0, 300.0, 0.0]], requires_grad=True)
    adv = torch.tensor([[-1e4, 1e4, 0.0], [300.0, 0.0, -300.0]], requires_grad=True)
    step = Step(None, None, torch.tensor([0, 1]), None)
    step._logits = {"nat": nat, "adv": adv}
    terms = objective(step)
    (terms.weighted + terms.plain).sum().backward()
    assert terms.weighted.isfinite().all()
    assert nat.grad.isfinite().all()
    assert adv.grad.isfinite().all()


def test_kappa_feeds_gairat_from_a_traced_attack(small, batch):
    result = PGD(steps=10)(small, *batch)
    counted = kappa(Step(small, *batch, result.x, result.trace))
    assert ((counted >= 0) & (counted <= 10)).all()
    assert result.trace.correct.shape == (10, 8)


def test_trades_variants_of_the_disagreeing_papers(step):
    weights = torch.linspace(0.5, 1.5, 5).to(step.logits_nat)

    def total(**knobs):
        terms = TRADES(beta=5.0, **knobs)(step)
        return (weights * terms.weighted + terms.plain).mean().item()

    entropy, forward = ce(step.logits_nat, step.y), 5 * kl(step.logits_nat, step.logits_adv)
    backward = 5 * kl(step.logits_adv, step.logits_nat)
    assert total() == pytest.approx((weights * forward + entropy).mean().item())
    assert total(reverse=True) == pytest.approx((weights * backward + entropy).mean().item())
    assert total(weigh="nat") == pytest.approx((weights * entropy + forward).mean().item())
    assert total(weigh="both") == pytest.approx((weights * (entropy + forward)).mean().item())


def test_a_second_natural_pass_moves_the_statistics_once_more_and_nothing_else(small, batch):
    x, y = batch
    small.drop.p = 0.0
    outcomes = []
    for passes in (1, 2):
        small.bn.reset_running_stats()
        small.zero_grad()
        terms = TRADES(natural_passes=passes)(Step(small.train(), x, y, (x + 0.01).clamp(0, 1)))
        (terms.weighted + terms.plain).mean().backward()
        outcomes.append((int(small.bn.num_batches_tracked), small.head.weight.grad.clone()))
    assert [count for count, _ in outcomes] == [2, 3]
    assert torch.allclose(outcomes[0][1], outcomes[1][1], atol=1e-6)


SOFT = [
    [0.7, 0.1, 0.1, 0.1],
    [0.0, 0.25, 0.0, 0.75],
    [0.05, 0.85, 0.05, 0.05],
    [0.0, 0.0, 1.0, 0.0],
    [0.5, 0.0, 0.0, 0.5],
]


def log_probs(logits):
    """In plain Python, float64."""
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def soft_ce(table, targets):
    return [
        -sum(t * lp for t, lp in zip(ts, log_probs(zs), strict=True)) for zs, ts in zip(table, targets, strict=True)
    ]


def soft_step(dtype, targets):
    step = Step(None, None, torch.tensor(Y), None, targets=torch.tensor(targets))
    step._logits = {w: torch.tensor(z, dtype=dtype) for w, z in (("nat", NAT), ("adv", ADV))}
    return step


SMOOTHED = [[0.9 * (k == y) + 0.1 / 4 for k in range(4)] for y in Y]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("targets", [SOFT, SMOOTHED], ids=["mixed", "smoothed"])
def test_losses_of_soft_labels_equal_their_formulas(dtype, targets):
    step = soft_step(dtype, targets)
    assert close(AT()(step).weighted, soft_ce(ADV, targets))
    trades = TRADES(beta=5.0)(step)
    assert close(trades.plain, soft_ce(NAT, targets))
    assert close(trades.weighted, [5 * value for value in KL])
    hard = [[float(k == y) for k in range(4)] for y in Y]
    by_class = [bce - ce_y for bce, ce_y in zip(BCE, soft_ce(ADV, hard), strict=True)]  # -log(1.0001 - max p'_k)
    expected = [soft + rest for soft, rest in zip(soft_ce(ADV, targets), by_class, strict=True)]
    assert close(MART()(step).weighted, expected)
    assert close(MART()(step).plain, MART()(soft_step(dtype, hard)).plain.tolist())


def test_smoothed_labels_are_torchs_label_smoothing():
    step = soft_step(torch.float64, SMOOTHED)
    theirs = torch.nn.functional.cross_entropy(step.logits_adv, step.y, reduction="none", label_smoothing=0.1)
    assert close(AT()(step).weighted, theirs.tolist())


@pytest.mark.parametrize("objective", [AT(), TRADES(), MART()], ids=["AT", "TRADES", "MART"])
def test_one_hot_targets_give_the_loss_and_gradient_of_hard_labels(objective, step):
    one_hot = torch.nn.functional.one_hot(step.y, 4).float()
    found = []
    for targets in (None, one_hot):
        logits = {which: z.clone().requires_grad_() for which, z in step._logits.items()}
        again = Step(None, None, step.y, None, targets=targets)
        again._logits = logits
        terms = objective(again)
        (terms.weighted + terms.plain).sum().backward()
        found.append((terms.weighted + terms.plain, logits["adv"].grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_a_step_keeps_its_targets_when_it_is_computed_again_or_detached(step):
    targets = torch.tensor(SOFT)
    soft = soft_step(torch.float32, SOFT)
    for other in (soft, soft.again(), soft.detached()):
        assert torch.equal(other.targets, targets)
        assert torch.equal(other.labels, targets)
        assert torch.equal(other.y, step.y)
    assert torch.equal(step.labels, step.y)
    assert torch.equal(step.targets, torch.nn.functional.one_hot(step.y, 4).float())
    assert torch.equal(step.detached().targets, step.targets)


def test_one_hot_targets_are_as_wide_as_logits_that_nobody_has_asked_for(small, batch):
    step = Step(small.eval(), *batch, batch[0])
    assert step.targets.shape == (8, 10)
    assert step.has("adv")
    assert not step.has("nat")
