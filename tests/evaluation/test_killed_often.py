"""10,000 images, an evaluation that is stopped 50 times at random moments: its ledger is that of one left in peace."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustmail import digits
from robustmail.data.dataset import to_float
from tests.processes import Python

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("TEST_KILLS", "50"))
IMAGES = int(os.environ.get("TEST_KILLED_IMAGES", "10000"))
SEED = int(os.environ.get("TEST_SEED", "0"))
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}

NET = """
from torch import nn

def net(classes=10, channels=1):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes))
"""
# A save every half second: 20 seconds, as it is, would make all kills hit between two saves.
SCRIPT = """
from robustmail.cli.main import main
from robustmail.evaluation import runner
runner.SAVE_EVERY = 0.5
main()
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """`robustmail eval` of a small network on noisy digits; its folder is to be added."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "eval.py").write_text(SCRIPT)
    train, draw = digits()().train, np.random.default_rng(SEED)
    which = draw.integers(len(train.y), size=IMAGES)
    clean = train.x[which].permute(0, 2, 3, 1).numpy().astype(np.int16)
    noisy = (clean + draw.integers(-20, 21, clean.shape)).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "many.npz", x_test=noisy, y_test=train.y[which].numpy())
    scope: dict = {}
    exec(NET, scope)
    model = scope["net"]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(to_float(train.x)), train.y).backward()
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    return [str(tmp_path / "eval.py"), "eval", str(tmp_path / "net.pth"), "--model", f"{tmp_path / 'net.py'}:net",
            "--normalize", "none", "--data", str(tmp_path / "many.npz"), "--attacks", "nat,pgd20", "--eps", "0.05",
            "--batch", "256", "--plain", "--out"]  # fmt: skip


def test_an_evaluation_stopped_fifty_times_ends_in_the_ledger_of_one_that_was_not(words, tmp_path):
    began = time.monotonic()
    whole = Python(*words, tmp_path / "whole")
    said = whole.communicate()[1]
    assert whole.returncode == 0, said
    longest = 1.2 * (time.monotonic() - began)
    draw, ended, states = random.Random(SEED), Counter(), Counter()
    while ended.total() < KILLS:
        process, number = Python(*words, tmp_path / "often"), draw.choice(list(CODES))
        time.sleep(draw.uniform(0, longest))
        process.send_signal(number)
        said = process.communicate()[1]
        ended["done" if process.returncode == 0 else number.name] += 1
        assert process.returncode in (0, CODES[number], -number), said  # -number: before the command line began
        results = tmp_path / "often" / "results.json"
        is_whole = results.exists() and json.loads(results.read_text())["complete"]
        states["whole" if is_whole else "begun" if results.exists() else "empty"] += 1
        if is_whole:  # begin anew, so that every kill has something to hit
            assert equal(tmp_path / "often", tmp_path / "whole")
            assert not list((tmp_path / "often").rglob("*.tmp"))
            (tmp_path / "often").rename(tmp_path / f"done-{ended.total()}")
    last = Python(*words, tmp_path / "often")
    said = last.communicate()[1]
    print(dict(ended), dict(states))
    assert last.returncode == 0, said
    assert equal(tmp_path / "often", tmp_path / "whole")
    assert not list((tmp_path / "often").rglob("*.tmp"))
    assert states["begun"] > KILLS // 4, "hardly a kill hit an evaluation that was begun"


def equal(one: Path, other: Path) -> bool:
    return all((one / f).read_bytes() == (other / f).read_bytes() for f in ("ledger.csv", "examples.safetensors"))
