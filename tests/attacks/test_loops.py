"""Our inner loops of torchattacks' APGD, APGD-T, FAB-T and Square end as torchattacks' own do."""

from __future__ import annotations

import sys

import pytest
import torch
import torchattacks
from torchattacks.attacks import fab

from robustmail import torchattack
from robustmail.attacks import loops
from robustmail.attacks.loops import project_linf
from robustmail.attacks.per_image_noise import per_image_noise
from robustmail.attacks.view import ModelView
from robustmail.bench import evaluation as bench_evaluation
from robustmail.data.dataset import Split
from robustmail.errors import RobustmailError
from robustmail.evaluation.exact_inference import FixedBatch

pytestmark = pytest.mark.numeric

EPS = 4 / 255
TARGETED = {"n_classes": 10, "eps": EPS, "seed": 3}
ATTACKS = {
    "APGD": {"steps": 25, "eps": EPS, "seed": 3},
    "APGDT": {"steps": 25, **TARGETED},
    "FAB": {"steps": 15, "multi_targeted": True, **TARGETED},
    "Square": {"n_queries": 200, "eps": EPS, "seed": 3},
}


@pytest.fixture
def right(small, batch):
    """A model and 16 images that it classifies correctly, some of them more firmly than the ball is wide."""
    x = torch.cat([batch[0], batch[0].flip(3)])
    with torch.no_grad():
        return small.eval(), x, small(x).argmax(1)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_images_are_broken_as_by_torchattacks(name, right):
    model, x, y = right
    theirs = getattr(torchattacks, name)(model, **ATTACKS[name])(x, y).detach()
    ours = torchattack(name, **ATTACKS[name])(model, x, y).x
    broken = [model(images).argmax(1) != y for images in (ours, theirs)]
    assert torch.equal(*broken)
    assert 0 < int(broken[0].sum()) < len(y)
    assert (ours - x).abs().max() <= EPS + 1e-6
    if name == "Square":  # a query that would change nothing is not asked, and all others are the same
        assert torch.equal(ours, theirs)


def test_the_projection_is_the_reference_codes_and_reaches_the_plane():
    x, w = torch.rand(40, 30), torch.randn(40, 30)
    w[0], w[1, ::2] = 0, 0
    value = (w * 0.3).sum(1) * torch.linspace(-1, 1, 40)
    d = project_linf(x, w, value)
    theirs = fab.projection_linf(x.clone(), w.clone(), (w * x).sum(1) - value)
    assert (d - theirs).abs().max() < 1e-4
    assert (x + d).min() >= -1e-6
    assert (x + d).max() <= 1 + 1e-6
    room = torch.where(-w * value[:, None] > 0, 1 - x, x)
    reachable = (w.abs() * room).sum(1) > value.abs() * 1.001
    assert reachable[2:].any()
    assert ((w * d).sum(1) + value)[reachable].abs().max() < 1e-4


def test_a_ball_that_is_too_small_for_the_plane_is_used_up():
    x, w = torch.full((1, 3), 0.5), torch.tensor([[1.0, -2.0, 0.0]])
    assert project_linf(x, w, torch.tensor([100.0])).tolist() == [[-0.5, 0.5, 0.0]]


@pytest.mark.parametrize("name", ["APGDT", "FAB"])
def test_targets_side_by_side_break_an_image_as_one_after_another(name, right, monkeypatch):
    model, x, y = right
    attack, rows, run = torchattack(name, **ATTACKS[name]), [], loops._side_by_side
    monkeypatch.setattr(loops, "_side_by_side", lambda x, y, t: rows.append(t.numel()) or run(x, y, t))
    view = ModelView(FixedBatch(model, 8))  # an image has the same bits in passes of one size

    def attacked(max_pass: int) -> torch.Tensor:
        monkeypatch.setattr(ModelView, "max_pass", max_pass)
        rows.clear()
        with per_image_noise(x, 0):
            return attack(view, x, y).x

    beside = attacked(128)
    assert rows[0] == len(x), "the first target has most of the work, so it comes alone"
    assert 1 < len(rows) < 9
    one_by_one = attacked(1)
    assert len(rows) == 9
    assert torch.equal(beside, one_by_one)
    assert 0 < int((beside != x).flatten(1).any(1).sum()) < len(x)


@pytest.mark.parametrize("most", [3, 64])
def test_square_ends_the_same_whether_a_pass_has_fewer_rows_than_images_or_more(most, right, monkeypatch):
    model, x, y = right
    view = ModelView(FixedBatch(model, 8))
    attack, sizes, forward = torchattack("Square", **ATTACKS["Square"]), [], FixedBatch.forward
    expected = attack(view, x, y).x
    monkeypatch.setattr(ModelView, "max_pass", most)
    monkeypatch.setattr(FixedBatch, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    assert torch.equal(attack(view, x, y).x, expected)
    assert max(sizes[2:-1]) <= most
    assert 0 < int((model(expected).argmax(1) != y).sum()) < len(y)


def test_equal_images_have_equal_noise_whatever_batch_they_are_in():
    x = torch.rand(3, 1, 4, 4)
    twins = torch.stack([x[0], x[1], x[0], x[2]])
    with per_image_noise(twins, 7):
        noise = [torch.rand(twins.shape) for _ in range(2)]
    with per_image_noise(x, 7):
        alone = [torch.rand(x.shape) for _ in range(2)]
    for together, apart in zip(noise, alone, strict=True):
        assert torch.equal(together, apart[[0, 1, 0, 2]])


@pytest.mark.long
def test_the_official_code_leaves_the_same_images(right):
    pytest.importorskip("pyautoattack")
    model, x, y = right
    for spec in bench_evaluation._autoattack(quick=True):
        (stage,) = spec.stages
        ours = model(spec.stages[stage](model, x, y).x).argmax(1) == y
        theirs = bench_evaluation._official(model, Split(x, y), stage, quick=True)
        assert int((ours != theirs).sum()) <= 1, "they start elsewhere, so an image on the edge may fall to one of them"


def test_without_the_official_code_the_bench_says_what_is_missing(monkeypatch):
    for name in ("pyautoattack", "pyautoattack.autoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RobustmailError, match=r"pip install 'robustmail\[bench\]'"):
        bench_evaluation.bench_evaluation(1)
