"""What tests share: tiny models, real images, and where the big real data set is, if it is."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn

from robustmail import PGD, digits
from robustmail.data.dataset import Split, to_float
from robustmail.data.testsets import TestSet
from robustmail.evaluation import sanity_checks
from robustmail.models.classifier import build

HERE = Path(__file__).parent
SEED = int(os.environ.get("TEST_SEED", "0"))  # any other must do as well
SHARED = HERE.parent.parent / "shared" / "data" / "cifar10-mini.npz"

torch.set_num_threads(1)  # tests run side by side; two processes with two threads each would wait for one another

os.fsync = lambda descriptor: None  # no test takes the power away, and a disk is slow to forget what it holds for good

sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)  # hundreds of tests read the same file

# The checks on an evaluation take most of the time of a small one: one slice is measured, but where `whole_sample` is.
WHOLE_SAMPLE, sanity_checks.SAMPLE = sanity_checks.SAMPLE, 8


def reseed() -> None:
    """What a test draws without a seed of its own is the same each time: torch begins at another number otherwise."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(SEED)


def pytest_collectstart() -> None:
    reseed()  # networks that are made while a module is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    reseed()  # before fixtures, of a session too: so they are the same whichever test comes first


class Small(nn.Module):
    """A convolution, BatchNorm and a linear layer: everything that an attack could leave a mark on."""

    def __init__(self, channels: int = 3, size: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6 * size * size, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).relu().flatten(1)))


@pytest.fixture
def whole_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks on an evaluation measure as many images as they do for a user."""
    monkeypatch.setattr(sanity_checks, "SAMPLE", WHOLE_SAMPLE)


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight random images of 3x8x8 with labels."""
    rng = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 8, 8, generator=rng), torch.randint(10, (8,), generator=rng)


@pytest.fixture(scope="session")
def slice_path() -> Path:
    """The first 160 training and 80 test images of CIFAR-10, which live in this repository."""
    return HERE / "data" / "cifar10-slice.npz"


@pytest.fixture(scope="session")
def tiny_path(slice_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other pixel of the slice, for tests of what does not depend on how large images are."""
    images = {key: value[:, ::2, ::2] if value.ndim == 4 else value for key, value in np.load(slice_path).items()}
    path = tmp_path_factory.mktemp("tiny") / "cifar10-slice.npz"
    np.savez(path, **images)
    return path


@pytest.fixture(scope="session")
def mini_path() -> Path:
    """The first 2,000 training and 1,000 test images of CIFAR-10, which need not be there."""
    if not SHARED.is_file():
        pytest.skip(f"needs {SHARED.name}, 3,000 real images in ../shared/data")
    return SHARED


@pytest.fixture(scope="session")
def real_images(slice_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Sixteen real images in [0, 1] with labels."""
    file = np.load(slice_path)
    return torch.from_numpy(file["x_test"][:16]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(
        file["y_test"][:16].astype(np.int64)
    )


@pytest.fixture(scope="session")
def digit_images() -> TestSet:
    """160 handwritten digits."""
    images = digits()()
    return TestSet("digits", images.test.first(160), 10, given="digits()")


@pytest.fixture(scope="session")
def robust_cnn() -> nn.Module:
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


@pytest.fixture
def fitted_model(real_images):
    """A model that fits sixteen real images, so that there is something to break; and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(real_images[0]), real_images[1]).backward()
        optimizer.step()
    return model, Split((real_images[0] * 255).round().to(torch.uint8), real_images[1])
