"""The loop as a notebook sees it: records, metrics, the non-finite guard, the run folder."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from rich.console import Console

from robustmail import (
    AT,
    AWP,
    PGD,
    SGD,
    Cosine,
    Cyclic,
    Sigmoid,
    Stairs,
    State,
    fit,
    load_data,
    reproduce,
    torchattack,
)  # fmt: skip
from robustmail.data.image_files import data_fingerprint
from robustmail.errors import NonFiniteError, RecipeError, RunError
from robustmail.records import AttackResult, EpochFinished, Forecast, RunFinished, RunStarted, StepFinished
from robustmail.report.log_lines import log_line
from robustmail.report.page import write_page
from robustmail.report.tables import run_table
from robustmail.train.loop import worse
from robustmail.train.metrics import weight_stats
from robustmail.train.run import run, status
from robustmail.train.train_step import train_step
from tests.train.conftest import Poison, Root, recipe

pytestmark = pytest.mark.long


def test_fit_yields_records_and_learns_without_touching_the_callers_generator():
    before = torch.get_rng_state()
    records = list(fit(recipe.but(epochs=3)))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(records[0], RunStarted)
    steps = [r for r in records if isinstance(r, StepFinished)]
    epochs = [r for r in records if isinstance(r, EpochFinished)]
    assert (len(steps), len(epochs)) == (9, 3)
    assert sum(isinstance(r, Forecast) for r in records) == 1
    assert epochs[-1].row["train_loss"] < epochs[0].row["train_loss"]
    assert [e.row["lr"] for e in epochs] == [0.1, 0.05, 0.05]
    assert [e.row["weights"] for e in epochs] == ["off", "on", "on"]
    assert steps[0].weights is None
    assert 0 < steps[-1].weights.ess <= 1
    assert sum(steps[0].histogram) == steps[0].images == 512


def test_the_same_recipe_gives_the_same_run_and_another_seed_another():
    def losses(made):
        return [r.loss for r in fit(made) if isinstance(r, StepFinished)]

    assert losses(recipe) == losses(recipe)
    assert losses(recipe) != losses(recipe.but(seed=2))


def test_a_smooth_learning_rate_moves_within_an_epoch_and_stairs_do_not():
    rates = [r.lr for r in fit(recipe.but(optimizer=SGD(lr=Cosine(high=0.1, epochs=2)))) if isinstance(r, StepFinished)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    rates = [
        r.lr
        for r in fit(recipe.but(optimizer=SGD(lr=Cyclic(high=0.1, peak=1, epochs=2))))
        if isinstance(r, StepFinished)
    ]
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1, 0.2 / 3, 0.1 / 3])
    assert [r.lr for r in fit(recipe) if isinstance(r, StepFinished)] == [0.1] * 3 + [0.05] * 3


@pytest.mark.parametrize("changes", [{"ema": 0.3}, {"ema": 0.9999, "perturbation": AWP(gamma=0.1)}])
def test_an_average_of_the_weights_is_what_is_kept_and_it_survives_an_interruption(tmp_path, changes):
    made = recipe.but(**changes)
    whole = State.fresh(made, tmp_path / "made" / "whole")
    parts = State.fresh(made, f"{tmp_path}/made/parts")
    average, t = initial_weights(made), 0
    for record in fit(made, whole):
        if isinstance(record, StepFinished):  # the definition, beside timm's; of the weights as AWP leaves them
            decay = min(made.ema, (1 + t) / (10 + t))
            average, t = average * decay + whole.model.net.linear.weight.detach() * (1 - decay), t + 1
    assert torch.allclose(whole.eval_model.net.linear.weight, average, atol=1e-6)
    assert not torch.equal(whole.eval_model.net.linear.weight, whole.model.net.linear.weight)
    for record in fit(made, parts):
        if isinstance(record, StepFinished) and record.epoch == 1:
            parts.save()
            break
    again = State.fresh(made, tmp_path / "made" / "parts")
    again.load()
    list(fit(made, again))
    for name in ("last.safetensors", "metrics.csv"):
        whole_bytes, parts_bytes = ((tmp_path / "made" / f / name).read_bytes() for f in ("whole", "parts"))
        assert whole_bytes == parts_bytes
    assert torch.equal(whole.eval_model.net.linear.weight, again.eval_model.net.linear.weight)


def test_an_average_has_the_live_statistics_of_batchnorm_and_counts_its_batches():
    made = recipe.but(ema=0.9, model="cifar_resnet18_w8", epochs=1, batch=1024, precision="fp32")
    state = State.fresh(made)
    (epoch,) = [record for record in fit(made, state) if isinstance(record, EpochFinished)]
    live, kept = dict(state.model.named_buffers()), dict(state.eval_model.named_buffers())
    assert {tensor.is_floating_point() for tensor in live.values()} == {True, False}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in live.items())
    assert not torch.equal(next(state.model.parameters()), next(state.eval_model.parameters()))
    assert {"val_nat_live", "val_rob_live"} < epoch.row.keys()


def test_a_run_without_an_average_has_no_columns_of_it():
    (epoch,) = [record for record in fit(recipe.but(epochs=1)) if isinstance(record, EpochFinished)]
    assert not [name for name in epoch.row if name.endswith("_live")]
    assert not epoch.note


def test_an_average_that_is_clearly_worse_than_the_live_weights_is_told_so_with_both_numbers():
    row = {"epoch": 0, "val_nat": 0.089, "val_nat_live": 0.964, "val_rob": 0.08, "val_rob_live": 0.09}
    said = worse(row, 150)
    assert "validation natural 8.9 % against 96.4 %, robust 8.0 % against 9.0 %" in said
    assert said in log_line(EpochFinished(row | {"train_loss": 1.0}, False, said))
    assert said in log_line(RunFinished("runs/x", (), "best.safetensors", 0, note=said))
    assert worse(row | {"val_nat": 0.95}, 150) == ""  # within chance
    assert worse({name: row[name] for name in ("epoch", "val_nat", "val_rob")}, 150) == ""


def initial_weights(made):
    return State.fresh(made).model.net.linear.weight.detach().clone()


def test_awp_trains_inside_the_loop():
    rows = [r.row for r in fit(recipe.but(perturbation=AWP(gamma=0.01))) if isinstance(r, EpochFinished)]
    plain = [r.row for r in fit(recipe) if isinstance(r, EpochFinished)]
    assert rows[-1]["train_loss"] != plain[-1]["train_loss"]


def test_training_accuracy_on_natural_images_is_known_for_objectives_that_do_not_look_at_them():
    row = next(r.row for r in fit(recipe.but(objective=AT(), epochs=1, burn_in=0)) if isinstance(r, EpochFinished))
    assert 0 <= row["train_nat"] <= 1


def test_a_plain_term_that_is_a_number_is_told_as_that_number():
    made = recipe.but(objective=AT(), margin=None, weighter=None, burn_in=0, epochs=1)
    records = list(fit(made))
    assert {r.plain for r in records if isinstance(r, StepFinished)} == {0.0}
    assert next(r.row for r in records if isinstance(r, EpochFinished))["train_plain"] == 0.0


def test_weight_statistics_have_their_closed_form():
    weights = torch.ones(100)
    weights[:3] = 34.0
    right = torch.arange(100) >= 50
    stats = weight_stats(weights, torch.ones(100), right)
    closed = (97 + 102) ** 2 / (97 + 3 * 34**2) / 100, 102 / 199, 1.0, (47 + 102) / 50
    assert [s.item() for s in stats] == pytest.approx(closed)


def test_a_mean_weight_of_none_is_not_a_number_and_no_weight_at_all_has_no_sample_size():
    ess, top, of_right, of_wrong = weight_stats(torch.zeros(4), torch.ones(4), torch.ones(4, dtype=torch.bool))
    assert (ess.item(), top.item(), of_right.item()) == (0, 0, 0)
    assert math.isnan(of_wrong)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_dump_that_reproduces_it(tmp_path):
    made = recipe.but(margin=Poison(), burn_in=0)
    state = State.fresh(made, tmp_path)
    before = {}
    with pytest.raises(
        NonFiniteError, match=r"epoch 1, step 3 \(training images .*first in the margin Poison.*logarithm"
    ):
        for record in fit(made, state):
            if isinstance(record, StepFinished):
                before = {name: value.clone() for name, value in state.model.state_dict().items()}
    after = state.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the poisoned step left a mark"
    assert not torch.isfinite(torch.tensor(reproduce(tmp_path / "nonfinite.pt", made)))
    dump = torch.load(tmp_path / "nonfinite.pt", weights_only=True)
    assert (dump["epoch"], dump["step"], len(dump["indices"])) == (0, 2, len(dump["y"]))


def test_an_exploding_learning_rate_is_stopped_too(tmp_path):
    made = recipe.but(optimizer=SGD(lr=1e30), margin=None, weighter=None, burn_in=0, epochs=5)
    with pytest.raises(NonFiniteError, match="step"):
        list(run(made, tmp_path / "run", "boom"))
    assert (tmp_path / "run" / "state.pt").exists()
    with pytest.raises(NonFiniteError):
        reproduce(tmp_path / "run" / "nonfinite.pt", made)


def test_a_run_folder_holds_what_it_promises(tmp_path):
    folder = tmp_path / "run"
    records = list(run(recipe.but(evaluate=("nat", "pgd2")), folder, "name"))
    assert isinstance(records[-1], RunFinished)
    results = json.loads((folder / "results.json").read_text())
    assert [set(row) for row in results["attacks"]] == [
        {"name", "correct", "n", "accuracy", "low", "high", "seconds", "settings", "stages"}
    ] * 2
    assert results["attacks"][0]["n"] == 100
    assert set(results["provenance"]) >= {"versions", "commit", "seed", "hardware", "recipe"}
    assert results["attacks"] == [r.__dict__ for r in records if isinstance(r, AttackResult)]
    with open(folder / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    from safetensors import safe_open

    with safe_open(folder / "best.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["robustmail"])
    assert (facts["model"], facts["classes"], facts["eps"], facts["normalize"]) == ("small_cnn", 10, 0.1, None)
    console = Console(width=100, record=True)
    console.print(run_table(records[-1]))
    shown = console.export_text()
    assert "worst case" in shown
    assert f"light: {results['believable']['light']}" in shown


def test_a_finished_run_says_so_and_another_recipe_is_refused_by_its_fields(tmp_path):
    folder = tmp_path / "run"
    list(run(recipe, folder, "name"))
    again = list(run(recipe, folder, "name"))
    assert len(again) == 1
    assert again[0].before
    with pytest.raises(RunError, match=r"another recipe \(weighter.slope: 2.0 there, 3.0 here\)"):
        list(run(recipe.but(weighter=Sigmoid(slope=3.0, bias=0.0)), folder, "name"))
    assert status(recipe.but(device="cpu"), folder) == "finished", "a run may go on elsewhere"


def test_fresh_never_deletes_an_unfinished_run_without_yes(tmp_path):
    folder = tmp_path / "run"
    for record in run(recipe, folder, "name"):
        if isinstance(record, EpochFinished):
            break
    with pytest.raises(RunError, match="not finished"):
        status(recipe, folder, fresh=True)
    assert status(recipe, folder, fresh=True, yes=True) == "replace"
    assert status(recipe, folder) == "continue"


def test_other_things_in_a_folder_stop_no_run_and_stay(tmp_path):
    others = {"thesis.tex", ".DS_Store", "nohup.out", "slurm-7.out"}
    for name in others:
        (tmp_path / name).write_text("years of work")
    list(run(recipe, tmp_path, "name"))
    write_page(tmp_path)
    assert status(recipe, tmp_path) == "finished"
    list(run(recipe, tmp_path, "name", fresh=True))
    assert not (tmp_path / "report.html").exists()
    assert {name for name in others if (tmp_path / name).read_text() == "years of work"} == others


@pytest.mark.parametrize("sign", ["ledger.csv", "margins.json"])
def test_a_run_does_not_go_where_another_kind_of_result_lies(tmp_path, sign: str):
    for name in (sign, "results.json", "lock"):
        (tmp_path / name).touch()
    for fresh in (False, True):
        with pytest.raises(RunError, match=rf"is no run's: it holds {sign}"):
            list(run(recipe, tmp_path, "name", fresh=fresh, yes=True))
    assert {p.name for p in tmp_path.iterdir()} == {sign, "results.json", "lock"}


def test_a_recipe_that_lies_in_the_folder_of_its_run_is_refused_and_stays(tmp_path):
    for name in ("recipe.py", "log.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=r"holds log.txt, recipe.py, which would be overwritten, but no run"):
        list(run(recipe, tmp_path, "name", tmp_path / "recipe.py"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "recipe.py"]


def test_a_start_that_was_cut_short_anywhere_is_begun_again(tmp_path):
    folder = tmp_path / "run"
    list(run(recipe, folder, "name"))
    (folder / "state.pt").unlink()  # --fresh takes this away first; then it was killed
    (folder / "recipe.json.robustmail-a1b2c3d4.tmp").write_text("half")
    assert status(recipe, folder) == "new"
    records = list(run(recipe.but(seed=5), folder, "name"))
    assert not records[-1].before
    assert not list(folder.glob("*.tmp"))


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    list(run(recipe, folder, "name"))
    kept = (folder / "results.json").read_bytes()
    seen = iter(["continue", "finished"])  # what the folder looked like before and after loading the data
    monkeypatch.setattr("robustmail.train.run.status", lambda *_: next(seen))
    assert [r.before for r in run(recipe, folder, "name")] == [True]
    assert (folder / "results.json").read_bytes() == kept


def test_a_budget_that_grows_is_validated_and_evaluated_at_its_last_value(tmp_path):
    made = recipe.but(attack=PGD(eps=Stairs({0: 0.001, 1: 0.2}), alpha=0.05, steps=2), evaluate=("pgd2",))
    assert made.budget == 0.2
    records = list(run(made, tmp_path / "run", "name"))
    (settings,) = [r.settings["pgd2"] for r in records if isinstance(r, AttackResult) and r.name == "pgd2"]
    assert "eps=0.2," in settings


@pytest.mark.parametrize(
    "attack",
    [PGD(eps=0.5, alpha=0.2, steps=2, norm="l2"), torchattack("PGDL2", eps=0.5, alpha=0.2, steps=2)],
    ids=["ours", "torchattacks"],
)
def test_a_recipe_in_l2_is_validated_and_evaluated_in_l2(attack, tmp_path):
    records = list(run(recipe.but(attack=attack, evaluate=("pgd2", "cw")), tmp_path / "run", "name"))
    settings = {r.name: str(r.settings) for r in records if isinstance(r, AttackResult)}
    assert "PGD(eps=0.5," in settings["pgd2"]
    assert "norm='l2'" in settings["pgd2"]
    assert "norm='l2'" in settings["cw"]


def test_every_field_of_the_optimiser_follows_its_schedule():
    made = recipe.but(optimizer=SGD(lr=0.1, weight_decay=Stairs({0: 0.0, 1: 0.1})))
    state = State.fresh(made)
    seen = [state.optimizer.param_groups[0]["weight_decay"] for r in fit(made, state) if isinstance(r, StepFinished)]
    assert seen == [0.0] * 3 + [0.1] * 3


@pytest.mark.parametrize("field", ["batch", "epochs", "burn_in", "seed", "test_size", "validate", "optimizer", "eps"])
def test_what_cannot_change_with_the_epoch_says_so(field):
    with pytest.raises(RecipeError, match=f"{field} cannot change with the epoch"):
        recipe.but(**{field: Stairs({0: 1})})


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path):
    made = recipe.but(objective=Root(), margin=None, weighter=None, burn_in=0)
    state = State.fresh(made, tmp_path)
    before = {}
    with pytest.raises(NonFiniteError, match=r"step 3 .*the gradient is not finite"):
        for record in fit(made, state):
            if isinstance(record, StepFinished):
                before = {name: value.clone() for name, value in state.model.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in state.model.state_dict().items())


def test_attack_and_update_draw_from_generators_of_their_own(small, batch):
    drawn = []

    def noisy(model, x, y):
        drawn.append(torch.rand(3))
        return x

    def objective(step):
        drawn.append(torch.rand(3))
        return AT()(step)

    train_step(recipe.but(attack=noisy, objective=objective, eps=0.1).at(0), small, *batch, (0, 0))
    assert not torch.equal(*drawn)


def test_weights_are_readable_for_whom_everything_else_is(tmp_path):
    State.fresh(recipe, tmp_path).write_weights("last")
    (tmp_path / "plain").touch()
    assert (tmp_path / "last.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_weights_that_are_missing_are_one_error(tmp_path):
    with pytest.raises(RunError, match=r"best.safetensors: cannot be read"):
        State.fresh(recipe, tmp_path).read_weights("best")


def test_a_run_and_an_evaluation_of_the_same_images_say_so_in_the_same_words(tmp_path):
    list(run(recipe.but(epochs=1), tmp_path / "run", "name"))
    said = json.loads((tmp_path / "run" / "results.json").read_text())["provenance"]["data"]["fingerprint"]
    assert said == data_fingerprint(load_data("digits()").first(recipe.test_size).part)
    assert said != data_fingerprint(load_data("digits()").first(recipe.test_size - 1).part)


def test_weights_chosen_from_the_burn_in_are_said_to_be_so(tmp_path):
    for select, noted in (("best", True), ("last", False)):
        made = recipe.but(select=select, optimizer=SGD(lr=Stairs({0: 0.1, 1: 0.0})), test_size=20)  # the first is best
        done = list(run(made, tmp_path / select, "name"))[-1]
        assert (done.epoch, done.burn_in) == (0 if noted else 1, 1)
        assert ("lies in the burn-in of 1 epoch" in log_line(done)) == noted


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    state = State.fresh(recipe, tmp_path)
    state.save()
    state.images.__dict__["fingerprint"] = "another"
    with pytest.raises(RunError, match="the data have changed"):
        state.load()


def test_a_kill_between_the_state_and_its_table_leaves_no_gap(tmp_path):
    state = State.fresh(recipe, tmp_path)
    list(fit(recipe, state))
    table = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").unlink()
    State.fresh(recipe, tmp_path).load()
    assert (tmp_path / "metrics.csv").read_bytes() == table


def test_a_damaged_state_is_one_error(tmp_path):
    state = State.fresh(recipe, tmp_path)
    state.save()
    path = tmp_path / "state.pt"
    for content in (path.read_bytes()[:1000], b"garbage", b""):
        path.write_bytes(content)
        with pytest.raises(RunError, match="damaged"):
            state.load()
