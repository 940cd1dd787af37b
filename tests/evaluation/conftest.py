"""A model that fits some real images, and one trained against attacks: small enough to be attacked for real."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail.data.dataset import Split


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
