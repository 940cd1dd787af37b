"""The plan for a GPU: what is finished is skipped, what fails stops only what needs it; the commands are real ones."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from robustmail.bench import plan_measurements
from robustmail.bench.perform_plan import check_device, is_finished, perform, result_path
from robustmail.bench.plan import CHECKOUT, DEVICE_TESTS, METHODS, PlanStep, plan_steps
from robustmail.catalog import recipe_files
from robustmail.cli import main
from robustmail.errors import DeviceError


def writes(folder: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> PlanStep:
    measured = folder / "work" / f"{name}.json"
    return PlanStep(name, "about it", ("-c", code.replace("OUT", repr(str(measured)))), measured, "Mend it.", needs)


GOOD = "import json; json.dump({'n': 3}, open(OUT, 'w'))"


def test_a_failed_step_stops_only_those_that_need_it_and_the_rest_is_not_done_again(tmp_path: Path):
    steps = [writes(tmp_path, "first", GOOD), writes(tmp_path, "bad", "raise SystemExit('disk full')"),
             writes(tmp_path, "after", GOOD, needs=("bad",)), writes(tmp_path, "other", GOOD)]  # fmt: skip
    said: list[str] = []
    assert not perform(steps, tmp_path, "cpu", said.append)
    assert [is_finished(tmp_path, step) for step in steps] == [True, False, False, True]
    text = "\n".join(said)
    assert "disk full" in text
    assert "Mend it." in text
    assert "after: left out, for it needs bad" in text
    kept = json.loads(result_path(tmp_path, steps[0]).read_text())
    assert kept["measured"] == {"n": 3}
    assert set(kept["provenance"]) >= {"versions", "commit", "hardware"}

    steps[1] = writes(tmp_path, "bad", GOOD)
    said.clear()
    assert perform(steps, tmp_path, "cpu", said.append)
    assert "first: finished before" in "\n".join(said)
    assert not is_finished(tmp_path, dataclasses.replace(steps[0], words=("-c", "another command")))


def test_a_step_that_leaves_nothing_is_not_finished(tmp_path: Path):
    said: list[str] = []
    assert not perform([writes(tmp_path, "empty", "pass")], tmp_path, "cpu", said.append)
    assert "cannot be read" in "\n".join(said)


def test_a_cpu_is_refused_unless_it_is_named_and_the_plan_small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu", small=True)
    for device, small in (("cpu", False), ("auto", True), ("auto", False)):
        with pytest.raises(DeviceError, match="Add --device cpu --small"):
            check_device(device, small)


@pytest.mark.parametrize("small", [False, True])
def test_the_dry_run_prints_every_step_and_writes_nothing(small: bool, tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "plan"
    words = ["bench", "--paper", "--dry-run", "--out", str(folder), *(["--small"] if small else [])]
    monkeypatch.setattr(sys, "argv", ["robustmail", *words])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert not end.value.code
    said = capsys.readouterr().out
    steps = plan_steps(folder, "auto", small)
    assert all(step.command in said and str(result_path(folder, step)) in said for step in steps)
    assert not folder.exists()
    needed = [name for step in steps for name in step.needs]
    assert set(needed) == set(METHODS) <= {step.name for step in steps}


def test_verbs_recipes_and_tests_of_the_plan_exist():
    verbs = main.typer.main.get_command(main.app).commands
    for small in (False, True):
        for step in plan_steps(Path("plan"), "cpu", small):
            if step.words[1] == "robustmail":
                assert step.words[2] in verbs
            if step.words[2] == "run":
                assert step.words[3] in recipe_files()
    assert all((CHECKOUT / test).exists() for test in DEVICE_TESTS)


@pytest.mark.long
def test_the_device_measurements_are_numbers(monkeypatch):
    monkeypatch.setattr(plan_measurements, "REPEATS", 1)
    monkeypatch.setenv(plan_measurements.SWITCH, "1")
    cpu = torch.device("cpu")
    graphs = plan_measurements.compare_graphs("small_cnn", 2, cpu)
    assert (graphs["logits"], graphs["gradients"]) == (0, 0), "on a CPU there are no graphs"
    profile = plan_measurements.profile_step("small_cnn", 2, cpu)
    assert any("conv" in row["name"] for row in profile["operators"])
