"""EMA and SWA beside the live weights: what is averaged, validated, kept, written and resumed."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from robustmail import State, fit
from robustmail.cli.main import main
from robustmail.data.dataset import to_float
from robustmail.errors import RecipeError
from robustmail.records import EpochFinished, StepFinished
from robustmail.train.run import run
from tests.train.conftest import recipe

pytestmark = pytest.mark.long
both = recipe.but(epochs=4, ema=0.9, swa=2, burn_in=0)


def epochs_of(made, state=None):
    return [record for record in fit(made, state) if isinstance(record, EpochFinished)]


def test_swa_is_the_plain_mean_of_the_weights_at_the_ends_of_its_epochs():
    state, ends = State.fresh(both), []
    for record in fit(both, state):
        if isinstance(record, EpochFinished):
            ends.append(state.model.net.linear.weight.detach().clone())
    swa = state.averages.models()["swa"].net.linear.weight
    assert torch.allclose(swa, (ends[2] + ends[3]) / 2, atol=1e-7)


def test_the_statistics_of_swa_are_those_of_all_training_images():
    made = recipe.but(model="cifar_resnet18_w8", epochs=1, swa=0, batch=1288, precision="fp32", burn_in=0)
    state = State.fresh(made)
    list(fit(made, state))
    swa = state.averages.models()["swa"]
    n = len(state.train.y)
    batches = torch.arange(n).tensor_split(-(-n // 1288))
    assert len(batches) == 1
    with torch.no_grad():
        features = swa.net.conv1(
            swa.normalize(to_float(state.train.x)) if hasattr(swa, "normalize") else to_float(state.train.x)
        )
    mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3))
    assert torch.allclose(swa.net.bn1.running_mean, mean, atol=1e-5)
    assert torch.allclose(swa.net.bn1.running_var, var, rtol=1e-4)
    assert not torch.allclose(state.model.net.bn1.running_mean, mean, atol=1e-5)


def test_every_set_of_weights_is_validated_and_the_kept_one_has_the_plain_columns():
    rows = [record.row for record in epochs_of(both)]
    assert {"val_nat", "val_rob", "val_nat_live", "val_rob_live"} <= rows[0].keys()
    assert "val_nat_ema" not in rows[0], "the EMA is the one that is kept"
    assert ["val_rob_swa" in row for row in rows] == [False, False, True, True]
    kept_swa = [record.row for record in epochs_of(both.but(select="best-swa"))]
    assert [("val_rob_ema" in row, "val_rob_swa" in row) for row in kept_swa] == [(True, False)] * 4
    assert kept_swa[3]["val_rob"] == rows[3]["val_rob_swa"]
    assert kept_swa[3]["val_rob_ema"] == rows[3]["val_rob"]


@pytest.mark.parametrize("select", ["best", "last-swa", "last-live"])
def test_a_run_that_stops_amid_swa_goes_on_to_the_same_bits(tmp_path, select):
    made = both.but(select=select)
    list(fit(made, State.fresh(made, tmp_path / "whole")))
    parts = State.fresh(made, tmp_path / "parts")
    for record in fit(made, parts):
        if isinstance(record, StepFinished) and (record.epoch, record.step) == (3, 1):
            parts.save()
            break
    again = State.fresh(made, tmp_path / "parts")
    again.load()
    list(fit(made, again))
    for name in ("best.safetensors", "last.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_run_writes_and_evaluates_the_set_that_select_names(tmp_path):
    results = {}
    for select in ("last-live", "last-swa"):
        list(run(both.but(select=select), tmp_path / select, "both"))
        results[select] = json.loads((tmp_path / select / "results.json").read_text())["training"]
    assert [r["weights"] for r in results.values()] == ["live", "swa"]
    assert (tmp_path / "last-live/last.safetensors").read_bytes() != (
        tmp_path / "last-swa/last.safetensors"
    ).read_bytes()
    with open(tmp_path / "last-swa" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[3]["val_rob_live"]
    assert rows[3]["val_rob_ema"]


@pytest.mark.parametrize(("changes", "wrong"), [
    ({"select": "best-ema"}, "the recipe has no ema"),
    ({"select": "last-swa", "ema": 0.9}, "the recipe has no swa"),
    ({"swa": 2}, "averaging would begin after the last epoch"),
    ({"swa": -1}, "swa must be at least 0"),
    ({"keep_every": 0}, "keep_every must be at least 1"),
    ({"select": "best-emma"}, "select must be"),
    ({"validate": ("pgd2", "pgd2")}, "an attack is named twice"),
    ({"validate": ()}, "names no attack"),
])  # fmt: skip
def test_a_choice_that_the_recipe_cannot_keep_is_refused(changes, wrong):
    with pytest.raises(RecipeError, match=wrong):
        recipe.but(**changes)


def test_several_attacks_validate_in_turn_and_the_worst_counts():
    one = epochs_of(recipe.but(epochs=1))[0].row["val_rob"]
    other = epochs_of(recipe.but(epochs=1, validate="cw"))[0].row["val_rob"]
    worst = epochs_of(recipe.but(epochs=1, validate=("pgd2", "cw")))[0].row["val_rob"]
    assert worst <= min(one, other)


def test_kept_epochs_change_no_bit_and_can_be_evaluated(tmp_path, monkeypatch, capsys):
    made = recipe.but(epochs=3, evaluate=("nat",))
    list(run(made.but(keep_every=2), tmp_path / "kept", "made"))
    list(run(made, tmp_path / "plain", "made"))
    names = sorted(path.name for path in (tmp_path / "kept").glob("epoch-*"))
    assert names == ["epoch-0002.safetensors"]
    assert (tmp_path / "kept/last.safetensors").read_bytes() == (tmp_path / "plain/last.safetensors").read_bytes()
    list(run(made, tmp_path / "kept", "made"))  # the same run, though it keeps no epochs now
    monkeypatch.chdir(tmp_path)

    def eval_epoch(epoch):
        monkeypatch.setattr("sys.argv", ["robustmail", "eval", "kept", "--epoch", epoch, "--attacks", "nat", "--n", "20",
                                         "--plain"])  # fmt: skip
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code or 0, capsys.readouterr()

    assert eval_epoch("2")[0] == 0
    code, said = eval_epoch("3")
    assert code == 2
    assert "no weights of this epoch: kept are 2" in said.err
    list(run(made, tmp_path / "kept", "made", fresh=True))
    assert not list((tmp_path / "kept").glob("epoch-*"))
