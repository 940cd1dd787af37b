"""PGD equals torchattacks' PGD bit by bit, and the adapter returns what torchattacks returns."""

from __future__ import annotations

import pytest
import torch
import torchattacks

from robustmail import PGD, torchattack
from robustmail.errors import PluginError

pytestmark = pytest.mark.numeric


@pytest.fixture
def model(small):
    return small.eval()


def seeded(call):
    torch.manual_seed(11)
    return call()


def test_pgd_is_bit_identical_to_torchattacks(model, batch):
    theirs = seeded(lambda: torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)(*batch))
    assert torch.equal(seeded(lambda: PGD()(model, *batch).x), theirs)


def test_kl_pgd_is_torchattacks_tpgd(model, batch):
    theirs = seeded(lambda: torchattacks.TPGD(model, eps=8 / 255, alpha=2 / 255, steps=10)(*batch))
    ours = seeded(lambda: PGD(loss="kl", start="gaussian")(model, *batch).x)
    # They may differ only where a gradient is nearly zero, so that rounding changes its sign.
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.02


def test_l2_pgd_raises_the_loss_as_much_as_torchattacks(model, batch):
    theirs = seeded(lambda: torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=20)(*batch))
    ours = seeded(lambda: PGD(eps=0.5, alpha=0.2, steps=20, norm="l2")(model, *batch).x)

    def loss(x):
        return torch.nn.functional.cross_entropy(model(x), batch[1])

    assert loss(ours).item() == pytest.approx(loss(theirs).item(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("PGD", {"steps": 5}), ("TPGD", {"steps": 5}), ("FGSM", {}), ("CW", {"steps": 5}),
     ("APGD", {"steps": 5, "seed": 3}), ("FAB", {"steps": 3, "seed": 3}), ("Square", {"n_queries": 30, "seed": 3})],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_the_adapter_returns_what_torchattacks_returns(name, knobs, model, batch):
    theirs = seeded(lambda: getattr(torchattacks, name)(model, **knobs)(*batch)).detach()
    assert torch.equal(seeded(lambda: torchattack(name, **knobs)(model, *batch).x), theirs)


def test_classes_that_would_mislead_are_refused_with_what_to_use_instead():
    with pytest.raises(PluginError, match=r"10 instead of 100 iterations.*\. Use AutoAttack\(eps=8/255\)\."):
        torchattack("AutoAttack")
    with pytest.raises(PluginError, match="List several names in `evaluate` instead"):
        torchattack("MultiAttack")
