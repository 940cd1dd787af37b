"""The folded model is the same function as the model, in half the precision, and follows the live weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustmail import PGD, Classifier, art, build, torchattack
from robustmail.attacks.view import model_view
from robustmail.errors import ModelError
from robustmail.evaluation import exact_inference
from robustmail.evaluation.exact_inference import make_search_model
from robustmail.models.folded import FoldedConv, FoldedModel
from robustmail.models.precision import flops

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


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 32, 32, generator=rng), torch.randint(10, (6,), generator=rng)


def gradient(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def cosine(a, b):
    return F.cosine_similarity(a.flatten(), b.flatten(), 0).item()


@pytest.mark.parametrize("name", [*OURS, "resnet18"])
def test_logits_and_gradients_are_the_models_but_for_rounding(name, images):
    model = build_model(name, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    folded = FoldedModel(model, images[0])
    assert folded(images[0]).dtype == torch.float32
    assert gradient(folded, *images).dtype == torch.float32
    assert torch.allclose(folded(images[0]), model(images[0]), atol=0.03 * model(images[0]).abs().max().item())
    assert cosine(gradient(folded, *images), gradient(model, *images)) > 0.95


@pytest.mark.parametrize("name", [*OURS, "resnet18"])
def test_in_float32_the_folded_model_is_the_model_to_four_digits(name, images):
    model = build_model(name, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    folded = FoldedModel(model, images[0], torch.float32)
    assert torch.allclose(folded(images[0]), model(images[0]), atol=1e-4 * model(images[0]).abs().max().item())
    assert cosine(gradient(folded, *images), gradient(model, *images)) > 0.9999


def test_a_search_uses_the_model_itself_if_a_hook_changes_its_gradients(images):
    model = build_model("small_cnn")
    assert isinstance(make_search_model(model, images[0], 8).form, FoldedModel)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_full_backward_hook(lambda module, into, out: (None if into[0] is None else into[0] * 0,))
    assert make_search_model(model, images[0], 8).form is model


def test_a_search_uses_the_model_itself_if_it_draws_random_numbers(images):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 900, 10))

        def forward(self, x):
            return self.net(x + 0.1 * torch.rand(3, 32, 32))

    model = Classifier(with_trained_statistics(Noisy()))
    assert make_search_model(model, images[0], 8).form is model


def test_a_large_network_is_searched_in_slices_whatever_the_folded_model_costs(images, monkeypatch):
    model = build_model("small_cnn")
    assert isinstance(make_search_model(model, images[0], 8).form, FoldedModel)
    monkeypatch.setattr(exact_inference, "SMALL", flops(model, images[0][:1]) - 1)
    assert not make_search_model(model, images[0], 8).whole


def conv(*sizes, **knobs):
    return nn.Sequential(nn.Conv2d(*sizes, **knobs), nn.BatchNorm2d(sizes[1]), nn.ReLU())


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
def test_every_kind_of_convolution_has_the_right_gradient(first, size):
    torch.manual_seed(0)
    net = nn.Sequential(first, nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model = Classifier(net).eval()
    x, y = torch.rand(4, 3, size, size), torch.arange(4)
    folded = FoldedModel(model, x)
    assert gradient(folded, x, y).shape == x.shape
    assert cosine(gradient(folded, x, y), gradient(model, x, y)) > 0.99


@pytest.mark.parametrize("name", OURS)
def test_oneDNNs_operators_compute_what_torchs_own_do(name, images, monkeypatch):
    folded = FoldedModel(build_model(name), images[0])
    fused = gradient(folded, *images)
    monkeypatch.setattr(
        FoldedConv, "forward", lambda self, x, residual=None: self.forward_torch(x.bfloat16(), residual)
    )
    assert cosine(fused, gradient(folded, *images)) > 0.95


def test_every_batchnorm_behind_a_convolution_every_sum_and_every_relu_is_folded():
    folded = FoldedModel(build_model("cifar_resnet18_w8"), torch.rand(2, 3, 32, 32))
    assert {type(part).__name__ for part in folded.graph.children()} == {"FoldedConv", "Linear"}
    steps = [node.op for node in folded.graph.graph.nodes]
    assert steps.count("call_function") == 0
    assert sum(isinstance(part, FoldedConv) for part in folded.graph.modules()) == 20


def test_an_attack_always_sees_the_live_weights(images):
    model = build_model("cifar_resnet18_w8")
    folded = FoldedModel(model, images[0])
    before = folded(images[0])
    with torch.no_grad():
        model.net.conv1.weight.mul_(-1)
        model.net.layer1[0].bn1.running_mean.add_(1)
    with model_view(folded) as view:
        assert not torch.allclose(view(images[0]), before, atol=0.003)
        assert torch.allclose(view(images[0]), model(images[0]), atol=0.003)
    fresh = FoldedModel(model, images[0])
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
    folded = FoldedModel(model, images[0])
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
        FoldedModel(Classifier(net).eval(), torch.rand(2, 3, 8, 8))
