"""Our PGD is torchattacks' PGD to the bit, and the adapters change nothing that a library returns."""

from __future__ import annotations

import pytest
import torch
import torchattacks

from robustmail import PGD, torchattack

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
    # Rounding may turn the sign of a gradient that is nearly zero, and nothing else.
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.02


def test_l2_pgd_reaches_as_far_and_as_high_as_torchattacks(model, batch):
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
