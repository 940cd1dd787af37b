"""EMA and SWA beside the live weights: what is averaged, validated, kept, written and resumed."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
import torch

from robustmail import State, digits, evaluate, fit, subset
from robustmail.cli.main import main
from robustmail.config.overrides import apply_overrides
from robustmail.data.dataset import to_float
from robustmail.errors import RecipeError, RunError
from robustmail.records import EpochFinished, Forecast, StepFinished
from robustmail.train import loop
from robustmail.train.loop import worse
from robustmail.train.run import run, status
from tests.train.conftest import recipe

pytestmark = pytest.mark.long
small = recipe.but(
    data=subset(digits(validation=40), train=200),
    batch=64,
    test_size=20,
    evaluate=("nat",),
    burn_in=0,
    precision="fp32",
)
both = small.but(epochs=4, ema=0.9, swa=2)


def rows_of(made, state=None):
    return [record.row for record in fit(made, state) if isinstance(record, EpochFinished)]


def test_swa_is_the_plain_mean_of_the_weights_at_the_ends_of_its_epochs():
    made = both.but(epochs=5)
    state = State.fresh(made)
    ends = [
        [parameter.detach().clone() for parameter in state.model.parameters()]
        for record in fit(made, state)
        if isinstance(record, EpochFinished)
    ]
    for average, *weights in zip(state.averages.models()["swa"].parameters(), *ends[2:], strict=True):
        assert torch.allclose(average, sum(weights) / 3, atol=1e-6)
        assert not torch.allclose(average, weights[-1], atol=1e-6)


@pytest.mark.parametrize("batch", [160, 50])
def test_the_statistics_of_swa_are_the_means_over_all_training_images(batch):
    made = small.but(model="cifar_resnet18_w8", epochs=1, swa=0, batch=batch)
    state = State.fresh(made)
    rows_of(made, state)
    swa, n = state.averages.models()["swa"], len(state.train.y)
    with torch.no_grad():
        parts = [swa.net.conv1(to_float(x)) for x in state.train.x.tensor_split(-(-n // batch))]
    assert len(parts) == -(-n // batch)
    for statistic, of in ((swa.net.bn1.running_mean, torch.mean), (swa.net.bn1.running_var, torch.var)):
        expected = torch.stack([of(part, dim=(0, 2, 3)) for part in parts]).mean(0)
        assert torch.allclose(statistic, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(swa.net.bn1.running_mean, state.model.net.bn1.running_mean, rtol=1e-3)


def test_averages_leave_no_trace_in_the_live_model():
    ends = {}
    for name, made in {"none": small, "both": small.but(ema=0.9, swa=0)}.items():
        made = made.but(model="cifar_resnet18_w8")
        state = State.fresh(made)
        torch.manual_seed(5)
        rows_of(made, state)
        ends[name] = [*state.model.state_dict().values(), torch.rand(3)]
    assert all(map(torch.equal, ends["none"], ends["both"]))


def test_every_set_of_weights_is_validated_and_the_kept_one_has_the_plain_columns():
    rows = rows_of(both)
    assert {"val_nat", "val_rob", "val_nat_live", "val_rob_live"} <= rows[0].keys()
    assert "val_nat_ema" not in rows[0], "the EMA is the one that is kept"
    assert ["val_rob_swa" in row for row in rows] == [False, False, True, True]
    kept_swa = rows_of(both.but(select="best-swa"))
    assert [("val_rob_ema" in row, "val_rob_swa" in row) for row in kept_swa] == [(True, False)] * 4
    assert kept_swa[3]["val_rob"] == rows[3]["val_rob_swa"]
    assert kept_swa[3]["val_rob_ema"] == rows[3]["val_rob"]


def test_without_a_suffix_ema_is_kept_else_swa_else_the_live_weights():
    assert [made.kept_weights for made in (both, small.but(swa=1), small)] == ["ema", "swa", "live"]
    assert both.but(select="last-live").kept_weights == "live"
    assert both.but(select="last-swa").kept_epoch == "last"


def test_the_best_epoch_of_swa_is_one_that_has_an_swa(monkeypatch, tmp_path):
    scores = iter([0.9, 0.8, 0.2, 0.1])  # of what is kept; the live weights before the SWA are the better ones
    kept = {}

    def validate(recipe, state, model):
        if state.epoch not in kept and model is state.eval_model:
            kept[state.epoch] = next(scores)
        return {"val_nat": 1.0, "val_rob": kept[state.epoch] if model is state.eval_model else 0.0}

    monkeypatch.setattr(loop, "_validate", validate)
    state = State.fresh(small.but(epochs=4, swa=2), tmp_path)
    rows_of(state.recipe, state)
    assert (state.best, state.best_epoch) == (0.2, 2)


def test_the_warning_names_the_set_that_is_kept():
    row = {"val_nat": 0.1, "val_nat_live": 0.9, "val_rob": 0.1, "val_rob_live": 0.2}
    assert "(ema)" in worse(row, 150, "ema")
    assert "Lower ema" in worse(row, 150, "ema")
    assert "(swa)" in worse(row, 150, "swa")
    assert "Begin swa later" in worse(row, 150, "swa")


@pytest.mark.parametrize("select", ["best", "last-swa", "last-live"])
def test_a_run_that_stops_amid_swa_goes_on_to_the_same_bits(tmp_path, select):
    made = both.but(select=select)
    rows_of(made, State.fresh(made, tmp_path / "whole"))
    parts = State.fresh(made, tmp_path / "parts")
    for record in fit(made, parts):
        if isinstance(record, StepFinished) and (record.epoch, record.step) == (3, 1):
            parts.save()
            break
    again = State.fresh(made, tmp_path / "parts")
    again.load()
    assert (again.epoch, again.step) != (0, 0)
    rows_of(made, again)
    for name in ("best.safetensors", "last.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_state_without_its_averages_is_damaged_and_one_of_an_older_format_is_said_to_be_old(tmp_path):
    state = State.fresh(both, tmp_path)
    state.save()
    path = tmp_path / "state.pt"
    content = torch.load(path, weights_only=True)
    for change, wrong in (
        ({"averages": {}}, "damaged"),
        ({"averages": [1]}, "damaged"),
        ({"format": 1}, "has format 1"),
    ):
        torch.save(content | change, path)
        with pytest.raises(RunError, match=wrong):
            state.load()


def test_a_run_writes_and_evaluates_the_set_that_select_names(tmp_path):
    training = {}
    for select in ("last-live", "last-swa"):
        list(run(both.but(select=select), tmp_path / select, "both"))
        training[select] = json.loads((tmp_path / select / "results.json").read_text())["training"]
    assert [made["weights"] for made in training.values()] == ["live", "swa"]
    live, swa = ((tmp_path / select / "last.safetensors").read_bytes() for select in training)
    assert live != swa
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


def test_the_command_line_takes_one_attack_of_validation_or_several():
    texts = ("validate=cw", "validate=pgd10,cw", "validate=cw-art,apgd-t")
    given = [apply_overrides(recipe, [text]).validate for text in texts]
    assert given == ["cw", ("pgd10", "cw"), ("cw-art", "apgd-t")]


def test_several_attacks_validate_in_turn_and_the_worst_counts(monkeypatch):
    attacked = []
    true = loop.evaluate_attacks

    def counted(model, part, specs, seed):
        for record in true(model, part, specs, seed):
            yield record
        attacked.append((list(specs[-1].stages), record.settings.get("standing", "")))

    monkeypatch.setattr(loop, "evaluate_attacks", counted)
    one, other, worst = (
        rows_of(small.but(epochs=1, validate=validate))[0]["val_rob"] for validate in ("pgd2", "cw", ("pgd2", "cw"))
    )
    assert worst <= min(one, other)
    stages, standing = attacked[-1]
    assert stages == ["pgd2", "cw"]
    assert f"{round(one * 40)} after pgd2, {round(worst * 40)} after cw" in standing


def test_an_image_is_robust_in_validation_if_no_attack_alone_breaks_it():
    made = small.but(epochs=3)
    state = State.fresh(made)
    rows_of(made, state)
    x, y = to_float(state.validation.x), state.validation.y
    stands = {}
    for name in ("pgd2", "cw"):
        alone = evaluate(state.model, (x, y), name, small.budget, small.norm, seed=small.seed)
        stands[name] = alone.ledger.standing([name])
    both_stand = stands["pgd2"] & stands["cw"]
    assert both_stand.sum() < stands["pgd2"].sum(), "the second attack breaks nothing, so nothing is tested"
    for validate in (("pgd2", "cw"), ("cw", "pgd2")):
        score = loop._validate(small.but(validate=validate), state, state.model)["val_rob"]
        assert score == pytest.approx(both_stand.double().mean().item())


def test_the_statistics_of_frozen_layers_stay_in_swa():
    made = small.but(model="cifar_resnet18_w8", epochs=1, swa=0, freeze=("bn1.*",))
    state = State.fresh(made)
    norm = state.model.net.bn1
    norm.running_mean.fill_(0.25)  # not what a reset leaves
    norm.running_var.fill_(2.0)
    rows_of(made, state)
    frozen, trained = (state.averages.models()["swa"].net.get_submodule(name) for name in ("bn1", "layer1.0.bn1"))
    assert torch.equal(frozen.running_mean, torch.full_like(frozen.running_mean, 0.25))
    assert torch.equal(frozen.running_var, torch.full_like(frozen.running_var, 2.0))
    assert not torch.equal(trained.running_mean, state.model.net.layer1[0].bn1.running_mean)


def test_the_forecast_counts_the_validations_of_every_set_in_the_epochs_that_have_it():
    def seconds(**changes):
        forecaster = loop._Forecaster(made := small.but(epochs=4, **changes), State.fresh(made))
        step = partial(StepFinished, **dict.fromkeys(StepFinished.__dataclass_fields__, 0))
        records = [forecaster.tick(step(seconds=1.0, images=64)) for _ in range(6)]
        (forecast,) = [record for record in records if isinstance(record, Forecast)]
        return forecast.training

    live, ema, swa, late = seconds(), seconds(ema=0.9), seconds(swa=0), seconds(swa=3)
    assert live < late < ema < swa  # the SWA passes the training images, too
    assert swa - live == pytest.approx(4 * (late - live))
    assert seconds(validate=("pgd2", "cw")) > seconds(validate="cw") > live


def test_kept_epochs_change_no_bit_and_can_be_evaluated(tmp_path, monkeypatch, capsys):
    made = small.but(epochs=3)
    list(run(made.but(keep_every=2), tmp_path / "kept", "made"))
    list(run(made, tmp_path / "plain", "made"))
    names = sorted(path.name for path in (tmp_path / "kept").glob("epoch-*"))
    assert names == ["epoch-0002.safetensors"]
    assert (tmp_path / "kept/last.safetensors").read_bytes() == (tmp_path / "plain/last.safetensors").read_bytes()
    assert status(made, tmp_path / "kept") == "finished", "the same run, though it keeps no epochs now"
    monkeypatch.chdir(tmp_path)

    def eval_epoch(run, epoch):
        words = ["robustmail", "eval", run, "--epoch", epoch, "--attacks", "nat", "--n", "20", "--plain"]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code or 0, capsys.readouterr().err

    assert eval_epoch("kept", "2")[0] == 0
    assert [eval_epoch(run, "3")[0] for run in ("kept", "plain", "nowhere")] == [2, 2, 2]
    assert "no weights of this epoch: kept are 2" in eval_epoch("kept", "3")[1]
    (tmp_path / "kept" / "epoch-0001.safetensors").symlink_to(tmp_path / "plain" / "last.safetensors")
    code, wrong = eval_epoch("kept", "1")
    assert code == 2
    assert "symbolic link that leads out" in wrong
    list(run(made, tmp_path / "kept", "made", fresh=True))
    assert not list((tmp_path / "kept").glob("epoch-*"))
    assert (tmp_path / "plain" / "last.safetensors").exists()


def test_weights_of_an_epoch_that_are_no_runs_are_not_overwritten(tmp_path):
    (tmp_path / "epoch-0010.safetensors").write_text("mine")
    with pytest.raises(RunError, match=r"holds epoch-0010.safetensors, which would be overwritten"):
        status(small, tmp_path)
