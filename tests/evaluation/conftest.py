"""A model that fits some real images, and one trained against attacks: small enough to be attacked for real."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail import PGD, digits
from robustmail.data.dataset import Split, to_float
from robustmail.data.testsets import TestSet
from robustmail.models.classifier import build


@pytest.fixture
def victim(real):
    """A model that fits sixteen real images, so that there is something to break; and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(real[0]), real[1]).backward()
        optimizer.step()
    return model, Split((real[0] * 255).round().to(torch.uint8), real[1])


@pytest.fixture(scope="session")
def hand() -> TestSet:
    """160 handwritten digits."""
    images = digits()()
    return TestSet("digits", images.test.first(160), 10, given="digits()")


@pytest.fixture(scope="session")
def hardened() -> nn.Module:
    """A small network trained against PGD on digits, at eps 0.1."""
    torch.manual_seed(0)
    part, attack = digits()().train, PGD(eps=0.1, alpha=0.04, steps=5)
    model = build("small_cnn", 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(6):
        for batch in torch.randperm(len(part.y), generator=torch.Generator().manual_seed(epoch)).split(128):
            x, y = to_float(part.x[batch]), part.y[batch]
            found = attack(model, x, y).x
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(found), y).backward()
            optimizer.step()
    return model.eval()
