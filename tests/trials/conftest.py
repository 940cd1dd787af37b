"""A tiny recipe on digits, and the command line as a real process."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import python

TINY = (
    "model=small_cnn", "data=subset(digits(validation=30), train=512)", "attack=PGD(eps=0.1, alpha=0.05, steps=2)",
    "epochs=3", "burn_in=2", "batch=128", "optimizer.lr=Stairs({0: 0.05, 2: 0.01})", "validate=pgd2",
    "evaluate=nat", "test_size=40",
    "precision='fp32'",
)  # fmt: skip
KEPT = ("last.safetensors", "best.safetensors", "metrics.csv")

Script = Callable[..., subprocess.CompletedProcess[str]]


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder, to its end."""
    return python("-m", "robustmail", *words, cwd=folder)


@pytest.fixture
def robustmail(tmp_path: Path) -> Script:
    """Run the command line in an empty folder, to its end."""
    return lambda *words: call(tmp_path, *words)


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in KEPT}
