"""A run may start from the weights of a file: they are loaded strictly, all but a head, and belong to the run."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustmail import AT, PGD, SGD, State, fit
from robustmail.cli.main import main
from robustmail.config.overrides import apply_overrides
from robustmail.errors import ModelError, RunError, Stopped
from robustmail.models.classifier import build
from robustmail.recipe import Recipe
from robustmail.records import RunFinished, RunStarted, StepFinished
from robustmail.runtime.signals import Signals
from robustmail.train.run import run, status
from robustmail.trials.fork import fork
from tests.train.conftest import recipe

SHORT = recipe.but(
    epochs=1, batch=1024, attack=PGD(eps=0.1, alpha=0.1, steps=1), objective=AT(), optimizer=SGD(lr=0.05),
    weighter=None, margin=None, burn_in=0, validate="nat", evaluate=("nat",), test_size=20,
)  # fmt: skip


def state_dict(classes: int = 10, model: str = "small_cnn") -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    tensors = build(model, classes, 1).net.state_dict()
    return {k: torch.rand(t.shape) if t.is_floating_point() else t for k, t in tensors.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(state_dict(), tmp_path / "at.pth")
    return tmp_path / "at.pth"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of a network's tensors that are equal to a file's."""
    own = getattr(model, "net", model).state_dict()
    return [name for name, tensor in tensors.items() if tensor.shape == own[name].shape and tensor.equal(own[name])]


def wrapped(form: str, path: Path) -> str:
    tensors = state_dict()
    if form == "safetensors":
        save_file(tensors, path / "w.safetensors")
        return str(path / "w.safetensors")
    if form == "folder":
        save_file(tensors, path / "model.safetensors")
        return str(path)
    contents = {
        "DataParallel": {"state_dict": {f"module.{k}": t for k, t in tensors.items()}, "epoch": 3},
        "average": {"model": state_dict(model="small_cnn") | {"linear.bias": torch.zeros(10)}, "ema": tensors},
        "normalisation": {"mean": torch.rand(1), "std": torch.rand(1) + 1, **{f"1.{k}": t for k, t in tensors.items()}},
        "half": {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()},
    }
    torch.save(contents[form], path / "w.pt")
    return str(path / "w.pt")


@pytest.mark.parametrize("form", ["safetensors", "folder", "DataParallel", "average"])
def test_any_file_that_eval_reads_gives_the_initial_weights(tmp_path: Path, form: str) -> None:
    tensors = state_dict()
    state = State.fresh(SHORT.but(init=wrapped(form, tmp_path), ema=0.9))
    assert same(state.model, tensors) == same(state.eval_model, tensors) == list(tensors)
    assert state.model.training


def test_the_recipes_normalisation_stays_and_half_precision_becomes_single(tmp_path: Path) -> None:
    made = SHORT.but(normalize=((0.5,), (0.25,)))
    state = State.fresh(made.but(init=wrapped("normalisation", tmp_path)))
    assert same(state.model, state_dict()) == list(state_dict())
    assert (state.model.mean.item(), state.model.std.item()) == (0.5, 0.25)
    half = State.fresh(made.but(init=wrapped("half", tmp_path))).model
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert torch.allclose(half.net.conv1.weight, state_dict()["conv1.weight"], atol=1e-3)


def test_a_head_of_another_number_of_classes_starts_fresh_and_that_is_noted(tmp_path: Path) -> None:
    torch.save(state_dict(classes=1000), tmp_path / "imagenet.pth")
    made = SHORT.but(init=str(tmp_path / "imagenet.pth"))
    state, fresh = State.fresh(made), State.fresh(SHORT)
    head = {"linear.weight", "linear.bias"}
    assert set(same(state.model, state_dict(classes=1000))) == set(state_dict()) - head
    assert head <= set(same(state.model, fresh.model.net.state_dict()))
    started = next(iter(fit(made, state)))
    assert isinstance(started, RunStarted)
    assert "the file has 1000 classes, the model 10: linear.weight, linear.bias start fresh" in started.note
    assert f"(SHA-256 {sha256(tmp_path / 'imagenet.pth')[:16]})" in started.note


