"""Two real processes with half of each batch compute what one does with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Peers, Python

pytestmark = pytest.mark.long

WORKER, EXACTLY = (Path(__file__).with_name(name) for name in ("worker.py", "exactly.py"))
SMALL = [
    "model=small_cnn", "epochs=2", "data.validation=32", "batch=32", "attack.steps=2", "evaluate=nat",
    "test_size=40", "validate=pgd2", "optimizer.lr=0.01", "optimizer.weight_decay=5e-4", "precision=fp32",
]  # fmt: skip


def launch(processes: int, *words: str | Path, env: dict[str, str] | None = None) -> Python | Peers:
    return Peers(processes, *words, env=env) if processes > 1 else Python(*words, env=env)


def torchrun(processes: int, *words: str | Path) -> subprocess.Popen:
    """The command itself."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*run, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def train(processes: int, folder: Path, name: str, *changes: str) -> list[dict]:
    process = launch(processes, WORKER, folder, name, 0, *changes)
    _, wrong = process.communicate()
    assert process.returncode == 0, wrong
    return [json.loads(Path(f"{folder}.{rank}.json").read_text()) for rank in range(processes)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


def results(folder: Path) -> dict[str, int]:
    rows = json.loads((folder / "results.json").read_text())["attacks"]
    return {row["name"]: row["correct"] for row in rows}


@pytest.mark.parametrize(("name", "size", "more"), [
    ("at", 12, ["attack_mode=train", "attack.steps=2"]),
    ("mail_at", 13, ["attack=PGD(norm='l2', eps=0.5, alpha=0.2, steps=2)"]), ("mail_trades", 13, ["attack.steps=2"]),
    ("gair_mart", 13, ["attack.steps=2", "weighter.steps=2"]), ("trades_awp", 13, ["attack.steps=2"]),
    ("mail_trades", 13, ["attack.steps=2", "accumulate=3", "clip=0.5"]),
    ("self_adaptive", 13, ["attack.steps=2", "objective.start=0"]),
])  # fmt: skip
def test_fifty_steps_in_two_processes_are_fifty_steps_in_one(name, size, more, tmp_path):
    # In double precision: in single, the sign of a gradient near zero makes another image out of a last bit.
    changes = ["optimizer.lr=0.02", "burn_in=0", *more]
    for processes in (1, 2):
        done = launch(processes, EXACTLY, tmp_path / f"{processes}.pt", size, name, *changes)
        _, wrong = done.communicate()
        assert done.returncode == 0, wrong
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert len(one["losses"]) == 50
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert sum(one["losses"][-5:]) < sum(one["losses"][:5])
    for key, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][key], tensor, rtol=1e-6, atol=1e-6)
    assert two["memory"].keys() == one["memory"].keys()
    for key, table in one["memory"].items():
        torch.testing.assert_close(two["memory"][key], table, rtol=1e-6, atol=1e-6)
    assert Path(f"{tmp_path}/2.pt.0").read_text() == Path(f"{tmp_path}/2.pt.1").read_text()


@pytest.mark.parametrize(("name", "more"), [
    ("mail_trades", ["burn_in=1"]), ("fat", []), ("at", ["ema=0.9", "precision=bf16"]),
    ("at", ["swa=0", "select=last-swa"]),
    ("mart", ["augment=(Crop(2), RandAugment(1, 9), CutMix)", "label_smoothing=0.1"]),
])  # fmt: skip
def test_both_processes_hold_the_same_bits_and_begin_as_one_does(name, more, tmp_path, tiny_path):
    changes = [f"data=npz('{tiny_path}')", *SMALL, *more]
    (one,) = train(1, tmp_path / "one", name, *changes)
    first, second = train(2, tmp_path / "two", name, *changes)
    assert (first["rank"], second["rank"], first["world"]) == (0, 1, 2)
    seals = [Path(f"{tmp_path / 'two'}.{rank}.last").read_text() for rank in (0, 1)]
    assert seals[0] == seals[1]
    assert first["steps"] == second["steps"]  # of the whole batch, in both
    assert [s[2] for s in one["steps"]] == [s[2] for s in first["steps"]]
    close = 1e-2 if "precision=bf16" in more else 1e-3  # FAT's noise and bf16's rounding are a share's own
    assert first["steps"][0][0] == pytest.approx(one["steps"][0][0], rel=close)
    heads = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("one", "two")]
    assert (heads[0][0], len(heads[0])) == (heads[1][0], len(heads[1]))
    assert results(tmp_path / "two").keys() == {"nat"}


