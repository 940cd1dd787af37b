"""Where a model is judged: on the device that was asked for, in as much memory as there is."""

from __future__ import annotations

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from robustmail import PGD, evaluate
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import DeviceError, ModelError
from robustmail.evaluation.evaluator import image_batch
from robustmail.evaluation.model_loading import LoadedModel, load_model, reload_model
from robustmail.evaluation.normalization import shortlist
from robustmail.evaluation.runner import run_evaluation
from robustmail.evaluation.task import EvaluationTask
from robustmail.evaluation.verify import verify

EPS = 0.1


class Notes(nn.Module):
    """Is noted when it is made. "meta" stands in for a GPU: what lies there has a shape and no values."""

    made: ClassVar[list[Notes]] = []

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)
        Notes.made.append(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


@pytest.fixture
def few() -> TestSet:
    return TestSet("random", Split(torch.rand(6, 3, 2, 2), torch.arange(6) % 3), 3)


def test_readings_are_tried_on_the_device_that_was_asked_for(few):
    net, conventions = Notes(), {"none": None, "half": ((0.5,), (0.5,))}
    assert len(shortlist({"notes": net}, conventions, few.part)) == 2
    assert shortlist({"notes": net.to("meta")}, conventions, few.part) == [], "no logits are read there"
    assert net.head.weight.device.type == "meta"
    assert {t.device.type for t in image_batch(net, few.part, slice(None))} == {"meta"}, "images follow the network"


def test_a_probe_and_a_second_judgement_happen_on_the_device_that_was_asked_for(few, tmp_path):
    path, device = tmp_path / "notes.pth", torch.device("meta")
    (tmp_path / "notes.py").write_text("from tests.evaluation.test_devices import Notes\n")
    torch.save(Notes().state_dict(), path)
    model = f"{tmp_path / 'notes.py'}:Notes"
    with pytest.raises(ModelError, match="no way of reading the file takes these images"):
        load_model(path, few, model, probe=True, device=device)
    assert Notes.made[-1].head.weight.device.type == "meta"
    spec = {"checkpoint": str(path), "weights": None, "model": model, "normalize": "none"}
    with pytest.raises(RuntimeError, match="scalarType"):  # asked how many classes it has, there
        reload_model(spec, few, device=device)
    assert Notes.made[-1].head.weight.device.type == "meta"
    assert reload_model(spec, few).device.type == "cpu"


def test_a_second_judgement_refuses_a_device_that_is_not_there(few, tmp_path):
    list(run_evaluation(EvaluationTask(LoadedModel.of(Notes(), few), few, ("nat",), EPS), tmp_path))
    assert verify(tmp_path, Notes.made[-1], few, device="cpu").images == 6
    with pytest.raises(DeviceError, match="device='tpu'"):
        verify(tmp_path, checkpoint=tmp_path / "notes.pth", images=few, device="tpu")


class Held(torch.autograd.Function):
    """Keeps what a layer keeps for its gradient, and counts the images that are kept."""

    images, most = 0, 0

    @staticmethod
    def forward(ctx, x):
        if Held.images + len(x) > Held.most:
            raise torch.OutOfMemoryError(f"{Held.images + len(x)} images do not fit")
        ctx.save_for_backward(kept(x))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors
        return grad


def kept(x: torch.Tensor) -> torch.Tensor:
    """A copy of some images that is counted until it is freed."""
    copy = x.detach().clone()
    Held.images += len(x)
    weakref.finalize(copy, freed, len(x))
    return copy


def freed(n: int) -> None:
    Held.images -= n


class Tight(nn.Module):
    """Has room for the activations of `most` images at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(Held.apply(x) if torch.is_grad_enabled() and x.requires_grad else x)


def whole(model, x, y):
    """An attack of one's own: three steps along the gradient of all its images."""
    found = x
    for _ in range(3):
        found = found.detach().requires_grad_()
        nn.functional.cross_entropy(model(found), y, reduction="sum").backward()
        found = (x + (found + EPS / 2 * found.grad.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    return found.detach()


@pytest.mark.long
@pytest.mark.parametrize("most", [1000, 49, 10, 3])
def test_a_block_that_cannot_be_split_keeps_less_in_memory_and_its_verdicts(robust_cnn, digit_images, most):
    gc.collect()
    Held.images, Held.most = 0, most
    free = evaluate(robust_cnn, digit_images.part.first(60), (whole, "pgd3"), EPS)
    tight = evaluate(Tight(robust_cnn), digit_images.part.first(60), (whole, "pgd3"), EPS)
    assert tight.ledger.broken_by == free.ledger.broken_by
    assert 0 < free["whole"].correct < 60
    if most >= 8:  # a slice: the bits stay
        assert all(torch.equal(found, free.ledger.examples[at]) for at, found in tight.ledger.examples.items())


def test_a_block_for_which_there_is_no_memory_is_told_so(robust_cnn, digit_images):
    Held.images, Held.most = 0, 0
    with pytest.raises(ModelError, match=r"attack whole \(given \d\d images\): out of memory, .*--batch does not help"):
        evaluate(Tight(robust_cnn), digit_images.part.first(60), (whole,), EPS)
    with pytest.raises(ModelError, match="out of memory with a single image"):
        evaluate(Tight(robust_cnn), digit_images.part.first(60), (PGD(eps=EPS, alpha=EPS, steps=1),), EPS)
