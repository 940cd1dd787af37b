"""The folded model is the same function as the model, in half the precision, and follows the live weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail import PGD, Classifier, art, build, torchattack
from robustmail.attacks.view import model_view
from robustmail.errors import ModelError
from robustmail.evaluation import exact_inference
from robustmail.evaluation.exact_inference import make_search_model
from robustmail.models.folded import FoldedConv, FoldedLinear, FoldedModel
from robustmail.models.precision import flops
from tests.rounding import HALF, error_bound, gradient, needs_bf16, relative_errors

OURS = ("cifar_resnet18_w8", "cifar_preact_resnet18_w16", "cifar_wrn16_2", "small_cnn")


def with_trained_statistics(model):
    """Set BatchNorm statistics and affine parameters to values that would show if folding forgot one."""
    torch.manual_seed(0)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.running_mean, 0, 0.1)
        nn.init.uniform_(bn.running_var, 0.5, 1.5)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.1)
    return model.eval()


def build_model(name, normalize=None):
    torch.manual_seed(0)
    return with_trained_statistics(build(name, 10, 3, normalize))


every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=["float32", "bfloat16"]
)


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 32, 32, generator=rng), torch.randint(10, (6,), generator=rng)


@pytest.mark.numeric
@every_dtype
@pytest.mark.parametrize("name", [*OURS, "resnet18"])
def test_logits_and_gradients_are_the_models_but_for_rounding(name, dtype, images):
    model = build_model(name, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    if name == "resnet18" and torch.__version__.startswith("2.6."):  # its oneDNN adds no images of one pixel
        with pytest.raises(ModelError, match="could not create a memory"):  # a search then uses the model itself
            FoldedModel(model, images[0], dtype)
        return
    folded, two = FoldedModel(model, images[0], dtype), [part[:2] for part in images]
    assert folded(two[0]).dtype == torch.float32
    assert gradient(folded, *two).dtype == torch.float32
    assert relative_errors(folded, model, *two).within(error_bound(model, *two, dtype))


def test_a_search_uses_the_model_itself_if_a_hook_changes_its_gradients(images):
    model = build_model("small_cnn")
    assert isinstance(make_search_model(model, images[0], 8).network, FoldedModel)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_full_backward_hook(lambda module, into, out: (None if into[0] is None else into[0] * 0,))
    assert make_search_model(model, images[0], 8).network is model


def test_a_search_uses_the_model_itself_if_it_draws_random_numbers(images):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 900, 10))

        def forward(self, x):
            return self.net(x + 0.1 * torch.rand(3, 32, 32))

    model = Classifier(with_trained_statistics(Noisy()))
    assert make_search_model(model, images[0], 8).network is model


def test_a_large_network_is_searched_in_slices_whatever_the_folded_model_costs(images, monkeypatch):
    model = build_model("small_cnn")
    assert isinstance(make_search_model(model, images[0], 8).network, FoldedModel)
    monkeypatch.setattr(exact_inference, "MAX_FLOPS", flops(model, images[0][:1]) - 1)
    assert not make_search_model(model, images[0], 8).batch_invariant


def conv(*sizes, **knobs):
    return nn.Sequential(nn.Conv2d(*sizes, **knobs), nn.BatchNorm2d(sizes[1]), nn.ReLU())


@pytest.mark.numeric
@pytest.mark.parametrize(
    "first",
    [
        conv(3, 8, 3, stride=2, padding=1), conv(3, 8, 3, stride=2), conv(3, 8, 5, stride=3, padding=2),
        conv(3, 8, 1, stride=2), conv(3, 8, 3, padding=1, dilation=2), conv(3, 8, (3, 1), padding=(1, 0)),
        conv(3, 8, 3, padding=3), nn.Sequential(conv(3, 8, 1), conv(8, 8, 3, groups=4)), conv(3, 8, 2),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), nn.Conv2d(3, 8, 3, bias=False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [13, 16])
@every_dtype
def test_every_kind_of_convolution_has_the_right_gradient(first, size, dtype):
    model = ending_in_ten(first)
    x, y = torch.rand(4, 3, size, size), torch.arange(4)
    folded = FoldedModel(model, x, dtype)
    assert gradient(folded, x, y).shape == x.shape
    assert relative_errors(folded, model, x, y).within(error_bound(model, x, y, dtype, repeats=8))


def ending_in_ten(first):
    rest = (nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return Classifier(nn.Sequential(first, *rest)).eval()


@pytest.mark.numeric
@every_dtype
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_kernel_that_is_flipped_exceeds_the_bound(direction, dtype, monkeypatch):
    model, x, y = ending_in_ten(conv(3, 8, 3)), torch.rand(4, 3, 16, 16), torch.arange(4)
    folded = FoldedModel(model, x, dtype)
    right = {"forward": FoldedConv.forward_onednn, "backward": FoldedConv.input_gradient}[direction]

    def flipped(self, *args):
        weight, self.weight = self.weight, self.weight.flip(2, 3)
        self.packed.clear()
        result = right(self, *args)
        self.weight = weight
        self.packed.clear()
        return result

    monkeypatch.setattr(FoldedConv, right.__name__, flipped)
    assert not relative_errors(folded, model, x, y).within(error_bound(model, x, y, dtype, repeats=8))


@pytest.mark.numeric
@pytest.mark.parametrize("name", OURS)
def test_oneDNNs_operators_compute_what_torchs_own_do(name, images, monkeypatch):
    model, two = build_model(name), [part[:2] for part in images]
    folded = FoldedModel(model, images[0], HALF)
    monkeypatch.setattr(FoldedConv, "forward", lambda self, x, residual=None: self.forward_torch(x.to(HALF), residual))
    assert relative_errors(folded, model, *two).within(error_bound(model, *two, HALF))


def test_every_batchnorm_behind_a_convolution_every_sum_and_every_relu_is_folded():
    folded = FoldedModel(build_model("cifar_resnet18_w8"), torch.rand(2, 3, 32, 32), HALF)
    linear = "FoldedLinear" if torch.float32 == HALF else "Linear"
    assert {type(part).__name__ for part in folded.graph.children()} == {"FoldedConv", linear}
    steps = [node.op for node in folded.graph.graph.nodes]
    assert steps.count("call_function") == 0
    assert sum(isinstance(part, FoldedConv) for part in folded.graph.children()) == 20


@pytest.mark.numeric
def test_an_attack_always_sees_the_live_weights(images):
    model, before, two = build_model("cifar_resnet18_w8"), build_model("cifar_resnet18_w8"), [p[:2] for p in images]
    folded = FoldedModel(model, images[0], HALF)
    with torch.no_grad():
        model.net.conv1.weight.mul_(-1)
        model.net.layer1[0].bn1.running_mean.add_(1)
    bound = error_bound(model, *two, HALF)
    with model_view(folded) as view:
        assert not relative_errors(before, model, *two).within(bound)
        assert relative_errors(view, model, *two).within(bound)
    fresh = FoldedModel(model, images[0], HALF)
    assert torch.equal(folded(images[0]), fresh(images[0]))


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=3), torchattack("PGD", steps=3), torchattack("TPGD", steps=3), torchattack("APGD", steps=5),
        torchattack("APGDT", steps=3), torchattack("FAB", steps=2), torchattack("Square", n_queries=10),
        art("ProjectedGradientDescentPyTorch", eps=8 / 255, eps_step=2 / 255, max_iter=3, num_random_init=1),
    ],
    ids=lambda a: str(getattr(a, "__given__", type(a).__name__)),
)  # fmt: skip
def test_every_attack_works_on_the_folded_model_and_changes_nothing(attack, images):
    model = build_model("cifar_resnet18_w8").train()
    model.net.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    folded = FoldedModel(model, images[0], HALF)
    x_adv = attack(folded, *images).x
    assert (x_adv - images[0]).abs().max() <= 8 / 255 + 1e-6
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in folded.parameters())


class Shared(nn.Module):
    """One convolution, twice."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.branch = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10), branch

    def forward(self, x):
        if self.branch and x.mean() > 0:
            x = x + 1
        return self.head(self.conv(self.conv(x).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Shared(), "used twice"),
        (Shared(branch=True), "folding failed .TraceError"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "no convolutions"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(256, 10)), "padding 'same'"),
        (build("resnetv2_18", 10, 3).net, "parameters of its own"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10)), "GroupNorm"),
    ],
    ids=["shared", "branch", "linear", "same", "activation", "groupnorm"],
)
def test_a_network_that_cannot_be_folded_is_refused_with_the_reason(net, reason):
    with pytest.raises(ModelError, match=reason):
        FoldedModel(Classifier(net).eval(), torch.rand(2, 3, 8, 8), HALF)


@pytest.mark.parametrize("inputs", [(5, 37), (3, 4, 37), (37,), (0, 37)], ids=["rows", "tokens", "one", "none"])
def test_a_linear_layer_folded_for_a_search_computes_what_it_did_and_follows_its_weights(inputs):
    linear, x = nn.Linear(37, 11, bias=len(inputs) > 1), torch.randn(inputs)
    folded = FoldedLinear(linear, torch.float32)
    for change in (1.0, -2.0):
        with torch.no_grad():
            linear.weight.mul_(change)
        folded.conv.refresh()
        given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = folded(given), linear(expected)
        assert torch.allclose(y, wanted, atol=1e-5)
        y.square().sum().backward()
        wanted.square().sum().backward()
        assert torch.allclose(given.grad, expected.grad, atol=1e-4)
