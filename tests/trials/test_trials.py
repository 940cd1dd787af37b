"""`robustmail trials` as real processes: killed and continued, with a cell that fails, through an executor."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from robustmail.records import RunFinished, WaitingForFolder
from robustmail.runtime.files import folder_lock
from robustmail.runtime.signals import Signals
from robustmail.trials.execute import run_job
from robustmail.trials.fork import Job
from robustmail.trials.grid import Cell, cells
from robustmail.trials.study import Study
from robustmail.trials.summary import read_accuracies
from tests.processes import Python, python
from tests.trials.conftest import TINY, call, hashes

pytestmark = pytest.mark.long

GRID = ("trials", "quickstart", "--over", "margin=pm_adv,pm_nat", "--seeds", "0:2", *TINY, "--out", "grid")
CELLS = [f"runs/quickstart-margin={margin}/{seed}" for margin in ("pm_adv", "pm_nat") for seed in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a finished grid, and what was said; nobody changes it."""
    folder = tmp_path_factory.mktemp("whole")
    done = call(folder, *GRID)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def summary(folder: Path) -> dict:
    """What a summary says of the results; when and in which words they were made may differ."""
    found = json.loads((folder / "trials.json").read_text())
    return {name: found[name] for name in ("format", "complete", "seeds", "rows", "cells", "recipes")}


def launch(tmp_path: Path, *words: str) -> Python:
    return Python("-m", "robustmail", *words, cwd=tmp_path)


def until_it_says(process: Python, what: str) -> None:
    for text in process.stdout:
        if text.startswith(what):
            return
    raise AssertionError(f"never said {what!r}: {process.stderr.read()}")


