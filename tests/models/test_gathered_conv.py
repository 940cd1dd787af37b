"""A convolution as a matrix product is the same convolution, and is taken for few pixels and many channels alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustmail import Classifier
from robustmail.models import gathered_conv as gathering
from robustmail.models.folded import Autocast, FoldedConv, FoldedModel
from robustmail.models.gathered_conv import gather_pays, gathered_conv, gathered_input_gradient
from tests.rounding import error_bound, gradient, needs_bf16, relative_errors

KINDS = [  # kernel, stride, padding
    ((3, 3), [1, 1], [1, 1]), ((3, 3), [2, 2], [1, 1]), ((3, 3), [2, 2], [0, 0]), ((3, 1), [1, 2], [1, 0]),
    ((2, 2), [1, 1], [0, 0]), ((3, 3), [1, 1], [3, 3]), ((5, 5), [3, 3], [2, 2]), ((3, 3), [1, 1], [0, 2]),
]  # fmt: skip


@pytest.fixture
def as_with_amx(monkeypatch):
    monkeypatch.setattr(gathering, "has_amx", lambda: True)


@pytest.fixture
def counted(monkeypatch):
    """The calls of the matrix product, by the shape of the weight."""
    calls, product = [], gathering._GatheredConv.forward

    def forward(ctx, x, weight, *geometry):
        calls.append(tuple(weight.shape))
        return product(ctx, x, weight, *geometry)

    monkeypatch.setattr(gathering._GatheredConv, "forward", staticmethod(forward))
    return calls


def pair(kernel, size=(7, 6), **knobs):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride", "padding"), KINDS)
def test_output_and_both_gradients_are_those_of_the_convolution(kernel, stride, padding, layout):
    x, weight = (part.detach().contiguous(memory_format=layout).requires_grad_() for part in pair(kernel))
    y, expected = gathered_conv(x, weight, stride, padding), F.conv2d(x, weight, None, stride, padding)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    above = torch.randn_like(expected)
    grads, right = (torch.autograd.grad(out, (x, weight), above) for out in (y, expected))
    torch.testing.assert_close(grads, right)
    torch.testing.assert_close(gathered_input_gradient(above, weight, x.shape, stride, padding), right[0])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [KINDS[0], KINDS[1]])
def test_the_gradient_has_a_gradient_itself(kernel, stride, padding):
    x, weight = pair(kernel, size=(4, 4))
    assert torch.autograd.gradgradcheck(lambda x, w: gathered_conv(x, w, stride, padding), (x, weight))


def test_partial_gradients_are_summed_in_float32():
    # First 1, then 255 times 2^-8: a sum in bfloat16 stays at 1 to the last.
    gradient = torch.full((1, 1, 16, 16), 2.0**-8, dtype=torch.bfloat16)
    gradient[0, 0, -1, -1] = 1
    weight = torch.ones(1, 1, 32, 32, dtype=torch.bfloat16)
    shape = torch.Size((1, 1, 62, 62))
    summed = gathered_input_gradient(gradient, weight, shape, [2, 2], [0, 0])
    exact = F.conv_transpose2d(gradient.double(), weight.double(), stride=2)
    assert ((summed.double() - exact).abs() / exact).max() < 2.0**-8


def test_the_rule_takes_few_pixels_and_many_channels_with_amx_alone(monkeypatch):
    def pays(size, channels=512, out=512, kernel=(3, 3), stride=1, padding=1):
        weight = torch.empty(1).expand(out, channels, *kernel)
        return gather_pays(torch.Size((128, channels, size, size)), weight, [stride] * 2, [padding] * 2)

    assert not pays(4) or gathering.has_amx()
    monkeypatch.setattr(gathering, "has_amx", lambda: True)
    assert pays(4)
    assert pays(8, channels=256, stride=2)
    assert not pays(8)
    assert not pays(4, channels=128)
    assert not pays(4, out=128)
    assert not pays(4, kernel=(1, 1), padding=0)
    monkeypatch.setattr(gathering, "has_amx", lambda: False)
    assert not pays(4)


def narrow_end():
    """A network with one layer of stride 2 and one of stride 1 at 4 x 4 pixels, and a sum behind it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
            self.second, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

        def forward(self, x):
            x = self.bn1(self.first(x)).relu()
            return (self.bn2(self.second(x)) + x).relu()

    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 8, 3, padding=1), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Classifier(nn.Sequential(stem, Block(), *head)).eval()


GATHERED = [(16, 8, 3, 3), (16, 16, 3, 3)]


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_a_folded_model_with_gathered_layers_is_the_model_but_for_rounding(dtype, as_with_amx, counted, monkeypatch):
    monkeypatch.setattr(gathering, "MIN_CHANNELS", 8)
    monkeypatch.setattr(FoldedConv, "gathers", lambda conv, shape: gather_pays(shape, conv.weight, *gathering_of(conv)))
    model, x, y = narrow_end(), torch.rand(4, 3, 8, 8), torch.arange(4)
    folded, bound = FoldedModel(model, x, dtype), error_bound(model, x, y, dtype, repeats=8)
    counted.clear()
    assert relative_errors(folded, model, x, y).within(bound)
    assert set(counted) == {*GATHERED}  # the flipped weight has the shape of the second
    monkeypatch.setattr(gathering, "_matrix", lambda weight: weight.flip(2).permute(0, 2, 3, 1).flatten(1).t())
    assert not relative_errors(folded, model, x, y).within(bound)


def gathering_of(conv):
    padding, stride, _ = conv.geometry
    return stride, padding


def test_only_layers_in_bfloat16_without_groups_and_dilation_are_gathered(as_with_amx, monkeypatch):
    monkeypatch.setattr(gathering, "MIN_CHANNELS", 4)
    shape = torch.Size((2, 8, 4, 4))

    def gathers(dtype=torch.bfloat16, **knobs):
        return FoldedConv(nn.Conv2d(8, 8, 3, padding=1, **knobs), None, dtype).gathers(shape)

    assert gathers()
    assert not gathers(torch.float32)
    assert not gathers(groups=2)
    assert not gathers(dilation=2)


@pytest.mark.numeric
def test_the_loss_in_autocast_gathers_too_and_has_the_gradient_of_every_weight(as_with_amx, counted, monkeypatch):
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)

    def gradients():
        model = narrow_end().train()
        F.cross_entropy(Autocast(model)(x), y).backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    assert not counted
    monkeypatch.setattr(gathering, "MIN_CHANNELS", 8)
    for found, right in zip(gradients(), expected, strict=True):
        assert found.shape == right.shape
        assert (found - right).norm() <= 0.05 * right.norm() + 1e-3
    assert set(counted) >= {*GATHERED}


def test_outside_autocast_no_convolution_is_gathered(as_with_amx, counted, monkeypatch):
    monkeypatch.setattr(gathering, "MIN_CHANNELS", 8)
    model, x = narrow_end(), torch.rand(4, 3, 8, 8)
    with gathering.GatherConvolutions():
        assert torch.equal(model(x), model(x))
    assert not counted
    assert gradient(model, x, torch.arange(4)).shape == x.shape


@pytest.mark.parametrize(
    ("device", "amx", "looks"), [("cpu", True, True), ("cpu", False, False), ("cuda", True, False)]
)
def test_calls_of_torch_are_looked_at_on_a_cpu_with_amx_alone(device, amx, looks, monkeypatch):
    monkeypatch.setattr(gathering, "has_amx", lambda: amx)
    assert isinstance(gathering.gathering(torch.device(device)), gathering.GatherConvolutions) == looks
