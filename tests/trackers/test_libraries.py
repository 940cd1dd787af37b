"""Each tracker with its real library, which writes into a folder; its own reader says what is there."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustmail.config.loader import find_plugin
from robustmail.records import AttackResult, EpochFinished, RunFinished, RunStarted, StepFinished, WeightStats
from robustmail.trackers.tracking import Tracking
from tests.trackers import readers

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, which warn of one another
    pytest.mark.long,
]

PM = "margins/pm_adv"
STEPS, EPOCHS = 3, 2  # of an epoch; of the run
CONFIG = {"data": "digits", "model": "'small_cnn'", "attack.eps": "8/255", "seed": "0", "weighter.slope": "2.0"}
READERS = {
    "tensorboard": readers.of_tensorboard, "wandb": readers.of_wandb, "mlflow": readers.of_mlflow,
    "trackio": readers.of_trackio,
}  # fmt: skip


@pytest.fixture(params=READERS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A tracker whose library is installed; nobody is logged in anywhere, and no setting of the user's is in force."""
    for module in (request.param, *(["sqlalchemy"] if request.param == "mlflow" else [])):
        if find_spec(module) is None:  # not imported: Trackio then looks where to write
            pytest.skip(f"{module} is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    return request.param


def started(done: int = 0) -> RunStarted:
    return RunStarted(
        "test", "loss", "small_cnn", 1, "digits", (1, 1, 1), "cpu", EPOCHS, STEPS, 0, done // STEPS, done % STEPS
    )


def steps(first: int, last: int) -> list[StepFinished | EpochFinished]:
    """The records of the steps first ... last, over all epochs; loss is the step's number, and so are others."""
    records: list[StepFinished | EpochFinished] = []
    for n in range(first, last + 1):
        epoch, step = (n - 1) // STEPS, (n - 1) % STEPS + 1
        weights = WeightStats(ess=0.5, top=0.1, right=None, wrong=float(n)) if epoch else None
        histogram = (0, 3, 1, 0)
        records.append(StepFinished(
            epoch, step, 4, 0.1, float(n), n / 2, n / 4, 0.5, None, "pm_adv", histogram, (-1.0, 1.0), weights, 0.5
        ))  # fmt: skip
        if step == STEPS:
            row = {"epoch": epoch, "weights": "on", "train_loss": float(n), "train_nat": "", "val_rob": n / 10}
            records.append(EpochFinished(row, best=True))
    return records


FINISHED = RunFinished("", (AttackResult("pgd100", 3, 4, 0.75, 0.3, 0.95, 1.0),), "best.safetensors", 1)


def follow(library: str, folder: Path, records: list, config: dict[str, str] = CONFIG) -> list[str]:
    """Track a run in a folder; returns what was said."""
    said: list[str] = []
    with Tracking({library: find_plugin(library, "trackers")()}, folder / "trackers", config, said.append) as track:
        for record in records:
            track(record)
    return said


def read(library: str, folder: Path, last: str) -> readers.Scalars:
    """Read the scalars once `last` is among them: another process of W&B's writes the file, a little after `finish`."""
    for _ in range(100):
        if last in (found := READERS[library](folder)):
            return found
        time.sleep(0.1)
    return found


def test_a_run_that_was_stopped_goes_on_in_the_same_tracker_run_with_every_step_once(library: str, tmp_path: Path):
    Image.fromarray(np.full((20, 40, 3), 200, np.uint8)).save(tmp_path / "curves.png")
    first = follow(library, tmp_path, [started(), *steps(1, 4)])
    ids = json.loads((tmp_path / "trackers" / "ids.json").read_text())
    second = follow(library, tmp_path, [started(4), *steps(5, 6), FINISHED], {**CONFIG, "seed": "1"})

    for said in (first, second):
        assert len(said) == 1
        assert "no longer" not in said[0]
    assert json.loads((tmp_path / "trackers" / "ids.json").read_text()) == ids
    found = read(library, tmp_path / "trackers", "test/pgd100_high")
    assert found["train/loss"] == [(n, n) for n in range(1, 7)]
    assert found["train/weighted"] == [(n, n / 2) for n in range(1, 7)]
    assert found["weights/wrong"] == [(n, n) for n in range(4, 7)]
    assert found["epoch/val_rob"] == [(3, pytest.approx(0.3)), (6, pytest.approx(0.6))]
    assert found["test/pgd100"] == [(6, 0.75)]
    assert [found[f"test/pgd100_{end}"][0][1] for end in ("low", "high")] == pytest.approx([0.3, 0.95])
    assert "train/nat" not in found
    assert not {"weights/right", "epoch/weights", "epoch/train_nat"} & {*found}
    CHECKS[library](tmp_path / "trackers")


@pytest.mark.parametrize("library", ["tensorboard", "mlflow"], indirect=True)
def test_steps_that_a_killed_run_trains_again_are_kept_once(library: str, tmp_path: Path):
    follow(library, tmp_path, [started(), *steps(1, 5)])
    follow(library, tmp_path, [started(2), *steps(3, 6), FINISHED])
    found = READERS[library](tmp_path / "trackers")
    assert found["train/loss"] == [(n, n) for n in range(1, 7)]
    assert [step for step, _ in found["epoch/val_rob"]] == [3, 6]


@pytest.mark.parametrize("library", ["mlflow"], indirect=True)
def test_a_database_whose_pictures_would_go_elsewhere_is_not_continued(library: str, tmp_path: Path):
    follow(library, tmp_path / "before", [started(), *steps(1, 2)])
    (tmp_path / "before").rename(tmp_path / "moved")
    (tmp_path / "before").mkdir()
    follow(library, tmp_path / "moved", [started(2), *steps(3, 4)])
    assert not [*(tmp_path / "before").iterdir()]


def check_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    histograms = events.Histograms("margins/pm_adv")
    assert [event.step for event in histograms] == [1, 4]
    value = histograms[0].histogram_value
    assert (value.bucket_limit, value.bucket) == ([-0.5, 0.0, 0.5, 1.0], [0, 3, 1, 0])
    assert (value.min, value.max, value.num, value.sum) == (-1, 1, 4, -0.5)
    (picture,) = events.Images("curves")
    assert (picture.width, picture.height) == (40, 20)
    texts = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("recipe", "results")
    }
    assert b"| model | small_cnn |" in texts["recipe"]
    assert b"| pgd100 | 0.75 | 0.3 | 0.95 | 3 | 4 |" in texts["results"]


