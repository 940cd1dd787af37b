"""Accuracy under corruptions, by a model whose answers are known."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from robustmail.cli.main import app
from robustmail.data.corruptions import find_corruptions
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.corruptions import CorruptionTask, corruption_means, evaluate_corruptions
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.storage import FILES
from robustmail.report.corruptions import corruption_table, draw_corruptions, write_corruption_csv
from robustmail.runtime.files import make_folder


class Bright(nn.Module):
    """Says class 1 of bright images, else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


@pytest.fixture
def task(tmp_path: Path) -> CorruptionTask:
    """Ten bright images, of which severity k darkens 2 k - 1 in fog and none in frost."""
    folder = tmp_path / "C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.ones(50, np.int64))
    fog = np.full((50, 8, 8, 3), 200, np.uint8)
    for k in range(5):
        fog[10 * k : 10 * k + 2 * k + 1] = 20
    np.save(folder / "fog.npy", fog)
    np.save(folder / "frost.npy", np.full((50, 8, 8, 3), 200, np.uint8))
    np.save(folder / "spatter.npy", np.full((50, 8, 8, 3), 20, np.uint8))
    x = torch.full((10, 3, 8, 8), 200, dtype=torch.uint8)
    x[0] = 20
    clean = TestSet("bright", Split(x, torch.ones(10, dtype=torch.int64)), 2)
    subject = LoadedModel.of(Bright(), clean)
    return CorruptionTask(subject, clean, find_corruptions(folder, clean), str(folder))


def test_accuracies_means_and_their_share_of_the_clean_one_are_right(task: CorruptionTask, tmp_path: Path) -> None:
    rows = list(evaluate_corruptions(task, tmp_path / "out"))
    by_place = {(row.corruption, row.severity): row.correct for row in rows}
    assert by_place["clean", 0] == 9
    assert [by_place["fog", s] for s in range(1, 6)] == [9, 7, 5, 3, 1]
    means = corruption_means(rows)
    assert means == pytest.approx({"fog": 0.5, "frost": 1.0, "spatter": 0.0, "mean, 2 of 15": 0.75, "mean, all 3": 0.5})
    write_corruption_csv(rows, tmp_path / "out" / "corruptions.csv")
    with open(tmp_path / "out" / "corruptions.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["relative_to_clean"]) for line in lines[5:8]] == pytest.approx([10 / 9, 1, 7 / 9], abs=1e-5)
    assert [path.suffix for path in draw_corruptions(rows, "x", tmp_path / "out" / "corruptions")] == [".png", ".svg"]
    assert corruption_table(rows, means, "x").row_count == 5


def test_a_stopped_evaluation_goes_on_and_another_one_is_refused(task: CorruptionTask, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = evaluate_corruptions(task, out)
    first = [next(found) for _ in range(4)]
    found.close()
    assert not json.loads((out / "corruptions.json").read_text())["complete"]
    np.save(Path(task.name) / "frost.npy", np.zeros((50, 8, 8, 3), np.uint8))  # what is done is not done again
    rows = list(evaluate_corruptions(task, out))
    assert rows[:4] == first
    assert [row.correct for row in rows[4:6]] == [0, 0]
    with pytest.raises(RunError, match=r"holds another evaluation \(n differ\)"):
        list(evaluate_corruptions(replace(task, n=5), out))
    with pytest.raises(RunError, match=r"it holds corruptions.json"):
        make_folder(out, FILES, "evaluation")


@pytest.mark.parametrize("words", [["--attacks", "nat"], ["--eps", "8/255"], ["--shard", "1/2"], ["--png"]])
def test_options_of_attacks_are_refused_beside_corruptions(words: list[str]) -> None:
    said = CliRunner().invoke(app, ["eval", "x.pth", "--corruptions", "C", *words])
    assert said.exit_code != 0
    assert words[0] in str(said.exception)


def test_corruptions_are_refused_under_torchrun_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = CliRunner().invoke(app, ["eval", "x.pth", "--corruptions", "C"])
    assert "several processes cannot share it" in str(said.exception)
