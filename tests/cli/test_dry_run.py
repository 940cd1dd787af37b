"""--dry-run says what would be done, and writes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from robustmail.cli import main
from robustmail.models.classifier import build


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call a verb with --dry-run; nothing may have changed on disk."""
    monkeypatch.chdir(tmp_path)

    def call(words: str) -> tuple[int, str, str]:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        monkeypatch.setattr(sys, "argv", ["robustmail", *words.split(), "--dry-run"])
        with pytest.raises(SystemExit) as left:
            main.main()
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return (left.value.code, *capsys.readouterr())

    return call


def test_a_run_is_told_with_its_loss_data_steps_cost_and_folder(dry):
    code, out, _ = dry("run quickstart --seed 3 --epochs 4 --burn-in 2")
    assert code == 0
    for text in (
        "robustmail show quickstart seed=3 epochs=4 burn_in=2", "mean( w * 5 KL(nat || adv) + CE(nat) )",
        "1,288 images of 1x8x8 to train on, 150 to validate, 359 to test", "small_cnn, 94,186 parameters",
        "4 epochs of 11 steps, 44 in all", "25 passes a step, 1,100 passes of a batch in all",
        "runs/quickstart/3 would be made",
    ):  # fmt: skip
        assert text in out


def test_data_that_would_be_downloaded_are_not(dry):
    code, out, _ = dry("run mail_trades")
    assert code == 0
    assert "would be downloaded (its files are not there)" in out


def test_what_a_run_refuses_its_dry_run_refuses(dry, tmp_path: Path):
    folder = tmp_path / "runs/quickstart/0"
    folder.mkdir(parents=True)
    (folder / "state.pt").touch()
    (folder / "recipe.json").write_text('{"epochs": "3"}')
    code, _, error = dry("run quickstart")
    assert code == 2
    assert "holds a run of another recipe" in error
    assert "finished" not in error


def test_a_grid_is_told_by_its_runs(dry):
    code, out, _ = dry("trials at mail_at --seeds 0:2 data=digits model=small_cnn --epochs 4 --burn-in 2")
    assert code == 0
    assert "4 of 4 to make, 0 finished" in out
    assert "2 starts that several of them have in common" in out
    assert "  mail_at: 2 of 2 runs to make" in out


def test_an_evaluation_is_told_with_model_data_attacks_and_folder(dry, tmp_path: Path):
    torch.save(build("small_cnn", 10, 1).state_dict(), tmp_path / "net.pth")
    options = "--model small_cnn --data digits --normalize none --n 40"
    code, out, error = dry(f"eval net.pth {options} --attacks nat,pgd20")
    assert code == 0, error
    assert "pgd20: at most 61 passes an image" in out
    assert "digits" in out
    assert "evals/net would be made" in out
    assert "eps       0 (the natural accuracy), 0.1 Linf, 0.2 Linf" in dry(f"eval net.pth {options} --eps 0,0.1,0.2")[1]
    assert "would be downloaded" in dry("eval hf://somebody/net/file.pth")[1]
