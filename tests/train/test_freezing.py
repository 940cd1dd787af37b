"""Parameters that a recipe freezes stay as they are, to the bit, whatever else a step does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from robustmail import AT, AWP, PGD, SGD, State, fit, reproduce
from robustmail.cli.main import main
from robustmail.config.overrides import apply_overrides
from robustmail.errors import ModelError, NonFiniteError
from robustmail.models.classifier import Classifier, build
from robustmail.models.folded import FoldedModel
from robustmail.models.freezing import freeze, trained_parameters
from robustmail.records import RunStarted, StepFinished
from robustmail.report.log_lines import log_line
from robustmail.step import module_mode
from robustmail.train.train_step import run_attack
from tests.train.conftest import Poison, recipe

STEM = ("conv1.*", "bn1.*", "conv2.weight")
SHORT = recipe.but(
    epochs=1, batch=1024, attack=PGD(eps=0.1, alpha=0.1, steps=1), objective=AT(), optimizer=SGD(lr=0.05),
    weighter=None, margin=None, burn_in=0, validate="nat", evaluate=("nat",), test_size=20, freeze=STEM,
)  # fmt: skip


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.net.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.net.state_dict().items() if not tensor.equal(before[name])}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"perturbation": AWP(gamma=0.1)},
        {"ema": 0.5},
        {"attack_mode": "train"},
        {"optimizer": SGD(lr=0.05, weight_decay=0.5, momentum=0.9)},
        {"model": lambda classes, channels: build("small_cnn", classes, channels).net},
    ],
    ids=["plain", "AWP", "EMA", "attack in train mode", "weight decay", "own function"],
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_is_trained(changes: dict[str, object]) -> None:
    state = State.fresh(SHORT.but(**changes))
    before = tensors(state.model)
    (started, *records) = fit(state.recipe, state)
    assert sum(isinstance(record, StepFinished) for record in records) == 2
    frozen = {name for name in before if name.startswith(("conv1.", "bn1.")) or name == "conv2.weight"}
    assert "bn1.running_mean" in frozen
    for model in (state.model, state.eval_model):
        assert changed(before, model) == set(before) - frozen
    assert isinstance(started, RunStarted)
    assert started.frozen == sum(before[name].numel() for name in ("conv1.weight", "bn1.weight", "bn1.bias")) + 18_432
    assert f"{started.parameters:,} parameters, {started.frozen:,} of them frozen" in log_line(started)


def test_frozen_parameters_are_not_given_to_the_optimiser_and_have_no_gradient() -> None:
    state = State.fresh(SHORT)
    given = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in trained_parameters(state.model)}
    assert {name for name, p in state.model.net.named_parameters() if not p.requires_grad} == {
        "conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight",
    }  # fmt: skip
    list(fit(SHORT, state))
    assert state.model.net.conv1.weight.grad is None


def test_only_a_batchnorm_without_trained_parameters_keeps_its_mode_in_every_mode() -> None:
    model = build("small_cnn", 10, 1)
    freeze(model, ("bn1.*", "bn2.weight"))
    assert (model.net.bn1.training, model.net.bn2.training) == (False, True)
    with module_mode(nn.Sequential(model), "train"):
        assert (model.net.bn1.training, model.net.bn2.training) == (False, True)
    assert (model.eval().net.bn2.training, model.train().net.bn2.training) == (False, True)
    assert model.net.bn1.training is False


def test_attacks_reach_the_images_through_frozen_layers() -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    model = build("small_cnn", 10, 1)
    free = run_attack(SHORT, model, x, y).x
    freeze(model, ("conv*", "bn*"))
    assert torch.equal(run_attack(SHORT, model, x, y).x, free)
    assert not torch.equal(free, x)


def test_a_folded_model_follows_the_live_one_with_frozen_layers() -> None:
    model = build("small_cnn", 10, 1)
    freeze(model, ("conv1.*", "bn1.*"))
    folded, x = FoldedModel(model, torch.rand(4, 1, 8, 8), torch.float32), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        model.net.conv2.weight.mul_(2)
        folded.refresh()
        torch.testing.assert_close(folded(x), model.eval()(x))


def test_awp_with_no_weight_left_to_perturb_does_nothing() -> None:
    made = SHORT.but(freeze=("conv*", "linear.weight"), perturbation=AWP(gamma=0.1))
    perturbed, plain = State.fresh(made), State.fresh(made.but(perturbation=None))
    for state in (perturbed, plain):
        list(fit(state.recipe, state))
    assert changed(tensors(plain.model), perturbed.model) == set()


@pytest.mark.long
def test_a_run_with_frozen_parameters_resumes_to_the_same_bits(tmp_path: Path) -> None:
    made = SHORT.but(epochs=2, ema=0.9, perturbation=AWP(gamma=0.01))
    whole, parts = State.fresh(made, tmp_path / "whole"), State.fresh(made, tmp_path / "parts")
    list(fit(made, whole))
    for record in fit(made, parts):
        if isinstance(record, StepFinished) and record.epoch == 1:
            parts.save()
            break
    again = State.fresh(made, tmp_path / "parts")
    again.load()
    list(fit(made, again))
    files = [(tmp_path / folder / "last.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_batch_that_fails_is_reproduced_with_what_was_frozen(tmp_path: Path) -> None:
    made = recipe.but(margin=Poison(), burn_in=0, freeze=STEM)
    with pytest.raises(NonFiniteError):
        list(fit(made, State.fresh(made, tmp_path)))
    first = reproduce(tmp_path / "nonfinite.pt", made.but(margin=lambda step: step.probs_adv.amax(1)))
    other = reproduce(tmp_path / "nonfinite.pt", made.but(margin=lambda step: step.probs_adv.amax(1), freeze=()))
    assert first != other, "BatchNorm in eval mode gives another loss"


def test_a_pattern_that_matches_nothing_is_met_with_the_nearest_and_with_what_names_look_like() -> None:
    with pytest.raises(ModelError) as caught:
        State.fresh(SHORT.but(freeze=("conv1.*", "cnov2.*")))
    assert str(caught.value) == (
        "freeze='cnov2.*': matches no parameter. Did you mean 'conv2.*'? "
        "Its names are linear.weight, linear.bias, conv1.weight, bn1.weight and 7 more."
    )
    with pytest.raises(ModelError, match="matches no parameter"):
        freeze(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))), ("net.1.weight",))


def test_one_parameter_at_least_is_trained() -> None:
    with pytest.raises(ModelError, match=r"freeze=\*: freezes every parameter. Leave one to train"):
        State.fresh(SHORT.but(freeze=("*",)))


@pytest.mark.parametrize(
    "text", ["freeze=conv1.*,layer?.bias", "freeze=('conv1.*', 'layer?.bias')", "freeze=['conv1.*', 'layer?.bias']"]
)
def test_the_command_line_takes_patterns_with_commas(text: str) -> None:
    assert apply_overrides(recipe, [text]).freeze == ("conv1.*", "layer?.bias")


@pytest.mark.long
def test_show_counts_what_is_trained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["robustmail", "show", "quickstart", "model=cifar_wrn70_16_silu", "freeze=conv1.*,block?.*,bn1.*"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert "with 10 classes and 3 channels 10,250 of 266,796,506 parameters are trained" in capsys.readouterr().out
