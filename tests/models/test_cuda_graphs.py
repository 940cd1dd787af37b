"""CUDA graphs, where there is no GPU: a recorder that writes operators down and does them again on the same tensors.

What it shares with a graph is what can go wrong: addresses that are remembered, results that the next pass overwrites.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustmail import PGD, Classifier, torchattack
from robustmail.errors import ModelError
from robustmail.models import cuda_graphs, precision
from robustmail.models.folded import FoldedConv, FoldedModel
from robustmail.models.precision import PrecisionChoice, compute_models
from tests.models.test_folded import made
from tests.rounding import gradient


class Tape(TorchDispatchMode):
    def __init__(self, before=None):
        super().__init__()
        self.before, self.notes, self.played = before, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, results))
        return results

    def pool(self):
        return None

    def replay(self):
        self.played += 1
        for func, args, kwargs, before in self.notes:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        if self.before is not None:
            self.before.spoil()

    def spoil(self):
        """The memory of a pass is the way back's to use."""
        given, made = set(), {}
        for _, args, kwargs, results in self.notes:
            given |= {address(t) for t in tensors((args, kwargs))} - made.keys()
            made |= {address(t): t for t in tensors(results) if address(t) not in given}
        for tensor in made.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def record(work, before=None):
    with Tape(before) as tape:
        return tape, work()


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", record)
    monkeypatch.setattr(cuda_graphs, "_warm_up", lambda function, x: None)
    monkeypatch.setattr(precision, "enabled", lambda device: True)
    plain = FoldedConv.plain
    monkeypatch.setattr(FoldedConv, "forward", lambda self, x, other=None: plain(self, x.to(self.weight.dtype), other))


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 32, 32, generator=rng), torch.randint(10, (6,), generator=rng)


def both(name, images, normalize=None):
    """A twin that is recorded and one that is not, of one model."""
    model = made(name, normalize)
    twin, plain = FoldedModel(model, images[0]), FoldedModel(model, images[0])
    twin.record(images[0])
    return model, twin, plain


# In the last, BatchNorm before relu cannot be folded: the recording holds the live model's own tensors.
@pytest.mark.parametrize("name", ["cifar_resnet18_w8", "small_cnn", "cifar_wrn16_2"])
def test_a_recording_follows_weights_and_statistics_to_the_bit(name, images):
    model, twin, plain = both(name, images, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    for _ in range(2):
        x = torch.rand_like(images[0])
        before = twin.recorded.there.played
        assert torch.equal(twin(x), plain(x))
        assert torch.equal(gradient(twin, x, images[1]), gradient(plain, x, images[1]))
        assert twin.recorded.there.played == before + 2
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.1)
        twin.refresh()
        plain.refresh()


def test_logits_and_gradients_are_the_callers_to_keep(images):
    _, twin, _ = both("cifar_resnet18_w8", images)
    logits, slope = twin(images[0]), gradient(twin, *images)
    kept = logits.clone(), slope.clone()
    gradient(twin, 1 - images[0], images[1])
    assert torch.equal(logits, kept[0])
    assert torch.equal(slope, kept[1])


@pytest.mark.parametrize("asked", ["twice", "after another pass"])
def test_a_gradient_is_right_when_asked_for(asked, images):
    _, twin, plain = both("cifar_resnet18_w8", images)

    def slopes(model):
        x = images[0].clone().requires_grad_()
        logits = model(x)
        if asked == "after another pass":
            model(1 - images[0])
        for loss in (F.cross_entropy(logits, images[1]), logits.square().sum()):
            yield torch.autograd.grad(loss, x, retain_graph=True)[0]

    for a, b in zip(slopes(twin), slopes(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=8 / 255, alpha=2 / 255, steps=3, loss="kl", start="gaussian"),
        torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=3),
    ],
    ids=["PGD", "TPGD"],
)
def test_attacks_find_the_same_images(attack, images):
    model, twin, plain = both("cifar_resnet18_w8", images)
    found = []
    for form in (twin, plain):
        torch.manual_seed(0)
        y = model(images[0]).argmax(1)
        found.append(attack(form, images[0], y))
    found = [f if isinstance(f, torch.Tensor) else f.x for f in found]
    assert not torch.equal(found[0], images[0])
    assert torch.equal(*found)
    assert twin.recorded.way_back.played > 3


def test_batches_of_another_size_or_precision_are_not_played(images):
    _, twin, plain = both("cifar_resnet18_w8", images)
    before = twin.recorded.there.played
    for x in (images[0][:5], images[0].double()):
        assert torch.equal(twin(x), plain(x))
    assert twin.recorded.there.played == before


def test_a_recording_of_tensors_that_were_replaced_is_given_up(images):
    model, twin, plain = both("small_cnn", images)
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    for form in (twin, plain):
        form.refresh()
    assert torch.equal(twin(images[0]), plain(images[0]))
    assert twin.recorded is None


def test_the_run_says_whether_passes_are_recorded_and_goes_on_where_they_cannot_be(images, monkeypatch):
    model = made("small_cnn")
    fast = compute_models(model, PrecisionChoice("bf16", "as asked"), "eval", images[0])
    assert fast.attack.recorded is not None
    assert fast.said.endswith("a twin with BatchNorm folded into its convolutions, in CUDA graphs")

    def refuse(work, before=None):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    slow = compute_models(model, PrecisionChoice("bf16", "as asked"), "eval", images[0])
    assert slow.attack.recorded is None
    assert "no CUDA graphs: its passes cannot be recorded (RuntimeError: operation not permitted when" in slow.said
    assert torch.equal(slow.attack(images[0]), fast.attack(images[0]))


@pytest.mark.parametrize("what", ["logits", "gradients"])
def test_a_device_that_plays_something_else_is_found_out(what, images, monkeypatch):
    def forgetful(work, before=None):
        tape, result = record(work)
        if (before is None) == (what == "logits"):
            tape.notes.clear()
        return tape, result

    monkeypatch.setattr(cuda_graphs, "capture", forgetful)
    twin = FoldedModel(made("small_cnn"), images[0])
    with pytest.raises(ModelError, match=f"its passes: have other {what} when recorded"):
        twin.record(images[0])
    assert twin.recorded is None


def test_recording_is_for_gpus_and_can_be_switched_off(monkeypatch):
    monkeypatch.delenv("ROBUSTMAIL_CUDA_GRAPHS", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert [cuda_graphs.enabled(device) for device in (cpu, gpu)] == [False, True]
    monkeypatch.setenv("ROBUSTMAIL_CUDA_GRAPHS", "0")
    assert not cuda_graphs.enabled(gpu)


def test_a_network_that_was_not_folded_has_no_recording():
    own = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    said = compute_models(own, PrecisionChoice("bf16", "as asked"), "eval", torch.rand(2, 3, 2, 2)).said
    assert "CUDA graphs" not in said