def test_a_grid_that_was_killed_ends_like_one_that_was_not(tmp_path, robustmail, whole):
    there, said = whole
    for place in ("epoch 1 done", "2 of", "epoch 3 done"):  # in a trunk, in a fork, in a cell's own epochs
        process = launch(tmp_path, *GRID)
        until_it_says(process, place)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    parts = robustmail(*GRID)
    assert (parts.returncode, parts.stderr) == (0, "")
    assert summary(tmp_path / "grid") == summary(there / "grid")
    for cell in CELLS:
        assert hashes(tmp_path / "grid" / cell) == hashes(there / "grid" / cell)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("state.pt")}
    again = robustmail(*GRID)
    assert again.returncode == 0
    assert [text for text in again.stdout.splitlines() if "epoch" in text.lower()] == [
        text for text in again.stdout.splitlines() if text.startswith("Epochs that runs share")
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished grid was trained again"
    table = [text for text in said.splitlines() if text.startswith(" quickstart")]
    assert table == [text for text in again.stdout.splitlines() if text.startswith(" quickstart")]
    assert len(table) == 4  # two rows of accuracies, and two of worst classes


def test_the_summary_carries_its_provenance_and_what_sharing_saved(whole):
    there, said = whole
    found = json.loads((there / "grid" / "trials.json").read_text())
    assert found["complete"]
    assert found["provenance"]["command"].startswith("robustmail trials quickstart --over margin=pm_adv,pm_nat")
    assert found["provenance"]["versions"]["torch"]
    assert "margin=pm_nat" in found["recipes"]["quickstart margin=pm_nat"]
    steps = 4  # of 512 images in batches of 128
    assert found["shared"]["steps_saved"] == 2 * 2 * steps  # two epochs of one run, for each of two seeds
    assert found["shared"]["seconds_saved"] > 0
    assert f"{2 * 2 * steps} steps saved" in said
    nat = found["rows"][0]["metrics"]["nat"]
    values = [cell["accuracy"]["nat"] for cell in found["cells"] if cell["row"] == "quickstart margin=pm_adv"]
    assert nat["spread"]["mean"] == pytest.approx(sum(values) / 2)
    assert nat["by_seed"] == {"0": values[0], "1": values[1]}


def test_a_finished_grid_is_compared_with_a_baseline(tmp_path, robustmail, whole):
    shutil.copytree(whole[0] / "grid", tmp_path / "grid")
    compared = robustmail(*GRID, "--baseline", "quickstart margin=pm_nat")
    assert (compared.returncode, compared.stderr) == (0, "")
    assert compared.stdout.count("   difference") == 2  # accuracies, and worst classes
    content = json.loads((tmp_path / "grid" / "trials.json").read_text())
    assert content["baseline"] == "quickstart margin=pm_nat"
    first, base = (row["metrics"]["nat"] for row in content["rows"])
    assert base["difference"] is None
    assert first["difference"]["mean"] == pytest.approx(first["spread"]["mean"] - base["spread"]["mean"])
    refused = robustmail(*GRID, "--baseline", "quickstart margin=pm_nad")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'quickstart margin=pm_nat'?" in refused.stderr


def test_a_grid_reads_the_results_of_a_finished_run_once(tmp_path, whole, monkeypatch):
    """It saves its summary after each run: reading all others each time would take longer with every run."""
    shutil.copytree(whole[0] / "grid", tmp_path / "grid")
    read: list[Path] = []

    def counted(folder: Path) -> dict[str, float] | None:
        read.append(folder)
        return read_accuracies(folder)

    monkeypatch.setattr("robustmail.trials.study.read_accuracies", counted)
    made = cells(["quickstart"], ["margin=pm_adv,pm_nat"], TINY, (0, 1))
    study = Study(made, tmp_path / "grid", "trials.json", "robustmail trials")
    for _ in range(3):
        study.save()
    assert sorted(read) == [tmp_path / "grid" / name for name in CELLS]
    assert summary(tmp_path / "grid") == summary(whole[0] / "grid")


def test_a_grid_that_grows_or_shrinks_counts_what_its_own_cells_saved(tmp_path, whole):
    there, _ = whole
    shutil.copytree(there, tmp_path, dirs_exist_ok=True)
    words = [word for word in GRID if word not in ("--over", "margin=pm_adv,pm_nat", "--seeds", "0:2")]
    more = call(tmp_path, *words, "--over", "margin=pm_adv,pm_nat,pm_dif", "--seeds", "0")
    assert more.returncode == 0, more.stderr
    assert "1 of 1: quickstart margin=pm_dif, seed 0" in more.stdout, "its trunk is there, and not made again"
    steps = 4
    assert f"{2 * 2 * steps} steps saved" in more.stdout  # two runs of three, for the one seed
    alone = call(tmp_path, *words, "--over", "margin=pm_adv", "--seeds", "0")
    assert alone.returncode == 0
    assert "saved" not in alone.stdout.replace("saved in", "")


def test_a_process_that_a_killed_call_left_behind_is_waited_for(tmp_path, whole):
    there, _ = whole
    shutil.copytree(there / "grid" / CELLS[0], tmp_path / "run")
    row = "quickstart margin=pm_adv"
    job = Job(Cell(row, "quickstart", (*TINY, "margin=pm_adv"), 0), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    records = run_job(job, Signals())
    with folder_lock(tmp_path / "run"):
        assert next(records) == WaitingForFolder(str(tmp_path / "run"))
    assert isinstance(list(records)[-1], RunFinished)


def test_every_cell_is_an_ordinary_run(whole):
    there, _ = whole
    again = call(there, "run", "quickstart", *TINY, "margin=pm_nat", "seed=1", "--out", f"grid/{CELLS[3]}", "--plain")
    assert (again.returncode, "had been finished before" in again.stdout) == (0, True)
    assert call(there, "report", *(f"grid/{cell}" for cell in CELLS)).returncode == 0


def test_a_cell_that_fails_is_told_and_the_others_finish(tmp_path, robustmail):
    words = ("trials", "quickstart", "--over", "optimizer.lr=0.05,1e30", "--seeds", "0:2", *TINY[:6], *TINY[7:])
    done = robustmail(*words, "--out", "grid")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "quickstart optimizer.lr=1e30, seed 0: FAILED: epoch 1, step" in done.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "grid" / "trials.json").read_text())["rows"]}
    assert rows["quickstart optimizer.lr=0.05"]["missing"] == []
    assert set(rows["quickstart optimizer.lr=1e30"]["failed"]) == {"0", "1"}


