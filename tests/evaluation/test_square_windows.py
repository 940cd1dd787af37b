"""Square, where it computes what its windows reach only, has outcomes that depend on the image alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from robustmail import evaluate, torchattack
from robustmail.attacks.view import ModelView
from robustmail.evaluation.ledger import Ledger
from robustmail.models.classifier import Classifier, build
from robustmail.models.windowed import KnownImages

pytestmark = pytest.mark.numeric

EPS = 1 / 255


@pytest.fixture
def asked(monkeypatch) -> list[KnownImages | None]:
    """What the model answered each time it was asked for known images."""
    answers: list[KnownImages | None] = []
    known_images = ModelView.known_images

    def spy(view: ModelView, x: torch.Tensor, side: int) -> KnownImages | None:
        answers.append(known_images(view, x, side))
        return answers[-1]

    monkeypatch.setattr(ModelView, "known_images", spy)
    return answers


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request) -> Iterator[None]:
    """With two threads, gradients round otherwise in passes of an odd number of images."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task() -> tuple[Classifier, torch.Tensor, torch.Tensor]:
    """A network with 24 images that it classifies correctly, some of them more firmly than the ball is wide."""
    torch.manual_seed(0)
    model, x = build("small_cnn", 10, 3).eval(), torch.rand(24, 3, 12, 12)
    with torch.no_grad():
        model.net.get_submodule("linear").bias -= model(x).mean(0)  # so that not all images have the same class
        return model, x, model(x).argmax(1)


def square(task: tuple[Classifier, torch.Tensor, torch.Tensor], batch: int | None = None) -> Ledger:
    model, x, y = task
    attack = torchattack("Square", eps=EPS, n_queries=400, seed=1)
    return evaluate(model, (x, y), [attack], eps=EPS, batch=batch).ledger


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("batch", [13, 9, 5, 1])
def test_the_batch_changes_no_outcome(task, asked, batch):
    one = square(task)
    if not any(asked):
        pytest.skip("this CPU's convolutions round otherwise in larger passes")
    asked.clear()
    other = square(task, batch)
    assert asked
    assert all(asked), "windows in every batch"
    assert torch.equal(one.stands, other.stands)
    assert one.examples.keys() == other.examples.keys()
    assert all(torch.equal(one.examples[i], other.examples[i]) for i in one.examples)
    assert 0 < int(one.stands.sum()) < len(one)


def test_whole_passes_break_the_same_images_but_for_rounding(task, asked, monkeypatch):
    windowed = square(task)
    if not any(asked):
        pytest.skip("this CPU's convolutions round otherwise in larger passes")
    monkeypatch.setattr(ModelView, "known_images", lambda view, x, side: None)
    assert int((square(task).stands != windowed.stands).sum()) <= 1
