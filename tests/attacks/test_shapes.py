"""Square and FAB on images of any shape: torchattacks' bits where its code runs, valid examples everywhere."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from robustmail import evaluate, torchattack
from robustmail.norms import distances

pytestmark = pytest.mark.numeric

NORMS = {"Linf": "linf", "L2": "l2"}
KNOBS = {"Square": {"n_queries": 60}, "FAB": {"steps": 3, "multi_targeted": True, "n_classes": 5}}
RUNS = [(5, 5), (8, 8), (13, 13), (7, 9), (9, 7)]  # torchattacks' Square in l2, too
FAILS = [(4, 4), (12, 12), (14, 14), (19, 19), (4, 32), (32, 4), (6, 10), (32, 48)]
LONG = [(4, 32), (32, 4), (6, 10), (32, 48)]  # windows of Square in l-inf do not fit, and shrink in torchattacks


class Linear(nn.Module):
    """Five classes, linear in the pixels, so that the distance to each boundary is known."""

    def __init__(self, h: int, w: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3 * h * w, generator=torch.Generator().manual_seed(h * w)))

    def forward(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - 0.5)[:, None] * self.w).sum(-1)  # the bits of a row depend on no other row


def task(h: int, w: int, norm: str, reach: float = 2.0) -> tuple[nn.Module, Tensor, Tensor, float]:
    """(model, 8 images, their predicted classes, `reach` times the median distance to the nearest boundary)"""
    model = Linear(h, w)
    x = 0.3 + 0.4 * torch.rand(8, 3, h, w, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        gap = logits.amax(1, keepdim=True) - logits
        dual = torch.cdist(model.w[y], model.w, p=1.0 if norm == "Linf" else 2.0)
    nearest = (gap / dual).scatter(1, y[:, None], float("inf")).amin(1)
    return model, x, y, reach * float(nearest.median())


def found_by(name: str, h: int, w: int, norm: str) -> tuple[Tensor, Tensor, nn.Module, Tensor, Tensor, float]:
    model, x, y, eps = task(h, w, norm, {"Square": 8.0, "FAB": 1.0}[name])
    found = torchattack(name, norm=norm, eps=eps, seed=3, **KNOBS[name])(model, x, y).x
    return found, model(found).argmax(1) != y, model, x, y, eps


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize(("h", "w"), RUNS + FAILS)
def test_examples_of_any_shape_lie_in_the_ball_and_some_are_adversarial(name, h, w, norm):
    found, broken, _, x, _, eps = found_by(name, h, w, norm)
    assert int(broken.sum()) > 0
    assert distances(x, found, NORMS[norm]).max() <= eps * (1 + 1e-5)
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize(
    ("name", "norm", "shapes"),
    [("Square", "Linf", [shape for shape in RUNS + FAILS if shape not in LONG]), ("Square", "L2", RUNS),
     ("FAB", "L2", [(5, 5), (4, 4), (4, 32), (9, 7)])],
)  # fmt: skip
def test_the_bits_are_torchattacks_own_where_its_code_runs(name, norm, shapes):
    for h, w in shapes:
        found, broken, model, x, y, eps = found_by(name, h, w, norm)
        theirs = getattr(torchattacks, name)(model, norm=norm, eps=eps, seed=3, **KNOBS[name])(x, y).detach()
        assert torch.equal(found, theirs), (h, w)
        assert broken.any()


def test_fab_in_linf_breaks_the_same_images_and_differs_in_the_last_bits():
    for h, w in [(5, 5), (4, 4), (14, 14), (4, 32)]:
        found, broken, model, x, y, eps = found_by("FAB", h, w, "Linf")
        theirs = torchattacks.FAB(model, norm="Linf", eps=eps, seed=3, **KNOBS["FAB"])(x, y).detach()
        assert torch.equal(broken, model(theirs).argmax(1) != y), (h, w)
        assert (found - theirs).abs().max() < 2e-6


@pytest.mark.parametrize(("h", "w"), LONG)
def test_windows_fit_into_long_images_as_in_the_official_code(h, w):
    square = pytest.importorskip("pyautoattack.square")
    model, x, y, eps = task(h, w, "Linf")
    ours = torchattack("Square", norm="Linf", eps=eps, seed=3, n_queries=60)(model, x, y).x
    official = square.SquareAttack(model, norm="Linf", eps=eps, seed=3, n_queries=60, device="cpu").perturb(x, y)
    assert torch.equal(ours, official)


def test_an_evaluation_in_l2_of_rectangles_comes_to_its_end():
    model, x, y, eps = task(8, 12, "L2")
    found = evaluate(model, (x, y), (torchattack("Square", norm="L2", eps=eps, n_queries=50),), eps, "l2")
    assert found.worst.accuracy < 1


def test_no_line_of_torchattacks_reaches_the_screen(capfd):
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            means = x.mean((2, 3))
            return torch.cat([means, 1 - means], 1)

    x = torch.rand(4, 3, 8, 8)
    y = Bare()(x).argmax(1)
    attacks = (torchattack("Square", n_queries=5), torchattacks.PGD(Bare(), steps=2))
    assert "set_device" in capfd.readouterr().out, "the second object was made by the caller"
    evaluate(Bare(), (x, y), attacks, 8 / 255)
    assert capfd.readouterr().out == ""
