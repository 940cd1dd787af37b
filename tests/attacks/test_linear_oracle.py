"""On a linear model everything has a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from robustmail import CR, LMPGD, MD, PGD, Step, art, kappa, lps, pm_adv, torchattack
from robustmail.runtime.rng import fork_rng, seed_all

pytestmark = pytest.mark.numeric

EPS = 8 / 255


class Linear(nn.Module):
    """Two classes; the logit gap is w . x + b."""

    def __init__(self, w: torch.Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(torch.tensor(b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x.flatten(1) * self.w).sum(1) + self.b
        return torch.stack([score / 2, -score / 2], 1)


@pytest.fixture
def linear():
    """(model, x, y, w): images away from 0 and 1, and labels that are all 0, so that an attack lowers w . x."""
    rng = torch.Generator().manual_seed(2)
    w = torch.randn(48, generator=rng)
    x = 0.4 + 0.2 * torch.rand(5, 3, 4, 4, generator=rng)
    return Linear(w, 0.3), x, torch.zeros(5, dtype=torch.long), w.view(1, 3, 4, 4)


ATTACKS = {
    "PGD": PGD(),
    "PGD margin": PGD(loss="margin"),
    "PGD pm": PGD(loss="pm"),
    "PGD with a loss of one's own": PGD(loss=lambda logits, y: -logits.gather(1, y[:, None]).squeeze(1)),
    "PGD towards a class": PGD(loss="ce", targets=3),
    "PGD over draws": PGD(eot=2),
    "PGD with falling steps": PGD(alpha=EPS, steps=20, decay="cosine"),
    "LM-PGD": LMPGD(steps=3),
    "LM-PGD, the first step that rises": LMPGD(steps=3, search="first"),
    "torchattacks PGD": torchattack("PGD"),
    "torchattacks APGD": torchattack("APGD", steps=20),
    "ART PGD": art("ProjectedGradientDescentPyTorch", eps=EPS, eps_step=2 / 255, max_iter=10),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_linf_pgd_hits_the_corner_x_minus_eps_sign_w_exactly(attack, linear):
    model, x, y, w = linear
    x_adv = attack(model, x, y).x
    is_right = torch.isclose(x_adv, x - EPS * w.sign(), atol=1e-6).flatten(1).all(1)
    if "APGD" in str(type(attack)):  # returns the clean image where it does not succeed, the first success elsewhere
        is_right |= (x_adv == x).flatten(1).all(1) | (model(x_adv).argmax(1) != y)
    assert is_right.all()


SHORT_CR = CR(steps=30, restarts=1)


@pytest.mark.parametrize("attack", [MD(steps=20), SHORT_CR, PGD(loss="pm", patience=0)], ids=["MD", "CR", "PGD pm"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_an_attack_that_stops_at_success_breaks_what_the_corner_breaks_and_nothing_else(attack, scale, linear):
    model, x, y, w = linear
    lowest = (x * w).sum((1, 2, 3)) - EPS * w.abs().sum()  # of w . x in the ball
    model.b.data.fill_(-lowest.sort().values[1:4].mean().item())  # so that some images can be broken, and some not
    model.w.data *= scale
    model.b.data *= scale
    broken = model(attack(model, x, y).x).argmax(1) != y
    assert torch.equal(broken, lowest * scale + model.b < 0)
    assert 0 < int(broken.sum()) < len(broken)


def test_md_in_l2_breaks_what_the_nearest_image_of_the_other_class_allows(linear):
    model, x, y, w = linear
    lowest = (x * w).sum((1, 2, 3)) - 0.3 * w.norm()
    model.b.data.fill_(-lowest.median().item() - 0.05)
    broken = model(MD(eps=0.3, steps=40, norm="l2")(model, x, y).x).argmax(1) != y
    assert torch.equal(broken, lowest + model.b < 0)


def test_ascending_the_probabilistic_margin_moves_where_the_cross_entropy_is_flat(linear):
    model, x, y, w = linear
    model.b.data += 1000.0  # so that the true class has probability 1 in the whole ball
    corner = x - EPS * w.sign()
    assert torch.equal(PGD(start="none")(model, x, y).x, x)
    assert torch.allclose(PGD(start="none", loss="pm", steps=4)(model, x, y).x, corner, atol=1e-6)


def test_l2_pgd_hits_x_minus_eps_w_over_its_norm(linear):
    model, x, y, w = linear
    x_adv = PGD(eps=0.3, alpha=0.1, steps=60, norm="l2")(model, x, y).x
    assert torch.allclose(x_adv, x - 0.3 * w / w.norm(), atol=1e-4)


def test_the_margin_after_the_attack_has_its_closed_form(linear):
    model, x, y, w = linear
    result = PGD()(model, x, y)
    score = (x * w).sum((1, 2, 3)) + 0.3 - EPS * w.abs().sum()
    assert torch.allclose(pm_adv(Step(model, x, y, result.x)), torch.tanh(score / 2), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 2), (1, 8, 8)])
def test_a_start_in_l2_is_uniform_in_the_ball(shape):
    d, eps = math.prod(shape), 0.1
    attack = PGD(eps=eps, alpha=0.0, steps=1, norm="l2")
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, 2))
    x = torch.full((4000, *shape), 0.5)
    with fork_rng():
        seed_all(3, "ball")
        x_adv = attack(model, x, torch.zeros(4000, dtype=torch.long)).x
    delta = (x_adv - x).flatten(1).double() / eps
    radius = delta.norm(dim=1)
    assert kstest((radius**d).numpy(), "uniform").pvalue > 0.01  # the volume within r is r^d
    assert radius.square().mean().item() == pytest.approx(d / (d + 2), rel=0.02)
    # Each coordinate has mean 0 and variance 1 / (d + 2).
    assert delta.mean(0).abs().max() < 5 / math.sqrt(4000 * (d + 2))
    assert torch.allclose(delta.var(0) * (d + 2), torch.ones(d, dtype=torch.double), atol=0.15)


def test_lps_has_its_closed_form(linear):
    model, x, y, w = linear
    start = (x * w).sum((1, 2, 3))
    drop = 2 / 255 * w.abs().sum()  # of w . x, by one step from the image itself
    model.b.data.fill_((-start.min() + 1.5 * drop).item())  # the lowest image is crossed by its second step
    result = PGD(start="none", eps=1.0, alpha=2 / 255, steps=10)(model, x, y)
    expected = torch.ceil((start + model.b) / drop).clamp(0, 10)
    step = Step(model, x, y, result.x, result.trace)
    assert torch.equal(lps(step), expected.detach())
    assert torch.equal(kappa(step), expected.detach())
    assert lps(step).min() == 2


def test_friendly_pgd_stops_each_example_at_its_own_first_wrong_iterate(linear):
    model, x, y, w = linear
    start = (x * w).sum((1, 2, 3))
    drop = 2 / 255 * w.abs().sum()
    model.b.data.fill_((-start.min() + 1.5 * drop).item())
    crossing = torch.ceil((start + model.b) / drop).clamp(0, 10).detach()
    for patience in (0, 1, 3):
        result = PGD(start="none", eps=1.0, alpha=2 / 255, steps=10, patience=patience)(model, x, y)
        taken = (crossing + patience).clamp(max=10).view(-1, 1, 1, 1)  # steps before it lets go
        assert torch.allclose(result.x, (x - taken * 2 / 255 * w.sign()).clamp(0, 1), atol=1e-5)
        assert torch.equal(lps(Step(model, x, y, result.x, result.trace)), crossing)


def test_friendly_pgd_leaves_an_image_alone_that_is_wrong_already(linear):
    model, x, y, _ = linear
    model.b.data.fill_(-1000.0)
    result = PGD(start="none", patience=0)(model, x, y)
    assert torch.equal(result.x, x)
    assert not result.trace.correct.any()


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_friendly_pgd_with_the_patience_of_all_steps_is_pgd(linear, start):
    results = []
    for patience in (None, 10):
        torch.manual_seed(4)
        results.append(PGD(patience=patience, start=start)(*linear[:3]))
    assert torch.equal(results[0].x, results[1].x)
    assert torch.equal(results[0].trace.correct, results[1].trace.correct)
    assert torch.allclose(results[0].trace.p_true, results[1].trace.p_true)


def test_the_unit_start_is_algorithm_1_to_the_letter(linear):
    model, x, y, _ = linear
    x_adv = PGD(start="unit", steps=1, alpha=0.0)(model, x, y).x
    assert (x_adv >= x).all()
    assert (
        torch.isclose(x_adv - x, torch.tensor(EPS), atol=1e-6).float().mean() > 0.9
    )  # U(0, 1) is nearly always larger than eps


@pytest.mark.parametrize("search", ["best", "first"])
def test_lm_pgd_ends_no_lower_than_pgd_from_the_same_start(small, real_images, search):
    x, y = real_images
    model = type(small)(3, 32).eval()
    losses = []
    for attack in (PGD(steps=5), LMPGD(steps=5, search=search)):
        torch.manual_seed(4)
        losses.append(torch.nn.functional.cross_entropy(model(attack(model, x, y).x), y).item())
    assert losses[1] >= losses[0] - 1e-4


def test_the_first_step_that_rises_is_the_longest_and_none_is_taken_at_a_maximum():
    class Hill(torch.nn.Module):  # its loss rises with the single pixel up to 0.5, and falls beyond
        def forward(self, x):
            height = 4 - 40 * (x.flatten(1) - 0.5).abs()
            return torch.cat([-height, height], 1)

    eps = 0.1
    x, y = torch.tensor([0.44, 0.5]).view(2, 1, 1, 1), torch.tensor([0, 0])
    found = {
        search: LMPGD(eps=eps, alpha=0.06, steps=1, start="none", search=search)(Hill(), x, y).x.flatten()
        for search in ("best", "first")
    }
    assert found["best"][0] == pytest.approx(0.5), "alpha leads to the top"
    assert found["first"][0] == pytest.approx(0.54), "2 eps is clipped to eps, beyond the top, and still higher"
    assert found["first"][1] == 0.5