class Own(nn.Module):
    """A network whose last linear layer has a name of its own, and is not the last tensor."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.top = nn.Linear(4, classes)
        self.scale = nn.Parameter(torch.ones(1))
        self.body = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.body(x) * self.scale)


def test_the_head_of_a_network_of_ones_own_is_its_last_linear_layer(tmp_path: Path) -> None:
    torch.save(Own(3, 1).state_dict(), tmp_path / "own.pth")
    state = State.fresh(SHORT.but(model=Own, init=str(tmp_path / "own.pth")))
    assert "top.weight, top.bias start fresh" in state.note


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda t: t.pop("bn2.bias"), r"bn2.bias \[64\] is only in the model"),
        (lambda t: t.update(aux=torch.zeros(3)), r"has 1 tensor more than the model: aux \[3\] is only in the file"),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(32, 3, 3, 3)}),
            r"conv1.weight is \[32, 3, 3, 3\] in the file",
        ),
        (lambda t: t.update({"linear.weight": torch.zeros(9, 64)}), r"linear.weight is \[9, 64\] in the file"),
        (lambda t: t.update({"linear.weight": torch.full((10, 128), float("nan"))}), "linear.weight"),
    ],
    ids=["absent", "more", "shape", "head of another width", "NaN"],
)
def test_any_other_difference_is_an_error_that_names_the_tensor(tmp_path: Path, change: object, wrong: str) -> None:
    tensors = state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=f"init=.*{wrong}") as caught:
        list(run(SHORT.but(init=str(tmp_path / "w.pth")), tmp_path / "run", "it"))
    assert "--ignore-unused" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_missing_file_is_one_line_before_data_are_loaded_and_nothing_is_written(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["robustmail", "run", "quickstart", "init=ta.pth", "data=npz('no.npz')"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "init=ta.pth: no such file. Did you mean 'at.pth'?" in " ".join(error.split())
    assert not (tmp_path / "runs").exists()


def test_a_file_that_names_code_runs_none(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": state_dict(), "args": Code()}, tmp_path / "w.pth")
    State.fresh(SHORT.but(init=str(tmp_path / "w.pth")))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "init"),
    [
        ("init=at.pth", "at.pth"),
        ("init=../runs/mail-at/0/best.safetensors", "../runs/mail-at/0/best.safetensors"),
        ("init=hf://OWNER/NAME/w.pt@main", "hf://OWNER/NAME/w.pt@main"),
        ("init=epoch=10_a+b.pth", "epoch=10_a+b.pth"),
        ("init='my file.pth'", "my file.pth"),
        ("init=None", None),
    ],
)
def test_the_command_line_takes_a_path_without_quotes(text: str, init: str | None) -> None:
    assert apply_overrides(SHORT.but(init="before"), [text]).init == init


def stopped(made: Recipe, folder: Path) -> None:
    """Begin a run, and stop it after its first step."""
    signals = Signals()
    with pytest.raises(Stopped):
        for record in run(made, folder, "it", signals=signals):
            if isinstance(record, StepFinished):
                signals.asked = 15


def test_the_files_hash_belongs_to_the_run_and_another_file_is_another_run(tmp_path: Path, file: Path) -> None:
    made, folder = SHORT.but(init=str(file)), tmp_path / "run"
    stopped(made, folder)
    assert json.loads((folder / "recipe.json").read_text())["init.sha256"] == sha256(file)
    assert status(made, folder) == "continue"
    moved = file.rename(tmp_path / "moved.pth")
    assert status(made.but(init=str(moved)), folder) == "continue", "a path is not the method"
    for other in (state_dict() | {"linear.bias": torch.zeros(10)}, None):
        if other:
            torch.save(other, file)
        with pytest.raises(RunError, match=r"another recipe \(init.sha256: [0-9a-f]{64} there, .* here\)"):
            status(made if other else SHORT, folder)
    plain = tmp_path / "plain"
    stopped(SHORT, plain)
    with pytest.raises(RunError, match=r"init: None there"):
        status(made, plain)


@pytest.mark.long
def test_a_run_goes_on_without_its_file_and_ends_in_the_same_bits_and_says_both(tmp_path: Path, file: Path) -> None:
    made, parts = SHORT.but(init=str(file), epochs=2), tmp_path / "parts"
    whole = list(run(made, tmp_path / "whole", "it"))
    stopped(made, parts)
    digest = sha256(file)
    file.unlink()
    records = list(run(made, parts, "it"))
    (started,) = (record for record in records if isinstance(record, RunStarted))
    assert started.step == 1
    assert "is not there any more, and not needed" in started.note
    assert isinstance(whole[-1], RunFinished)
    assert (parts / "last.safetensors").read_bytes() == (tmp_path / "whole" / "last.safetensors").read_bytes()
    for folder in (parts, tmp_path / "whole"):
        results = json.loads((folder / "results.json").read_text())
        assert results["provenance"]["recipe"]["init.sha256"] == digest
    assert status(made, parts) == "finished"
    with pytest.raises(ModelError, match="no such file"):
        list(run(made, tmp_path / "new", "it"))


def test_a_fork_of_a_trunk_keeps_the_hash_of_its_initial_weights(tmp_path: Path, file: Path) -> None:
    made = SHORT.but(init=str(file))
    stopped(made, tmp_path / "trunk")
    for name in ("best", "last"):
        np.save(tmp_path / "trunk" / f"{name}.safetensors", np.zeros(1))
        (tmp_path / "trunk" / f"{name}.safetensors.npy").rename(tmp_path / "trunk" / f"{name}.safetensors")
    fork(made, tmp_path / "trunk", tmp_path / "cell", None)
    assert json.loads((tmp_path / "cell" / "recipe.json").read_text())["init.sha256"] == sha256(file)
    assert status(made, tmp_path / "cell") == "continue"


def test_a_run_starts_from_the_run_before_it_with_ones_own_function_as_model(tmp_path: Path) -> None:
    list(run(SHORT, tmp_path / "first", "it"))
    state = State.fresh(SHORT.but(init=str(tmp_path / "first"), seed=3))
    first = State.fresh(SHORT, tmp_path / "first")
    first.read_weights("best")
    assert same(state.model, first.model.net.state_dict()) == list(first.model.net.state_dict())
    assert re.search(r"starts from .*first \(SHA-256 [0-9a-f]{16}\)", state.note)
