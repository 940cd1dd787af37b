"""The weights are found wherever they are kept, and what wrappers added to their names is taken off."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from robustmail.checkpoints import open_checkpoint
from robustmail.checkpoints.state_dicts import clean_state_dict, find_state_dicts
from robustmail.errors import ModelError
from tests.checkpoints import networks as n

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(n.ResNet(n.Basic).state_dict())


def opened(content: Any, folder: Path, wanted: str | None = None) -> Any:
    torch.save(content, folder / "file.pth")
    return open_checkpoint(folder / "file.pth", wanted)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights().items()}


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "net", "model", "ema", "last", "anything"])
def test_weights_are_found_under_any_name(name: str, tmp_path: Path) -> None:
    checkpoint = opened(
        {name: weights(), "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.zeros(3, 3)}}}}, tmp_path
    )
    assert (checkpoint.weights, checkpoint.reason) == (name, "the only one")
    assert checkpoint.tensors.keys() == weights().keys()


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (lambda w: w, ""),
        (lambda w: {**w, "epoch": 3, "acc": torch.tensor(3)}, ""),
        (lambda w: {"state_dict": [w]}, "state_dict[0]"),
        (lambda w: [w], "[0]"),
        (lambda w: {"model": {"net": w}}, "model.net"),
        (lambda w: {"state_dict": w, "model_ema": w}, "model_ema"),
        (lambda w: {"model": w, "state_dict_ema": w, "ema": w}, "state_dict_ema"),
        (lambda w: {"net": w, "net_ema": w}, "net_ema"),
        (lambda w: {"last": w, "best": w}, "last"),
        (lambda w: {"model_state_dict": w, "other": w}, "model_state_dict"),
    ],
)
def test_averages_go_first_then_the_usual_names(content: Any, path: str, tmp_path: Path) -> None:
    assert opened(content(weights()), tmp_path).weights == path


def test_the_choice_can_be_given_and_an_unknown_one_is_corrected(tmp_path: Path) -> None:
    content = {"state_dict": weights(), "ema": {"module": weights()}}
    assert opened(content, tmp_path).weights == "ema.module"
    assert opened(content, tmp_path, "state_dict").weights == "state_dict"
    assert opened(content, tmp_path, "ema").weights == "ema.module"
    with pytest.raises(ModelError, match="Did you mean 'state_dict'"):
        opened(content, tmp_path, "state_dcit")


def test_several_without_a_usual_name_are_no_guess(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"student, teacher.*--weights"):
        opened({"student": weights(), "teacher": weights()}, tmp_path)


WRAPPERS = ["module.", "_orig_mod.", "model.", "net.", "backbone.", "1."]


@pytest.mark.parametrize("prefix", [*WRAPPERS, *map("".join, itertools.permutations(WRAPPERS[:3])), "attacker.model."])
def test_prefixes_are_taken_off_in_any_order(prefix: str) -> None:
    cleaned = clean_state_dict(prefixed(prefix))
    assert cleaned.tensors.keys() == weights().keys()
    assert "".join(cleaned.prefixes) == prefix


def test_a_prefix_is_taken_off_only_where_all_names_have_it_and_never_within() -> None:
    mixed = {**prefixed("module."), "other.weight": torch.zeros(2, 2)}
    assert clean_state_dict(mixed).tensors.keys() == mixed.keys()
    within = {name.replace("layer", "module.layer"): t for name, t in weights().items()}
    assert clean_state_dict(within).tensors.keys() == within.keys()
    modular = {f"modular{name}": t for name, t in weights().items()}
    assert clean_state_dict(modular).tensors.keys() == modular.keys()
    assert clean_state_dict({"fc.weight": torch.zeros(2, 2)}).tensors.keys() == {"fc.weight"}


def test_madrylabs_copies_are_left_out() -> None:
    norm = {f"module.{where}normalize.new_{what}": torch.tensor(values).view(3, 1, 1)
            for where in ("", "attacker.") for what, values in (("mean", MEAN), ("std", STD))}  # fmt: skip
    cleaned = clean_state_dict({**norm, **prefixed("module.model."), **prefixed("module.attacker.model.")})
    assert cleaned.tensors.keys() == weights().keys()
    assert cleaned.normalize == (MEAN, STD)


@pytest.mark.parametrize(
    "names", [("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"), ("_mean", "_std"), ("mu", "std")]
)
@pytest.mark.parametrize("where", ["", "normalize.", "0."])
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_embedded_normalisation_is_taken_out(names: tuple[str, str], where: str, shape: tuple[int, ...]) -> None:
    own = {f"module.{where}{name}": torch.tensor(v).view(shape) for name, v in zip(names, (MEAN, STD), strict=True)}
    cleaned = clean_state_dict({**own, **prefixed("module.1.")})
    assert cleaned.normalize == (MEAN, STD)
    assert cleaned.tensors.keys() == weights().keys()


def test_a_normalisation_of_other_images_is_told_and_not_used() -> None:
    pixels = {"mean": torch.tensor([125.3, 123.0, 113.9]), "std": torch.tensor([63.0, 62.1, 66.7])}
    cleaned = clean_state_dict({**pixels, **prefixed("model.")})
    assert cleaned.normalize is None
    assert "not those of images in [0, 1]" in " ".join(cleaned.notes)
    assert cleaned.tensors.keys() == weights().keys()


def test_batchnorms_are_no_normalisation() -> None:
    tiny = {"bn.running_mean": torch.zeros(3), "bn.running_var": torch.ones(3), "fc.weight": torch.zeros(2, 3)}
    assert clean_state_dict(tiny).normalize is None
    assert clean_state_dict(tiny).tensors.keys() == tiny.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32_and_noted(dtype: torch.dtype) -> None:
    cleaned = clean_state_dict({name: t.to(dtype) if t.is_floating_point() else t for name, t in weights().items()})
    assert {t.dtype for t in cleaned.tensors.values()} == {torch.float32, torch.int64}
    assert str(dtype).removeprefix("torch.") in " ".join(cleaned.notes)


def test_counters_of_tools_are_left_out() -> None:
    extra = {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1), "n_averaged": torch.tensor(3)}
    assert clean_state_dict({**weights(), **extra}).tensors.keys() == weights().keys()


def test_what_was_read_is_not_changed() -> None:
    raw = {"module.mean": torch.tensor(MEAN), "module.std": torch.tensor(STD), **prefixed("module.model.")}
    names = list(raw)
    clean_state_dict(raw)
    assert list(raw) == names


def test_optimizers_are_no_weights() -> None:
    net = n.conv_small()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert find_state_dicts({"optimizer": optimizer.state_dict(), "opt": optimizer.state_dict()}).tensors == {}
