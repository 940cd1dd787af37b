"""What trackers are told, and that nothing they do reaches the run: with trackers of our own, and real training."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from robustmail.errors import RunError, Stopped
from robustmail.records import RunStarted, StepFinished
from robustmail.runtime.signals import Signals
from robustmail.trackers.tracker import Opened, TrackedRun
from robustmail.trackers.tracking import Tracking
from robustmail.train.run import TRACKERS, run, status
from tests.train.conftest import recipe as plain

pytestmark = pytest.mark.long
ALL_STEPS = range(1, 7)
recipe = plain.but(evaluate=("nat", "pgd2"))


@dataclass
class Notebook:
    """A tracker that notes what it is told; `fails` is called with each method's name and step first."""

    fails: Callable[[str, int], object] = lambda method, step: None
    id: str = "notebook-1"
    run: TrackedRun | None = None
    losses: list[int] = field(default_factory=list)
    scalars: dict[str, list[int]] = field(default_factory=dict)
    histograms: list[tuple[str, int, int]] = field(default_factory=list)
    tables: dict[str, list] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def start(self, run: TrackedRun) -> Opened:
        self.fails("start", run.step)
        self.run = run
        return Opened(self.id, "noted")

    def log(self, scalars, step):
        self.fails("log", step)
        for name in scalars:
            self.scalars.setdefault(name, []).append(step)

    def histogram(self, name, counts, span, step):
        self.histograms.append((name, sum(counts), step))

    def table(self, name, columns, rows, step):
        self.fails("table", step)
        self.tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    def image(self, name, path, step):
        self.images.append(name)

    def finish(self, outcome):
        self.outcomes.append(outcome)
        self.fails("finish", 0)


def follow(folder: Path, stop_after: int = 0, **trackers: Notebook) -> list[str]:
    """Train in a folder, tracked; asked to stop after so many steps. Returns what was said."""
    said: list[str] = []
    signals, steps = Signals(), 0
    config = {"seed": "0"}
    try:
        with Tracking(trackers, folder / TRACKERS, config, said.append) as track:
            for record in run(recipe, folder, "test", signals=signals):
                track(record)
                steps += isinstance(record, StepFinished)
                if steps == stop_after and isinstance(record, StepFinished):
                    signals.asked = signal.SIGINT
    except Stopped:
        pass
    return said


def bits(folder: Path) -> list[bytes]:
    return [
        (folder / name).read_bytes() for name in ("last.safetensors", "best.safetensors", "metrics.csv", "ledger.csv")
    ]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("untracked") / "run"


@pytest.fixture(scope="module", autouse=True)
def records(untracked: Path) -> list:
    """The records of a whole run that nobody tracked."""
    return list(run(recipe, untracked, "test"))


def failing(method: str, step: int, error: BaseException) -> Callable[[str, int], None]:
    def fails(called: str, at: int) -> None:
        if called == method and at >= step:
            raise error

    return fails


def test_every_step_epoch_and_attack_is_sent_and_the_run_keeps_its_bits(tmp_path: Path, untracked: Path):
    told = Notebook()
    assert follow(tmp_path / "run", told=told) == ["told: noted"]
    assert bits(tmp_path / "run") == bits(untracked)
    assert told.scalars["train/loss"] == [*ALL_STEPS]
    assert told.scalars["weights/ess"] == [4, 5, 6]  # one epoch of burn-in
    assert told.scalars["epoch/val_rob"] == [3, 6]
    assert told.scalars["test/pgd2_high"] == [6]
    assert [name for name, _, _ in told.histograms] == ["margins/pm_adv"] * 2
    assert [(n, step) for _, n, step in told.histograms] == [(512, 1), (512, 4)]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["attacks"]
    assert [row["accuracy"] for row in told.tables["results"]] == [attack["accuracy"] for attack in results]
    assert told.images == ["examples"]  # the command line draws curves.png
    assert told.outcomes == ["finished"]
    assert (told.run.id, told.run.config, told.run.folder) == (None, {"seed": 0}, tmp_path / "run" / TRACKERS / "told")


