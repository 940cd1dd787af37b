"""The weights are found wherever they are kept, and what wrappers added to their names is taken off."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.utils import prune

from robustmail.checkpoints import open_checkpoint
from robustmail.checkpoints.cleaning import clean_state_dict
from robustmail.checkpoints.state_dicts import find_state_dicts
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
        (lambda w: {"model": w, "swa_model": w}, "swa_model"),
        (lambda w: {"model": w, "modelEMA": w}, "modelEMA"),
        (lambda w: {"model": w, "second": {"n_averaged": torch.tensor(3), **w}}, "second"),
        (lambda w: {"unaveraged_model_state_dict": w, "model_state_dict": w}, "model_state_dict"),
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


# Several networks in one flat state dict


def test_of_two_networks_in_one_dict_a_refusal_names_both_and_each_can_be_had(tmp_path: Path) -> None:
    both = {**prefixed("module.student."), **prefixed("module.teacher."), "module.criterion.weight": torch.ones(10)}
    with pytest.raises(ModelError, match=r"networks: student, teacher\. .*--weights student or --weights teacher"):
        opened({"state_dict": both}, tmp_path)
    for name in ("student", "teacher"):
        checkpoint = opened({"state_dict": both}, tmp_path, name)
        assert checkpoint.weights == f"state_dict.{name}"
        assert checkpoint.tensors.keys() == weights().keys()
    assert len(opened(both, tmp_path, "all").raw_tensors) == len(both)


@pytest.mark.parametrize("names", [("model", "teacher"), ("generator", "discriminator"), ("net1", "net2")])
def test_no_name_of_two_is_preferred(names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has several networks: " + ", ".join(sorted(names))):
        opened({**prefixed(f"{names[0]}."), **prefixed(f"{names[1]}.")}, tmp_path)


def test_an_average_in_the_same_dict_goes_first(tmp_path: Path) -> None:
    checkpoint = opened({**prefixed("model."), **prefixed("ema_model.module.")}, tmp_path)
    assert (checkpoint.weights, checkpoint.reason) == ("ema_model", "the average of the weights goes first")


def test_losses_and_metrics_beside_a_network_are_left_out_and_told(tmp_path: Path) -> None:
    extra = {"criterion.weight": torch.ones(10), "val_acc.tp": torch.zeros(10, dtype=torch.int64),
             "metric.inception.weight": torch.zeros(4, 4), "weighting.values": torch.ones(3)}  # fmt: skip
    checkpoint = opened({**prefixed("model._orig_mod."), **extra}, tmp_path)
    assert checkpoint.tensors.keys() == weights().keys()
    assert all(name in " ".join(checkpoint.notes) for name in extra)


@pytest.mark.parametrize(
    "names", [("norm.weight", "norm.bias"), ("bn.running_mean",), ("scale.values",), ("temperature",)]
)
def test_what_may_be_a_layer_of_the_network_is_kept(names: tuple[str, ...]) -> None:
    content = {**prefixed("features."), **{name: torch.ones(10) for name in names}}
    assert set(names) <= clean_state_dict(content).tensors.keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: n.ResNet(n.Basic),
        lambda: n.WideNet(2),
        lambda: n.Vgg(True, True),
        n.mlp,
        n.ResNet9,
        lambda: timm.create_model("pvt_v2_b0"),
        lambda: timm.create_model("edgenext_xx_small"),
        lambda: timm.create_model("vit_tiny_patch16_224"),
        lambda: timm.create_model("mobilenetv3_small_050"),
    ],
)
def test_one_network_is_not_divided(make: Any) -> None:
    with torch.device("meta"):
        tensors = make().state_dict()
    assert find_state_dicts(tensors).tensors.keys() == {""}


# Averages without statistics


def test_an_average_of_parameters_takes_the_statistics_of_the_live_network(tmp_path: Path) -> None:
    live, shadow = (
        prefixed("module."),
        {k: t * 2 for k, t in weights().items() if "running" not in k and "num_" not in k},
    )
    checkpoint = opened({"model": live, "ema": {"shadow": shadow, "decay": 0.99}}, tmp_path)
    assert checkpoint.weights == "ema.shadow"
    assert torch.equal(checkpoint.tensors["conv1.weight"], shadow["conv1.weight"])
    assert torch.equal(checkpoint.tensors["bn1.running_var"], live["module.bn1.running_var"])
    assert "ema.shadow has no BatchNorm statistics: those of model are taken" in checkpoint.notes


def test_nothing_else_is_taken_from_the_live_network(tmp_path: Path) -> None:
    shadow = {k: t for k, t in weights().items() if "running" not in k and "num_" not in k and k != "linear.bias"}
    assert opened({"model": weights(), "ema": shadow}, tmp_path).tensors.keys() == shadow.keys()


# Tables and masks


def test_tables_are_no_quantised_weights() -> None:
    tables = {
        f"a.{dtype}": torch.zeros(3, 3, dtype=getattr(torch, dtype)) for dtype in ("int64", "int32", "int16", "bool")
    }
    tables |= {
        "blocks.0.attn_mask": torch.zeros(4, 9, 9),
        "position_ids": torch.zeros(1, 7),
        "rope.inv_freq": torch.ones(4),
    }
    cleaned = clean_state_dict({**weights(), **tables})
    assert (cleaned.tensors.keys(), cleaned.problems) == (weights().keys(), ())
    assert "tables and masks left out" in " ".join(cleaned.notes)


@pytest.mark.parametrize(
    "extra", [{}, {"scale": torch.ones(2)}, {"zero_point": torch.ones(2)}, {"weight_scale": torch.ones(2)}]
)
def test_small_integers_are_quantised_where_they_are_weights(extra: dict[str, torch.Tensor]) -> None:
    for dtype in (torch.int8, torch.uint8):
        kernel = {"a.packed" if extra else "a.weight": torch.zeros(2, 2, dtype=dtype)}
        cleaned = clean_state_dict({**kernel, **{f"a.{name}": t for name, t in extra.items()}})
        assert "quantised" in cleaned.problems[0]
    assert clean_state_dict({"a.lookup": torch.zeros(2, 2, dtype=torch.uint8)}).problems == ()


def test_wrappers_within_a_network_are_taken_off() -> None:
    names = [
        name.replace("layer1.", "layer1.module.").replace("layer2.0.", "layer2.0._orig_mod.") for name in weights()
    ]
    assert clean_state_dict(dict(zip(names, weights().values(), strict=True))).tensors.keys() == weights().keys()


# Factors


def test_pruned_and_normed_weights_are_multiplied() -> None:
    net = n.seasoned(n.ResNet(n.Basic))
    x = torch.randn(2, 3, 32, 32)
    utils = torch.nn.utils
    changes: dict[str, Any] = {
        "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "weight norm": lambda m: utils.parametrizations.weight_norm(m),
        "weight norm over inputs": lambda m: utils.parametrizations.weight_norm(m, dim=1),
        "spectral norm": lambda m: utils.parametrizations.spectral_norm(m),
        "older weight norm": old(utils.weight_norm),
        "older weight norm of all": lambda m: old(utils.weight_norm)(m, dim=None),
        "older spectral norm": old(utils.spectral_norm),
    }  # fmt: skip
    for name, change in changes.items():
        changed = copy.deepcopy(net)
        for module in (changed.conv1, changed.layer1[0].conv2, changed.linear):
            change(module)
        with torch.no_grad():
            changed.train()(x)  # spectral norm estimates
            changed.eval()
            cleaned = clean_state_dict(changed.state_dict())
            plain = n.ResNet(n.Basic)
            plain.load_state_dict(cleaned.tensors)
            torch.testing.assert_close(plain.eval()(x), changed(x), msg=lambda text, name=name: f"{name}: {text}")
        assert cleaned.problems == ()
        assert name.removeprefix("older ").partition(" o")[0] in " ".join(cleaned.notes)


def old(change: Any) -> Any:
    def changed(module: torch.nn.Module, **knobs: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(module, **knobs)

    return changed


def test_an_unknown_parametrization_is_named() -> None:
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 4))
    assert (
        "belongs to a parametrization that robustmail does not know" in clean_state_dict(layer.state_dict()).problems[0]
    )
