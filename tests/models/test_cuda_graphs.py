"""CUDA graphs without a GPU: a stand-in records operators and repeats them on the same tensors.

It shares with a CUDA graph what can go wrong: stored addresses, and results that the next replay overwrites.
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
from tests.models.test_folded import build_model
from tests.rounding import gradient


class FakeGraph(TorchDispatchMode):
    """Stand-in for torch.cuda.CUDAGraph; `before` is the graph whose memory it shares."""

    def __init__(self, before=None):
        super().__init__()
        self.before, self.calls, self.n_replays = before, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    def pool(self):
        return None

    def replay(self):
        self.n_replays += 1
        for func, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        if self.before is not None:
            self.before.overwrite()

    def overwrite(self):
        """Overwrite the memory of the pass, as the backward graph, which shares it, would."""
        inputs, created = set(), {}
        for _, args, kwargs, results in self.calls:
            inputs |= {address(t) for t in tensors((args, kwargs))} - created.keys()
            created |= {address(t): t for t in tensors(results) if address(t) not in inputs}
        for tensor in created.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def capture(work, before=None):
    with FakeGraph(before) as graph:
        return graph, work()


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "_warm_up", lambda function, x: None)
    monkeypatch.setattr(precision, "use_cuda_graphs", lambda device: True)
    forward = FoldedConv.forward_torch
    monkeypatch.setattr(
        FoldedConv, "forward", lambda self, x, residual=None: forward(self, x.to(self.weight.dtype), residual)
    )


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 32, 32, generator=rng), torch.randint(10, (6,), generator=rng)


def folded_pair(name, images, normalize=None):
    """One model, folded with CUDA graphs and without."""
    model = build_model(name, normalize)
    folded, plain = FoldedModel(model, images[0]), FoldedModel(model, images[0])
    folded.capture(images[0])
    return model, folded, plain


# In the last, BatchNorm before relu cannot be folded: the graph reads the live model's own tensors.
@pytest.mark.long
@pytest.mark.parametrize("name", ["cifar_resnet18_w8", "small_cnn", "cifar_wrn16_2"])
def test_a_graph_follows_weights_and_statistics_to_the_bit(name, images):
    model, folded, plain = folded_pair(name, images, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)))
    for _ in range(2):
        x = torch.rand_like(images[0])
        before = folded.cuda_graph.forward_graph.n_replays
        assert torch.equal(folded(x), plain(x))
        assert torch.equal(gradient(folded, x, images[1]), gradient(plain, x, images[1]))
        assert folded.cuda_graph.forward_graph.n_replays == before + 2
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.1)
        folded.refresh()
        plain.refresh()


@pytest.mark.long
def test_a_replay_does_not_overwrite_earlier_logits_and_gradients(images):
    _, folded, _ = folded_pair("cifar_resnet18_w8", images)
    logits, grad = folded(images[0]), gradient(folded, *images)
    copies = logits.clone(), grad.clone()
    gradient(folded, 1 - images[0], images[1])
    assert torch.equal(logits, copies[0])
    assert torch.equal(grad, copies[1])


@pytest.mark.long
@pytest.mark.parametrize("when", ["twice", "after another pass"])
def test_the_gradient_of_an_earlier_pass_is_right(when, images):
    _, folded, plain = folded_pair("cifar_resnet18_w8", images)

    def gradients(model):
        x = images[0].clone().requires_grad_()
        logits = model(x)
        if when == "after another pass":
            model(1 - images[0])
        for loss in (F.cross_entropy(logits, images[1]), logits.square().sum()):
            yield torch.autograd.grad(loss, x, retain_graph=True)[0]

    for a, b in zip(gradients(folded), gradients(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.long
@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=8 / 255, alpha=2 / 255, steps=3, loss="kl", start="gaussian"),
        torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=3),
    ],
    ids=["PGD", "TPGD"],
)
def test_attacks_find_the_same_images(attack, images):
    model, folded, plain = folded_pair("cifar_resnet18_w8", images)
    results = []
    for form in (folded, plain):
        torch.manual_seed(0)
        y = model(images[0]).argmax(1)
        results.append(attack(form, images[0], y).x)
    assert not torch.equal(results[0], images[0])
    assert torch.equal(*results)
    assert folded.cuda_graph.backward_graph.n_replays > 3


@pytest.mark.long
def test_batches_of_another_size_or_precision_do_not_use_the_graph(images):
    _, folded, plain = folded_pair("cifar_resnet18_w8", images)
    before = folded.cuda_graph.forward_graph.n_replays
    for x in (images[0][:5], images[0].double()):
        assert torch.equal(folded(x), plain(x))
    assert folded.cuda_graph.forward_graph.n_replays == before


def test_a_graph_is_dropped_when_the_models_tensors_are_replaced(images):
    model, folded, plain = folded_pair("small_cnn", images)
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    for form in (folded, plain):
        form.refresh()
    assert torch.equal(folded(images[0]), plain(images[0]))
    assert folded.cuda_graph is None


def test_a_run_reports_whether_it_uses_graphs_and_continues_if_capture_fails(images, monkeypatch):
    model = build_model("small_cnn")
    fast = compute_models(model, PrecisionChoice("bf16", "as asked"), "eval", images[0])
    assert fast.attack.cuda_graph is not None
    assert fast.description.endswith("a copy of the model with BatchNorm folded into its convolutions, in CUDA graphs")

    def refuse(work, before=None):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    slow = compute_models(model, PrecisionChoice("bf16", "as asked"), "eval", images[0])
    assert slow.attack.cuda_graph is None
    assert "no CUDA graphs: capture failed (RuntimeError: operation not permitted when" in slow.description
    assert torch.equal(slow.attack(images[0]), fast.attack(images[0]))


@pytest.mark.parametrize("wrong", ["logits", "gradients"])
def test_a_graph_whose_replay_differs_is_refused(wrong, images, monkeypatch):
    def forgetful(work, before=None):
        graph, result = capture(work)
        if (before is None) == (wrong == "logits"):
            graph.calls.clear()
        return graph, result

    monkeypatch.setattr(cuda_graphs, "capture", forgetful)
    folded = FoldedModel(build_model("small_cnn"), images[0])
    with pytest.raises(ModelError, match=f"CUDA graph: replay gives other {wrong}"):
        folded.capture(images[0])
    assert folded.cuda_graph is None


def test_cuda_graphs_are_for_gpus_and_can_be_switched_off(monkeypatch):
    monkeypatch.delenv("ROBUSTMAIL_CUDA_GRAPHS", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert [cuda_graphs.use_cuda_graphs(device) for device in (cpu, gpu)] == [False, True]
    monkeypatch.setenv("ROBUSTMAIL_CUDA_GRAPHS", "0")
    assert not cuda_graphs.use_cuda_graphs(gpu)


def test_a_network_that_cannot_be_folded_uses_no_graphs():
    own = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    description = compute_models(own, PrecisionChoice("bf16", "as asked"), "eval", torch.rand(2, 3, 2, 2)).description
    assert "CUDA graphs" not in description