def check_wandb(folder: Path) -> None:
    assert len({file.stem for file in folder.glob("wandb/wandb/offline-run-*/*.wandb")}) == 1
    rows = [*readers.wandb_history(folder)]
    histograms = [(row["_step"], row[f"{PM}/values"], row[f"{PM}/bins"]) for row in rows if f"{PM}/values" in row]
    assert histograms == [(n, [0, 3, 1, 0], [-1, -0.5, 0, 0.5, 1]) for n in (1, 4)]
    media = {path.name.split("_")[0] for path in folder.glob("wandb/wandb/offline-run-*/files/media/*/*")}
    assert media == {"curves", "results"}


def check_mlflow(folder: Path) -> None:
    client, run = readers.mlflow_run(folder)
    assert run.info.status == "FINISHED"
    assert run.data.params["attack.eps"] == str(8 / 255)
    assert run.data.params["model"] == "small_cnn"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"curves.png", "results.json"}


def check_trackio(folder: Path) -> None:
    rows = readers.trackio_rows()
    histograms = [(row["step"], row["margins/pm_adv"]["values"]) for row in rows if "margins/pm_adv" in row]
    assert histograms == [(1, [0, 3, 1, 0]), (4, [0, 3, 1, 0])]
    assert any("results" in row for row in rows)
    assert [*folder.glob("trackio/media/**/*.png")]


CHECKS = {
    "tensorboard": check_tensorboard, "wandb": check_wandb, "mlflow": check_mlflow, "trackio": check_trackio,
}  # fmt: skip
