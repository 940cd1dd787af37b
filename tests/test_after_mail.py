"""Margins, weighters and objectives since MAIL, against numbers computed with numpy from the published formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from robustmail import (
    SOVR,
    TRADES,
    Affine,
    ARoW,
    Exp,
    Lowest,
    MeanOf,
    Softmax,
    Softplus,
    Step,
    energy,
    entropy,
    logit_margin,
    loss_adv,
    p_adv,
    pm_adv,
    vulnerability,
)
from robustmail.errors import RecipeError

RNG = np.random.default_rng(7)
NAT, ADV = RNG.normal(size=(7, 5)) * 2, RNG.normal(size=(7, 5)) * 2
Y = np.array([0, 1, 2, 3, 4, 0, 2])
ROWS = np.arange(7)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


P, Q = softmax(NAT), softmax(ADV)
KL = (P * np.log(P / Q)).sum(1)
CE_NAT, CE_ADV = -np.log(P[ROWS, Y]), -np.log(Q[ROWS, Y])
WITHOUT_TRUE = np.where(np.eye(5, dtype=bool)[Y], -np.inf, ADV)
PM = Q[ROWS, Y] - np.where(np.eye(5, dtype=bool)[Y], -np.inf, Q).max(1)
VULNERABILITY = {gamma: -np.exp(-gamma * P[ROWS, Y]) * KL for gamma in (3.0, 10.0)}


@pytest.fixture
def step() -> Step:
    step = Step(None, None, torch.tensor(Y), None)
    step._logits = {"nat": torch.tensor(NAT), "adv": torch.tensor(ADV)}
    return step


MARGINS = {
    "logit_margin": (logit_margin, ADV[ROWS, Y] - WITHOUT_TRUE.max(1)),
    "p_adv": (p_adv, Q[ROWS, Y]),
    "entropy": (entropy, (Q * np.log(Q)).sum(1)),
    "energy": (energy, np.abs(np.log(np.exp(NAT).sum(1)))),
    "loss_adv": (loss_adv, np.log(Q[ROWS, Y])),
    "vulnerability, AT": (vulnerability(gamma=10.0), VULNERABILITY[10.0]),
    "vulnerability, TRADES": (vulnerability(gamma=3.0), VULNERABILITY[3.0]),
}


@pytest.mark.parametrize(("margin", "expected"), MARGINS.values(), ids=MARGINS)
def test_a_margin_equals_its_formula(margin, expected, step):
    assert np.allclose(margin(step).numpy(), expected, rtol=0, atol=1e-9)


PUBLISHED = {
    "WMMR, AT": (Exp(alpha=0.5, normalize=False), PM, np.exp(-0.5 * PM)),
    "WMMR, TRADES": (Exp(alpha=2.0, normalize=False), PM, np.exp(-2.0 * PM)),
    "VIR, AT": (
        Affine(alpha=7.0, bias=0.007, normalize=False), VULNERABILITY[10.0], 0.007 - 7.0 * VULNERABILITY[10.0]),
    "VIR, TRADES": (Affine(alpha=8.0, bias=1.7, normalize=False), VULNERABILITY[3.0], 1.7 - 8.0 * VULNERABILITY[3.0]),
    "WEAT": (Softplus(normalize=False), np.abs(NAT[:, 0]), 1 / np.log(1 + np.exp(np.abs(NAT[:, 0])))),
    "SOVR": (Lowest(share=3 / 7, normalize=False), PM, (np.sort(PM)[2] >= PM).astype(float)),
    "DRO": (Softmax(temperature=0.5, normalize=False), -CE_ADV, np.exp(CE_ADV / 0.5) / np.exp(CE_ADV / 0.5).sum()),
    "CoW": (Affine(alpha=1.0, normalize=False), -P[ROWS, Y], P[ROWS, Y]),
}  # fmt: skip


@pytest.mark.parametrize(("weighter", "margin", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_weights_equal_the_published_formula_and_normalised_ones_are_divided_by_their_mean(weighter, margin, expected):
    assert np.allclose(weighter(torch.tensor(margin)).numpy(), expected, rtol=0, atol=1e-9)
    normalised = replace(weighter, normalize=True)(torch.tensor(margin)).numpy()
    assert np.allclose(normalised, expected / expected.mean(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("weighter", "margin", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_weights_are_the_normalised_ones_times_the_mean_that_is_the_control(weighter, margin, expected):
    control = MeanOf(weighter=weighter)(torch.tensor(margin)).numpy()
    assert np.allclose(control, expected.mean(), rtol=0, atol=1e-9)
    assert control.shape == expected.shape
    normalised = replace(weighter, normalize=True)(torch.tensor(margin)).numpy()
    assert np.allclose(normalised * control, expected, rtol=0, atol=1e-9)


def test_a_control_of_weights_of_mean_one_is_refused():
    with pytest.raises(RecipeError, match=r"MeanOf .given Exp.alpha=2.0.*: weights of mean one leave every weight 1"):
        MeanOf(weighter=Exp(alpha=2.0))


ONE_VERSUS_REST = np.log1p(np.exp(np.where(np.eye(5, dtype=bool)[Y], -ADV, ADV))).sum(1)
OBJECTIVES = {
    "ARoW": (ARoW(beta=6.0), 6.0 * KL * (1 - Q[ROWS, Y]), CE_NAT),
    "CoW": (ARoW(beta=6.0, anti=True), 6.0 * KL * P[ROWS, Y], CE_NAT),
    "WEAT, adv": (TRADES(beta=6.0, weigh="both", anchor="adv"), CE_ADV + 6.0 * KL, 0.0),
    "WEAT, nat": (TRADES(beta=6.0, weigh="both"), CE_NAT + 6.0 * KL, 0.0),
    "SOVR": (SOVR(scale=0.7), 0.7 * ONE_VERSUS_REST - CE_ADV, CE_ADV),
}


@pytest.mark.parametrize(("objective", "weighted", "plain"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_objective_equals_its_formula(objective, weighted, plain, step):
    terms = objective(step)
    assert np.allclose(terms.weighted.numpy(), weighted, rtol=0, atol=1e-9)
    assert np.allclose(np.asarray(terms.plain), plain, rtol=0, atol=1e-9)


def test_the_gradient_of_arow_runs_through_its_factor():
    """Against a central difference."""
    adv = torch.tensor(ADV, requires_grad=True)

    def loss(z: torch.Tensor) -> torch.Tensor:
        step = Step(None, None, torch.tensor(Y), None)
        step._logits = {"nat": torch.tensor(NAT), "adv": z}
        return ARoW()(step).weighted.sum()

    (gradient,) = torch.autograd.grad(loss(adv), adv)
    h = torch.zeros(7, 5, dtype=torch.float64)
    h[3, 2] = 1e-6
    expected = (loss(adv.detach() + h) - loss(adv.detach() - h)) / 2e-6
    assert gradient[3, 2].item() == pytest.approx(expected.item(), abs=1e-6)


def test_weights_of_mean_one_are_one_where_every_u_is_zero():
    assert Affine(alpha=1.0)(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 1, 1]


def test_the_lowest_share_takes_ties_too_and_at_least_one():
    margin = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.9])
    assert Lowest(share=0.4, normalize=False)(margin).tolist() == [0, 1, 1, 1, 0]
    assert Lowest(share=0.01, normalize=False)(torch.tensor([0.5, 0.2])).tolist() == [0, 1]


def test_pm_adv_has_the_sign_of_the_logit_margin(step):
    assert torch.equal(pm_adv(step).sign(), logit_margin(step).sign())
