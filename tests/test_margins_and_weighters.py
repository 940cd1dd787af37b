"""What every margin and every weight promises."""

from __future__ import annotations

import pytest
import torch

from robustmail import (
    PGD,
    Affine,
    Discrete,
    Exp,
    Lowest,
    Sigmoid,
    Softmax,
    Softplus,
    Step,
    Tanh,
    Trace,
    target_confidence,
)  # fmt: skip
from robustmail.catalog import catalog_entries
from robustmail.config.overrides import parse_value
from robustmail.contracts.samples import in_training
from robustmail.functional import one_hot
from robustmail.step import Context

MARGINS = {name: parse_value(name) for name in catalog_entries("margins")}
WEIGHTS = {
    "Sigmoid(10, -0.5)": Sigmoid(slope=10.0, bias=-0.5),
    "Sigmoid(2, 0)": Sigmoid(slope=2.0, bias=0.0),
    "Sigmoid(1000, -1)": Sigmoid(slope=1000.0, bias=-1.0),
    "Tanh": Tanh(),
    "Tanh(inf)": Tanh(lam=float("inf")),
    "Discrete": Discrete(),
    "Exp(0.5)": Exp(alpha=0.5),
    "Affine(7, 0.007)": Affine(alpha=7.0, bias=0.007),
    "Softmax(0.1)": Softmax(temperature=0.1),
    "Softplus": Softplus(),
    "Lowest(0.4)": Lowest(share=0.4),
}
every_margin = pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


def step_of(nat, adv, y, trace):
    targets = {"targets": one_hot(y, nat.shape[1])}
    context = Context(torch.arange(len(y)), 0, 1, target_confidence().memory, targets)
    step = Step(None, None, y, None, trace, context=context)
    step._logits = {"nat": nat, "adv": adv}
    return step


@pytest.fixture
def logits():
    rng = torch.Generator().manual_seed(3)
    nat, adv = (torch.randn(6, 10, generator=rng) * 3 for _ in range(2))
    trace = Trace(torch.rand(10, 6, generator=rng) < 0.7, torch.rand(10, 6, generator=rng))
    return nat, adv, torch.randint(10, (6,), generator=rng), trace


@every_margin
def test_a_margin_is_one_finite_detached_number_per_example(margin, logits):
    nat, adv, y, trace = logits
    value = margin(step_of(nat.requires_grad_(), adv.requires_grad_(), y, trace).detached())
    assert value.shape == (6,)
    assert value.isfinite().all()
    assert not value.requires_grad


@every_margin
def test_a_margin_stays_finite_at_huge_logits_and_in_bfloat16(margin, logits):
    nat, adv, y, trace = logits
    for change in (lambda z: z.sign() * 1e4, lambda z: z.bfloat16()):
        value = margin(step_of(change(nat), change(adv), y, trace))
        assert value.isfinite().all()
        assert value.dtype == torch.float32


@every_margin
def test_a_margin_does_not_depend_on_the_order_or_the_company_of_examples(margin, logits):
    nat, adv, y, trace = logits
    value = margin(step_of(nat, adv, y, trace))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = step_of(nat[order], adv[order], y[order], Trace(*(t[:, order] for t in trace)))
    assert torch.allclose(margin(shuffled), value[order], atol=1e-6)
    alone = step_of(nat[:1], adv[:1], y[:1], Trace(*(t[:, :1] for t in trace)))
    assert torch.allclose(margin(alone), value[:1], atol=1e-6)


@every_margin
def test_a_margin_looks_without_touching(margin, small, batch):
    x, y = batch
    found = PGD(steps=2)(small, x, y)
    step = in_training(margin, Step(small.train(), x, y, found.x, found.trace))
    statistics = [b.clone() for b in small.buffers()]
    margin(step.detached())
    assert all(torch.equal(a, b) for a, b in zip(small.buffers(), statistics, strict=True))
    assert not step.has("nat"), "the window wrote into the step"
    assert not step.has("adv"), "the window wrote into the step"
    assert small.training
    assert small.bn.training


@every_weight
@pytest.mark.parametrize("size", [1, 2, 80, 128])
def test_weights_are_finite_not_negative_of_mean_one_and_fall_with_the_margin(weight, size):
    margin = torch.linspace(-1, 1, size)
    value = weight(margin)
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert value.mean().item() == pytest.approx(1, abs=1e-5)
    assert (value.diff() <= 0).all()


@every_weight
def test_equal_margins_get_weight_one(weight):
    assert torch.allclose(weight(torch.full((7,), 0.3)), torch.ones(7))


def test_a_scale_replaces_the_normalisation_as_in_the_authors_code():
    margin = torch.tensor([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 1])
    value = Sigmoid(slope=10.0, bias=-0.5, normalize=False, scale=3.0)(margin)
    table = torch.tensor([2.980, 2.772, 1.500, 0.228, 0.0201, 0.0017, 0.0001, 1e-6])
    assert torch.allclose(value, table, atol=5e-4)
    value = Sigmoid(slope=2.0, bias=0.0, normalize=False, scale=3.0)(margin)
    assert torch.allclose(value, torch.tensor([2.642, 2.453, 2.193, 1.867, 1.5, 1.133, 0.807, 0.358]), atol=5e-4)


def test_tanh_is_a_sigmoid_of_twice_the_argument_so_gairats_sigmoid_is_a_setting_of_mails():
    kappa = torch.arange(11.0)
    assert torch.allclose(Tanh(lam=-1.0)(kappa), Sigmoid(slope=2.0, bias=4.0)(kappa), atol=1e-6)


def test_lps_is_the_first_crossing_and_kappa_the_count():
    correct = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    step = step_of(
        torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), Trace(correct, correct * 1.0)
    )
    assert MARGINS["lps"](step).tolist() == [3, 1, 3, 0]
    assert MARGINS["kappa"](step).tolist() == [3, 2, 3, 0]


def test_pm_dif_reads_the_first_misclassified_iterate_or_the_last_one():
    nat, adv = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    trace = Trace(torch.tensor([[1, 1], [0, 1]]).bool(), torch.tensor([[0.8, 0.8], [0.4, 0.7]]))
    value = MARGINS["pm_dif"](step_of(nat, adv, torch.tensor([0, 0]), trace))
    p = torch.sigmoid(torch.tensor([2.0, 1.0]))
    assert torch.allclose(value, torch.stack([p[0] - 0.4, p[0] - p[1]]))


def test_the_probabilistic_margin_of_paper_examples():
    y = torch.tensor([0, 0, 0])
    adv = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]).log()
    value = MARGINS["pm_adv"](step_of(adv, adv, y, None))
    assert torch.allclose(value, torch.tensor([0.2, 0.0, -0.8]), atol=1e-6)
