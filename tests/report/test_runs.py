"""All runs below a folder, and two of them side by side."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from robustmail.cli import main
from robustmail.report.runs import LOOKED_AT, find_runs, read_run, runs_table

NOW = time.mktime((2026, 5, 4, 12, 0, 0, 0, 0, -1))


def made(folder: Path, done: int = 3, epochs: int = 10, complete: bool | None = None, **fields: str) -> Path:
    """A run of 100 steps an epoch that has finished some epochs, a minute each, up to NOW."""
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"epochs": str(epochs), "seed": "0", **fields}))
    (folder / "state.pt").touch()
    (folder / "lock").touch()
    rows = [f"{epoch},{2 - epoch / 10},0.{5 + epoch},0.{4 + epoch % 3}" for epoch in range(done)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,train_loss,val_nat,val_rob", *rows]) + "\n")
    lines = [(NOW - 60 * done, f"x: cifar\n{epochs} epochs of 100 steps"), (NOW - 60 * done, "epoch 1 step 0: loss 1")]
    lines += [(NOW - 60 * (done - epoch), f"epoch {epoch} done: loss 1") for epoch in range(1, done + 1)]
    (folder / "log.txt").write_text("".join(
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}  {line}\n" for at, text in lines
        for line in text.splitlines()
    ))  # fmt: skip
    if complete is not None:
        (folder / "results.json").write_text(json.dumps({"complete": complete}))
    return folder


def test_a_stopped_run_has_the_time_that_its_epochs_took(tmp_path: Path):
    run = read_run(made(tmp_path / "a"), NOW)
    assert (run.state, run.done, run.epochs, run.best, run.best_epoch) == ("stopped", 3, 10, 0.6, 3)
    assert run.left == pytest.approx(7 * 60)


def test_of_a_run_that_goes_on_the_time_since_its_last_line_has_passed(tmp_path: Path):
    folder = made(tmp_path / "a")
    with open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = read_run(folder, NOW + 20)
        assert (run.state, run.left) == ("training", pytest.approx(7 * 60 - 20))
        assert read_run(made(tmp_path / "b"), NOW).state == "stopped"
    assert read_run(folder, NOW).state == "stopped"


@pytest.mark.parametrize("jump", [86400, -86400, 3600])
def test_a_clock_that_was_set_does_not_change_the_time_left(tmp_path: Path, jump: int):
    folder = made(tmp_path / "a", done=5)
    log = (folder / "log.txt").read_text().splitlines()
    for k in (-1, -2):  # the last two lines are of another clock
        at = time.strptime(log[k][:19], "%Y-%m-%d %H:%M:%S")
        log[k] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.mktime(at) + jump)) + log[k][19:]
    (folder / "log.txt").write_text("\n".join(log) + "\n")
    assert read_run(folder, NOW).left == pytest.approx(5 * 60)
    with open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(folder, NOW + 7 * 86400).left == read_run(folder, NOW - 7 * 86400).left == pytest.approx(5 * 60)


def test_of_a_long_log_the_middle_need_not_be_read(tmp_path: Path):
    folder = made(tmp_path / "a", done=2000, epochs=4000)
    text = (folder / "log.txt").read_text().replace(": loss 1", f": loss 1{' ' * 100}")
    (folder / "log.txt").write_text(text)
    assert len(text) > 3 * LOOKED_AT
    assert read_run(folder, NOW).left == pytest.approx(2000 * 60, rel=0.01)


def test_a_finished_run_has_no_time_left(tmp_path: Path):
    run = read_run(made(tmp_path / "a", done=10, complete=True), NOW)
    assert (run.state, run.left) == ("finished", None)
    assert read_run(made(tmp_path / "b", done=10, complete=False), NOW).state == "stopped"


@pytest.mark.parametrize(
    ("name", "text"),
    [("recipe.json", "{"), ("recipe.json", "{}"), ("metrics.csv", "val_rob\nmany\n"), ("results.json", "[]")],
)
def test_a_damaged_run_is_named_and_hides_no_other(tmp_path: Path, name: str, text: str):
    (made(tmp_path / "a") / name).write_text(text)
    made(tmp_path / "b")
    assert [read_run(folder, NOW).state for folder in find_runs(tmp_path)] == ["damaged", "stopped"]


def test_links_are_not_followed_and_a_pipe_is_no_log(tmp_path: Path):
    folder = made(tmp_path / "below" / "a")
    (tmp_path / "below" / "ring").symlink_to(tmp_path)
    (folder / "log.txt").unlink()
    os.mkfifo(folder / "log.txt")
    (found,) = find_runs(tmp_path / "below")
    assert read_run(found, NOW).left is None


def test_the_table_fits_into_60_columns(tmp_path: Path):
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(runs_table([read_run(made(tmp_path / "runs" / "quickstart" / "0"), NOW)]))
    console.file.close()
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.rstrip().endswith("7 min") for line in lines)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*words: str) -> tuple[str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["robustmail", *words])
        with pytest.raises(SystemExit):
            main.main()
        return capsys.readouterr()

    return call


def test_list_runs_lists_all_that_are_below_here(tmp_path: Path, said):
    assert said("list", "runs")[0] == "no runs below this folder\n"
    made(tmp_path / "runs" / "at" / "0")
    made(tmp_path / "trials" / "x" / "runs" / "at" / "1", done=10, complete=True)
    out, _ = said("list", "runs")
    assert "runs/at/0" in out
    assert "trials/x/runs/at/1" in out
    assert "the command that began a run resumes it" in out


def test_two_runs_are_compared_by_their_fields_and_curves(tmp_path: Path, said):
    made(tmp_path / "a", seed="0", margin="pm_adv")
    made(tmp_path / "b", done=5, seed="1", margin="pm_adv")
    out, _ = said("compare", "a", "b")
    assert out.startswith("A: a\nB: b\n")
    assert "seed    0   1" in out
    assert "pm_adv" not in out
    assert "B: 5 epochs, the best robust validation is 60.0 % after epoch 3." in out
    assert "a, b: not evaluated yet" in out
    assert json.loads(said("compare", "a", "b", "--json")[0])["fields"] == {"seed": ["0", "1"]}
    (tmp_path / "b" / "metrics.csv").write_text("val_rob\nmany\n")
    assert said("compare", "a", "b")[1].startswith("robustmail: b/metrics.csv: damaged (")
