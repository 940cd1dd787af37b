"""Real processes, killed for real: a run that was interrupted ends in the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.processes import Python, python

pytestmark = pytest.mark.long

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from robustmail.config.loader import load_recipe
from robustmail.config.overrides import apply_overrides
from robustmail.records import StepFinished
from robustmail.errors import Stopped
from robustmail.runtime.signals import Signals
from robustmail.train.run import run

folder, save_every, name, *changes = sys.argv[1:]
signals = Signals()
try:
    with signals.caught():
        for record in run(apply_overrides(load_recipe(name), changes), Path(folder), "test",
                          signals=signals, save_every=float(save_every)):
            if isinstance(record, StepFinished):
                print("step", flush=True)
except Stopped as stop:
    sys.exit(128 + stop.signum)
"""
CHANGES = [
    "model=small_cnn", "epochs=3", "burn_in=1", "data.validation=32", "attack.steps=2", "batch=32",
    "evaluate=nat", "test_size=20", "optimizer.lr=0.05", "validate=pgd2",
]  # fmt: skip
KEPT = ("last.safetensors", "best.safetensors", "metrics.csv")


@pytest.fixture
def launch(tmp_path: Path, slice_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(folder: str, *changes: str, save_every: float = 0.0, name: str = "mail_trades") -> Python:
        words = (script, tmp_path / folder, str(save_every), name)
        return Python(*words, f"data=npz('{slice_path}')", *CHANGES, *changes)

    return start


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in KEPT}


def after_steps(process: Python, n: int) -> None:
    """Wait for n steps, then for a moment within the next one."""
    for _ in range(n):
        assert process.stdout.readline() == "step\n", process.stderr.read()
    time.sleep(random.Random(n).random() * 0.2)


def finished(process: Python) -> None:
    _, wrong = process.communicate()
    assert process.returncode == 0, wrong


def test_a_run_killed_three_times_ends_in_the_same_bits(launch, tmp_path):
    whole = launch("whole", save_every=1e9)
    finished(whole)
    for steps in (2, 3, 4):
        process = launch("parts")
        after_steps(process, steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert (state["epoch"], state["step"]) != (0, 0), "nothing was continued, so nothing was tested"
    finished(launch("parts"))
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    whole, parts = (json.loads((tmp_path / f / "results.json").read_text())["attacks"] for f in ("whole", "parts"))
    assert [(r["name"], r["correct"], r["n"]) for r in whole] == [(r["name"], r["correct"], r["n"]) for r in parts]


def test_a_run_killed_while_it_averages_ends_in_the_same_bits(launch, tmp_path):
    changes = ["ema=0.9", "swa=1", "select=best-swa", "keep_every=1", "validate=pgd2,cw", "evaluate=nat"]
    finished(launch("whole", *changes, save_every=1e9))
    process = launch("parts", *changes)
    after_steps(process, 9)  # of 12: in the last epoch, after the first that is averaged
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert state["averages"]["swa"]["n_averaged"] >= 1, "nothing was averaged yet, so nothing was tested"
    finished(launch("parts", *changes))
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    for name in ("epoch-0001.safetensors", "epoch-0003.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_run_killed_with_memory_and_teacher_ends_in_the_same_bits(launch, tmp_path):
    changes = ["objective.start=1", "teacher=ema", "ema=0.9"]
    finished(launch("whole", *changes, save_every=1e9, name="self_adaptive"))
    process = launch("parts", *changes, name="self_adaptive")
    after_steps(process, 9)  # of 12: in the last epoch, after the first in which the targets move
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert (state["memory"]["targets"].amax(1) < 1).any(), "nothing was remembered yet, so nothing was tested"
    finished(launch("parts", *changes, name="self_adaptive"))
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / f / "state.pt", weights_only=True)["memory"] for f in ("whole", "parts"))
    assert whole["targets"].equal(parts["targets"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_the_step_under_way_and_exits(launch, tmp_path, number):
    process = launch("run", "epochs=50", save_every=1e9)
    after_steps(process, 7)  # in the second epoch: what is saved cannot be the end of one
    process.send_signal(number)
    _, wrong = process.communicate()
    assert process.returncode == 128 + number, wrong
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["epoch"] * 4 + state["step"] >= 7
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_evaluation_and_validation_cannot_change_training(launch, tmp_path):
    finished(launch("weak", "validate=nat", "evaluate=nat"))
    finished(launch("strong", "validate=pgd5", "evaluate=nat,cw"))
    last = [hashlib.sha256((tmp_path / f / "last.safetensors").read_bytes()).hexdigest() for f in ("weak", "strong")]
    assert last[0] == last[1]


def test_two_processes_cannot_work_in_one_folder(launch, tmp_path):
    first = launch("run", "epochs=50")
    after_steps(first, 1)
    second = launch("run", "epochs=50")
    _, wrong = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode != 0
    assert "another process is working in it" in wrong


def test_a_full_disk_is_one_error_and_the_last_state_stays(tmp_path, slice_path):
    """A file size limit stands in for the disk: the system refuses the write in the middle, for real."""
    if not hasattr(os, "fork"):
        pytest.skip("needs resource limits")
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from robustmail.cli.main import main\nmain()\n"
    )
    words = ["run", "mail_trades", f"data=npz('{slice_path}')", *CHANGES, "--out", str(tmp_path / "run")]
    done = python(script, *words)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr
    assert not list((tmp_path / "run").glob("*.tmp"))
