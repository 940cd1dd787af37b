"""The twin that attacks see: the same function as the model, half the precision, and never out of date."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail import PGD, Classifier, art, build, torchattack
from robustmail.attacks.view import model_view
from robustmail.errors import ModelError
from robustmail.evaluation import exact_inference
from robustmail.evaluation.exact_inference import make_search_model
from robustmail.models.folded import FoldedConv, FoldedModel
from robustmail.models.precision import flops
from tests.rounding import HALF, allowed, apart, gradient, needs_bf16

OURS = ("cifar_resnet18_w8", "cifar_preact_resnet18_w16", "cifar_wrn16_2", "small_cnn")


def lived_in(model):
    """Statistics and affine parameters as after some training: none is what folding could forget."""
    torch.manual_seed(0)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.running_mean, 0, 0.1)
        nn.init.uniform_(bn.running_var, 0.5, 1.5)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.1)
    return model.eval()


def made(name, normalize=None):
    torch.manual_seed(0)
    return lived_in(build(name, 10, 3, normalize))


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
    model = made(name, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    twin, few = FoldedModel(model, images[0], dtype), [part[:2] for part in images]
    assert twin(few[0]).dtype == torch.float32
    assert gradient(twin, *few).dtype == torch.float32
    assert apart(twin, model, *few).within(allowed(model, *few, dtype))


def test_a_search_goes_to_the_model_itself_where_a_hook_bends_its_gradients(images):
    model = made("small_cnn")
    assert isinstance(make_search_model(model, images[0], 8).network, FoldedModel)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_full_backward_hook(lambda module, into, out: (None if into[0] is None else into[0] * 0,))
    assert make_search_model(model, images[0], 8).network is model


def test_a_search_goes_to_the_model_itself_where_it_draws_at_random(images):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 900, 10))

        def forward(self, x):
            return self.net(x + 0.1 * torch.rand(3, 32, 32))

    model = Classifier(lived_in(Noisy()))
    assert make_search_model(model, images[0], 8).network is model


def test_a_large_network_is_searched_in_slices_whatever_its_twin_seems_to_cost(images, monkeypatch):
    model = made("small_cnn")
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
def test_every_kind_of_convolution_has_its_gradient(first, size, dtype):
    model = ending_in_ten(first)
    x, y = torch.rand(4, 3, size, size), torch.arange(4)
    twin = FoldedModel(model, x, dtype)
    assert gradient(twin, x, y).shape == x.shape
    assert apart(twin, model, x, y).within(allowed(model, x, y, dtype, repeats=8))


def ending_in_ten(first):
    rest = (nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return Classifier(nn.Sequential(first, *rest)).eval()


@pytest.mark.numeric
@every_dtype
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_no_rounding_excuses_a_kernel_that_is_turned_around(way, dtype, monkeypatch):
    model, x, y = ending_in_ten(conv(3, 8, 3)), torch.rand(4, 3, 16, 16), torch.arange(4)
    twin = FoldedModel(model, x, dtype)
    done = {"forward": FoldedConv.fused, "backward": FoldedConv.pull_back}[way]

    def turned(self, *given):
        kept, self.weight = self.weight, self.weight.flip(2, 3)
        self.packed.clear()
        result = done(self, *given)
        self.weight = kept
        self.packed.clear()
        return result

    monkeypatch.setattr(FoldedConv, done.__name__, turned)
    assert not apart(twin, model, x, y).within(allowed(model, x, y, dtype, repeats=8))


@pytest.mark.numeric
@pytest.mark.parametrize("name", OURS)
def test_torchs_own_operators_do_elsewhere_what_oneDNNs_do(name, images, monkeypatch):
    model, few = made(name), [part[:2] for part in images]
    twin = FoldedModel(model, images[0], HALF)
    monkeypatch.setattr(FoldedConv, "forward", lambda self, x, other=None: self.plain(x.to(HALF), other))
    assert apart(twin, model, *few).within(allowed(model, *few, HALF))


def test_every_batchnorm_behind_a_convolution_every_sum_and_every_relu_is_folded():
    twin = FoldedModel(made("cifar_resnet18_w8"), torch.rand(2, 3, 32, 32), HALF)
    assert {type(part).__name__ for part in twin.graph.children()} == {"FoldedConv", "Linear"}
    steps = [node.op for node in twin.graph.graph.nodes]
    assert steps.count("call_function") == 0
    assert sum(isinstance(part, FoldedConv) for part in twin.graph.modules()) == 20


@pytest.mark.numeric
def test_it_follows_the_weights_each_time_it_is_lent(images):
    model, before, few = made("cifar_resnet18_w8"), made("cifar_resnet18_w8"), [part[:2] for part in images]
    twin = FoldedModel(model, images[0], HALF)
    with torch.no_grad():
        model.net.conv1.weight.mul_(-1)
        model.net.layer1[0].bn1.running_mean.add_(1)
    most = allowed(model, *few, HALF)
    with model_view(twin) as view:
        assert not apart(before, model, *few).within(most)
        assert apart(view, model, *few).within(most)
    fresh = FoldedModel(model, images[0], HALF)
    assert torch.equal(twin(images[0]), fresh(images[0]))


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=3), torchattack("PGD", steps=3), torchattack("TPGD", steps=3), torchattack("APGD", steps=5),
        torchattack("APGDT", steps=3), torchattack("FAB", steps=2), torchattack("Square", n_queries=10),
        art("ProjectedGradientDescentPyTorch", eps=8 / 255, eps_step=2 / 255, max_iter=3, num_random_init=1),
    ],
    ids=lambda a: str(getattr(a, "__given__", type(a).__name__)),
)  # fmt: skip
def test_every_attack_takes_it_for_the_model_and_leaves_no_mark(attack, images):
    model = made("cifar_resnet18_w8").train()
    model.net.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    twin = FoldedModel(model, images[0], HALF)
    found = attack(twin, *images)
    assert (found.x - images[0]).abs().max() <= 8 / 255 + 1e-6
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in twin.parameters())


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
    ("net", "why"),
    [
        (Shared(), "used twice"),
        (Shared(branch=True), "cannot be folded .TraceError"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "no convolutions"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(256, 10)), "padding 'same'"),
        (build("resnetv2_18", 10, 3).net, "parameters of its own"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10)), "GroupNorm"),
    ],
    ids=["shared", "branch", "linear", "same", "activation", "groupnorm"],
)
def test_what_cannot_be_folded_says_why(net, why):
    with pytest.raises(ModelError, match=why):
        FoldedModel(Classifier(net).eval(), torch.rand(2, 3, 8, 8), HALF)
