"""What gradient attacks share: a gradient over draws, and the ascent of the probabilistic margin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail import PGD
from robustmail.attacks.steps import gradient_and_logits, lengths, likeliest_wrong, sums
from robustmail.attacks.view import model_view
from robustmail.errors import PluginError, RecipeError
from robustmail.functional import gap, pm_ascent


class Draws(nn.Module):
    """Logits k x at the k-th pass."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 0

    def forward(self, x):
        self.k += 1
        return self.k * x.flatten(1)


def test_over_draws_gradient_and_logits_are_the_means():
    x = torch.rand(2, 1, 1, 3)
    with model_view(Draws()) as view:
        gradient, logits = gradient_and_logits(view, x, lambda z: z.sum(1), draws=4)
    assert torch.allclose(gradient, torch.full_like(x, 2.5))
    assert torch.allclose(logits, 2.5 * x.flatten(1))


@pytest.mark.parametrize("measure", [sums, lengths])
def test_a_large_image_has_the_same_bits_alone_and_beside_others(measure):
    before, images = torch.get_num_threads(), torch.rand(3, 3, 224, 224)
    torch.set_num_threads(2)
    try:
        values = measure(images)
        assert all(torch.equal(measure(images[i : i + 1]), values[i : i + 1]) for i in range(3))
        assert measure(images[:0]).shape == (0,)
    finally:
        torch.set_num_threads(before)
    expected = {sums: images.sum((1, 2, 3)), lengths: images.square().sum((1, 2, 3)).sqrt()}
    assert torch.allclose(values, expected[measure])


@pytest.mark.parametrize("with_rival", [False, True])
def test_the_ascent_has_the_gradient_of_the_probabilistic_margin_over_a_constant(with_rival):
    logits = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    y, rival = torch.arange(6) % 5, (torch.arange(6) + 2) % 5
    p = logits.softmax(1)
    p_y = p.gather(1, y[:, None]).squeeze(1)
    value = p.gather(1, rival[:, None]).squeeze(1) - p_y if with_rival else -gap(p, y)
    (expected,) = torch.autograd.grad((value / (1 - p_y).detach()).sum(), logits)
    (actual,) = torch.autograd.grad(pm_ascent(logits, y, rival if with_rival else None).sum(), logits)
    assert torch.allclose(actual, expected)


def test_the_ascent_has_a_gradient_where_the_true_class_has_probability_one():
    logits = torch.tensor([[300.0, 0.0, -200.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(pm_ascent(logits, torch.tensor([0])).sum(), logits)
    assert torch.allclose(slope, torch.tensor([[-2.0, 2.0, 0.0]]))


def test_the_likeliest_wrong_classes_come_in_order_and_are_as_many_as_there_are():
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), torch.tensor([0, 2])
    assert likeliest_wrong(logits, y, 9).tolist() == [[2, 1], [1, 0]]


def test_a_target_needs_a_loss_that_has_one():
    with pytest.raises(RecipeError, match=r"given targets=2, loss='kl'\): this loss has no target"):
        PGD(targets=2, loss="kl")


def test_a_loss_of_ones_own_returns_a_number_per_image(small, batch):
    with pytest.raises(PluginError, match=r"loss <lambda> .*returned shape \[\] for a batch of 8, expected \[8\]"):
        PGD(loss=lambda logits, y: logits.sum())(small, *batch)