def test_a_run_that_was_stopped_goes_on_under_the_same_id(tmp_path: Path, untracked: Path):
    first, second = Notebook(), Notebook(id="notebook-2")
    follow(tmp_path / "run", stop_after=4, told=first)
    assert (first.scalars["train/loss"], first.outcomes) == ([1, 2, 3, 4], ["stopped"])
    follow(tmp_path / "run", told=second)
    assert (second.scalars["train/loss"], second.outcomes) == ([5, 6], ["finished"])
    assert (second.run.id, second.run.step) == ("notebook-1", 4)
    assert bits(tmp_path / "run") == bits(untracked)


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(1), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize(("method", "seen"), [("start", []), ("log", [1, 2]), ("table", [*ALL_STEPS])])
def test_a_tracker_that_fails_stops_neither_the_run_nor_the_others(
    method: str, seen: list[int], error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replay
):
    monkeypatch.setattr(signal, "getsignal", lambda number: "ours")  # Ctrl-C raises Stopped on the command line
    step = {"start": 0, "log": 3, "table": 0}[method]
    bad, good = Notebook(failing(method, step, error)), Notebook()
    said = replay(bad=bad, good=good)
    (line,) = (text for text in said if text.startswith("bad: no longer"))
    assert line.startswith(f"bad: no longer tracked ({type(error).__name__}")
    assert bad.scalars.get("train/loss", []) == seen
    assert bad.outcomes == ([] if method == "start" else ["failed"])
    assert good.scalars["train/loss"] == [*ALL_STEPS]
    assert good.outcomes == ["finished"]


@pytest.fixture
def replay(tmp_path: Path, records: list):
    """Send the records of a whole run to trackers; returns what was said."""

    def send(**trackers: Notebook) -> list[str]:
        said: list[str] = []
        with Tracking(trackers, tmp_path / TRACKERS, {}, said.append) as track:
            for record in records:
                track(record)
        return said

    return send


def test_that_the_user_stops_the_process_is_passed_on(replay):
    told = Notebook(failing("log", 3, Stopped(signal.SIGINT)))
    with pytest.raises(Stopped):
        replay(told=told)
    assert told.outcomes == ["stopped"]


def test_a_tracker_may_fail_where_it_is_closed(replay):
    said = replay(bad=Notebook(failing("finish", 0, ValueError("no"))), good=(good := Notebook()))
    assert said[-1] == "bad: no longer tracked (ValueError: no)"
    assert good.outcomes == ["finished"]


@pytest.mark.parametrize("text", ['{"told": "../../elsewhere"}', '{"told": 3}', "[]", "{", '{"told": ""}'])
def test_an_id_that_is_none_begins_a_new_tracker_run(text: str, replay, tmp_path: Path):
    (tmp_path / TRACKERS).mkdir()
    (tmp_path / TRACKERS / "ids.json").write_text(text)
    replay(told=(told := Notebook()))
    assert told.run.id is None
    assert json.loads((tmp_path / TRACKERS / "ids.json").read_text()) == {"told": "notebook-1"}


def test_a_tracker_whose_id_is_a_path_is_not_followed(replay):
    (line,) = replay(told=Notebook(id="../x"))
    assert "no longer tracked" in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
@pytest.mark.parametrize("link", [TRACKERS, f"{TRACKERS}/told", f"{TRACKERS}/told/deeper"])
def test_nothing_is_written_through_a_link_out_of_the_folder(link: str, replay, tmp_path: Path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(outside, tmp_path / link)
    (line,) = replay(told=(told := Notebook()))
    assert "leads out of" in line
    assert told.run is None
    assert not [*outside.iterdir()]


def test_fresh_begins_a_new_tracker_run_and_deletes_the_files_of_the_old_one(tmp_path: Path):
    folder = tmp_path / "run"
    follow(folder, stop_after=1, told=Notebook())
    (folder / TRACKERS / "told" / "old").touch()
    assert status(recipe, folder) == "continue"
    told = Notebook()
    with Tracking({"told": told}, folder / TRACKERS, {}, print) as track:
        for record in run(recipe, folder, "test", fresh=True, yes=True):
            track(record)
            if isinstance(record, RunStarted):
                break
    assert told.run.id is None
    assert not (folder / TRACKERS / "told" / "old").exists()


def test_a_folder_of_that_name_that_is_no_run_s_is_refused(tmp_path: Path):
    (tmp_path / TRACKERS).mkdir()
    with pytest.raises(RunError, match="trackers, which would be overwritten"):
        status(recipe, tmp_path)


def test_a_finished_run_is_not_tracked_again(untracked: Path):
    told = Notebook()
    assert follow(untracked, told=told) == []
    assert told.run is None