def test_two_processes_train_on_the_extra_images_that_one_draws(tmp_path, tiny_path):
    data = f"data=mixed(npz('{tiny_path}', validation=32), extra=npz('{tiny_path}'), share=0.7)"
    changes = [data, "model=small_cnn", "batch=32", "attack.steps=1", "epochs=1", "evaluate=nat", "test_size=20",
               "validate=nat", "precision=fp32"]  # fmt: skip
    (one,) = train(1, tmp_path / "one", "at", *changes)
    first, second = train(2, tmp_path / "two", "at", *changes)
    assert [step[2] for step in first["steps"]] == [step[2] for step in one["steps"]] == 4 * [32]
    assert first["steps"] == second["steps"]
    assert first["steps"][0][0] == pytest.approx(one["steps"][0][0], rel=1e-3)
    seals = [Path(f"{tmp_path / 'two'}.{rank}.last").read_text() for rank in (0, 1)]
    assert seals[0] == seals[1]


def test_two_processes_judge_each_image_as_one_does(tmp_path, tiny_path):
    changes = [f"data=npz('{tiny_path}')", *SMALL, "epochs=1", "evaluate=nat,pgd10"]
    train(1, tmp_path / "run", "at", *changes)
    alone = results(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(2, tmp_path / "run", "at", *changes)  # continues after the last epoch: it only evaluates
    assert results(tmp_path / "run") == alone


def test_memory_that_runs_out_in_two_processes_makes_the_run_of_one(tmp_path):
    recipe = Path(__file__).parents[1] / "train" / "limited.py"
    for processes, most in ((2, 50), (1, 100)):
        done = launch(
            processes, WORKER, tmp_path / f"{processes}", f"{recipe}:normed", 0, env={"TEST_MOST_IMAGES": str(most)}
        )
        _, wrong = done.communicate()
        assert done.returncode == 0, wrong
        note = json.loads((tmp_path / f"{processes}" / "results.json").read_text())["training"]["note"]
        assert "accumulate=8" in note
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_killed_process_ends_the_run_with_a_word_and_a_state_that_goes_on(tmp_path, tiny_path):
    changes = [f"data=npz('{tiny_path}')", *SMALL]
    broken = launch(2, WORKER, tmp_path / "two", "at", 3, *changes)
    _, wrong = broken.communicate(timeout=120)
    assert broken.returncode != 0
    assert "another process of this run does not answer" in wrong
    assert "the same command goes on" in wrong
    assert (tmp_path / "two" / "state.pt").exists()
    train(2, tmp_path / "two", "at", *changes)
    train(2, tmp_path / "whole", "at", *changes)
    went_on, whole = weights(tmp_path / "two"), weights(tmp_path / "whole")
    assert all(went_on[name].equal(tensor) for name, tensor in whole.items())


def test_the_command_line_shows_one_run_under_torchrun(tmp_path, tiny_path):
    words = [f"data=npz('{tiny_path}')", *SMALL, "epochs=1", "--out", str(tmp_path / "run"), "--plain"]
    process = torchrun(2, "-m", "robustmail", "run", "at", *words)
    shown, wrong = process.communicate()
    assert process.returncode == 0, wrong
    assert "2 processes" in shown
    assert shown.count("parameters") == 1
    assert (tmp_path / "run" / "curves.png").exists()
    assert results(tmp_path / "run").keys() == {"nat"}


def test_two_processes_evaluate_a_run_to_the_bytes_of_one(tmp_path, tiny_path):
    train(1, tmp_path / "run", "at", f"data=npz('{tiny_path}')", *SMALL, "epochs=1")
    for processes in (1, 2):
        data = ("--data", f"npz('{tiny_path}')")
        words = (
            "eval",
            tmp_path / "run",
            *data,
            "--attacks",
            "nat,pgd10",
            "--out",
            tmp_path / f"eval{processes}",
        )
        done = launch(processes, "-m", "robustmail", *words, "--out", tmp_path / f"eval{processes}")
        _, wrong = done.communicate()
        assert done.returncode == 0, wrong
    for name in ("ledger.csv", "examples.safetensors"):
        assert (tmp_path / "eval1" / name).read_bytes() == (tmp_path / "eval2" / name).read_bytes()