def test_what_grows_on_a_failed_trunk_fails_with_it(tmp_path, robustmail):
    words = [word for word in GRID if not word.startswith("optimizer.lr")]
    done = robustmail(*words, "optimizer.lr=1e30")
    assert done.returncode == 1
    failed = [text for text in done.stdout.splitlines() if text.startswith("quickstart margin") and "FAILED" in text]
    assert len({text.partition(":")[0] for text in failed}) == 4
    assert not (tmp_path / "grid" / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_stops_the_grid_and_says_how_to_go_on(tmp_path, number):
    words = [word if not word.startswith("epochs") else "epochs=50" for word in GRID]
    process = launch(tmp_path, *words)
    until_it_says(process, "epoch 3 done")
    process.send_signal(number)
    _, wrong = process.communicate()
    assert process.returncode == 128 + number, wrong
    assert wrong.count("\n") == 1
    assert f"stopped by {number.name}; saved in grid. Resume with: robustmail trials quickstart --over" in wrong


def test_two_processes_cannot_work_on_one_grid(tmp_path, robustmail):
    words = [word if not word.startswith("epochs") else "epochs=50" for word in GRID]
    first = launch(tmp_path, *words)
    until_it_says(first, "epoch 1 done")
    second = robustmail(*words)
    first.kill()
    first.communicate()
    assert (second.returncode, second.stderr) == (
        2, "robustmail: grid: another process is working in it. Wait for it, or pass another --out.\n",
    )  # fmt: skip


WRONG = {
    "no recipe": ("trials epochs=3", "trials: no recipe given"),
    "seeds": ("trials at --seeds 5:0", "--seeds 5:0: names no seed. Write 0:5."),
    "path": ("trials at epohcs=3", "epohcs=3: the recipe has no 'epohcs'. Did you mean 'epochs'?"),
    "path over": ("trials at --over bacth=1,2", "bacth=1: the recipe has no 'bacth'. Did you mean 'batch'?"),
    "twice": ("trials at at", "trials (at): is there twice"),
    "no trace": (
        "trials mail_at --over margin=pm_adv,lps device=cpu",
        "trials (mail_at margin=lps): lps: the attack kept no trace",
    ),
    "attack": ("trials quickstart evaluate=pgdd", "trials (quickstart): attack 'pgdd'"),
    "executor": ("trials quickstart --executor slurmm", "--executor slurmm: no such executor. Did you mean 'slurm'?"),
    "parameter": ("trials quickstart --executor local --with x", "--with x: not NAME=VALUE"),
    "table": ("table 4", "table 4: the paper has no such table of results. There are: 1, 2, 3."),
    "scale": ("table 1 --scale mimi", "table --scale mimi: no such scale. Did you mean 'mini'?"),
    "wide at home": ("table 3 --scale mini", "a WRN-32-10 is not for a CPU"),
    "no table": ("table x", "table x: the paper has no such table of results"),
    "no seeds": ("table 2 --seeds ", "--seeds : is no list of seeds"),
    "format": ("table 1 --format markdwn", "table --format markdwn: no such format. Did you mean 'markdown'?"),
    "folder of another": ("trials quickstart --seeds 1 --out there", "there/runs/quickstart/1: holds a run of another"),
}


@pytest.mark.parametrize(("words", "fragment"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, words, fragment):
    from robustmail.cli import main

    run = tmp_path / "there" / "runs" / "quickstart" / "1"
    run.mkdir(parents=True)
    (run / "state.pt").touch()
    (run / "recipe.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robustmail", *words.split(" ")])
    with pytest.raises(SystemExit) as left:
        main.main()
    said = capsys.readouterr()
    assert left.value.code == 2, said
    assert said.err.count("\n") == 1
    assert [part for part in fragment.split(" ... ") if part not in said.err] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_an_executor_without_submitit_is_one_line(tmp_path):
    code = "import sys; sys.modules['submitit'] = None\nfrom robustmail.cli.main import main\nmain()\n"
    done = python("-c", code, *GRID, "--executor", "local", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "robustmail: --executor local: needs submitit, which is not installed. pip install 'robustmail[trials]'\n",
    )
    assert list(tmp_path.iterdir()) == []


needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")


@needs_submitit
def test_processes_of_an_executor_make_the_same_runs(tmp_path, robustmail, whole):
    there, _ = whole
    one_seed = [word if word != "0:2" else "0" for word in GRID]
    done = robustmail(*one_seed, "--executor", "local", "--jobs", "2")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for cell in CELLS[::2]:
        assert hashes(tmp_path / "grid" / cell) == hashes(there / "grid" / cell)


@needs_submitit
def test_a_signal_ends_the_processes_of_an_executor(tmp_path):
    words = [word if not word.startswith("epochs") else "epochs=500" for word in GRID]
    process = launch(tmp_path, *words, "--executor", "local", "--jobs", "2")
    while not list((tmp_path / "grid").glob("trunks/*/*/metrics.csv")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, wrong = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, wrong
    for _ in range(100):  # each has a second to save
        if not working(tmp_path):
            break
        time.sleep(0.2)
    assert working(tmp_path) == []


def working(folder: Path) -> list[str]:
    """The processes that were started in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                if Path(os.readlink(entry / "cwd")) == folder:
                    found.append(entry.name)
            except OSError:
                continue
    return found
