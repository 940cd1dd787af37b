"""`inspect_checkpoint` tells what a file is, what it would be evaluated as, and what to type next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustmail.checkpoints import inspect_checkpoint, open_checkpoint
from robustmail.errors import ModelError
from robustmail.models.classifier import build
from tests.checkpoints import networks as n

SHARED = Path(__file__).parents[3] / "shared"
REAL = [
    ("resnet20-12fca82f.th", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.915),
    ("resnet4b.pth", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), 0.771),
    ("cifar_conv_small_pgd.pth", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 0.630),
]


@pytest.mark.long
def test_the_letter_says_what_there_is_and_what_to_type(tmp_path: Path) -> None:
    content = {
        "net": {f"module.{k}": v for k, v in n.ResNet(n.Basic).state_dict().items()},
        "acc": 91.5,
        "ema": n.LeNet().state_dict(),
    }
    torch.save(content, tmp_path / "my file.pth")
    text = "\n".join(inspect_checkpoint(tmp_path / "my file.pth", "net").lines())
    for said in ("torch file (zip)", "acc = 91.5", "Weights: net", "Also there, with --weights NAME: ema", "module.",
                 "ResNet-14 (width 8, CIFAR stem, 10 classes)", "strides 1, 2, 2", "the normalisation",
                 f"robustmail eval '{tmp_path}/my file.pth' --data cifar10 --probe"):  # fmt: skip
        assert said in text


def test_a_network_that_nobody_knows_is_asked_for(tmp_path: Path) -> None:
    torch.save(torch.nn.LSTM(3, 4).state_dict(), tmp_path / "f.pth")
    report = inspect_checkpoint(tmp_path / "f.pth")
    assert report.candidates == []
    assert "--model file.py:factory" in report.lines()[-1]


def test_weights_that_are_nan_are_reported_but_not_opened(tmp_path: Path) -> None:
    tensors = n.LeNet().state_dict()
    tensors["conv2.weight"][0, 0] = torch.nan
    torch.save(tensors, tmp_path / "f.pth")
    text = "\n".join(inspect_checkpoint(tmp_path / "f.pth").lines())
    assert "conv2.weight has 25 of 2,400 numbers that are NaN or infinite" in text
    with pytest.raises(ModelError, match=r"conv2\.weight"):
        open_checkpoint(tmp_path / "f.pth")


@pytest.mark.long
def test_the_json_has_everything(tmp_path: Path) -> None:
    torch.save({"state_dict": n.LeNet().state_dict()}, tmp_path / "f.pth")
    told = json.loads(json.dumps(inspect_checkpoint(tmp_path / "f.pth").as_dict(), allow_nan=False))
    assert told["weights"] == "state_dict"
    assert told["readings"][0]["size"] == 32
    assert len(told["sha256"]) == 64


def test_our_own_files_say_all_by_themselves(tmp_path: Path) -> None:
    model = build("cifar_resnet18_w8", 10, 3, ((0.5,), (0.25,)))
    facts = {"model": "cifar_resnet18_w8", "classes": 10, "channels": 3, "shape": [3, 32, 32], "data": "cifar10",
             "normalize": [[0.5], [0.25]], "eps": 8 / 255, "epoch": 3}  # fmt: skip
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "best.safetensors", {"robustmail": json.dumps(facts)})
    checkpoint = open_checkpoint(tmp_path / "best.safetensors")
    assert checkpoint.facts == {**facts, "normalize": ((0.5,), (0.25,))}
    assert checkpoint.normalize == ((0.5,), (0.25,))
    assert checkpoint.candidates[0].name == "ResNet-18 (CIFAR stem, width 8, 10 classes)"
    lines = inspect_checkpoint(tmp_path / "best.safetensors").lines()
    assert "Not written" not in "\n".join(lines)
    assert lines[-1] == f"  robustmail eval {tmp_path}/best.safetensors --data cifar10"  # its metadata has no source
    save_file(weights, tmp_path / "best.safetensors", {"robustmail": json.dumps({**facts, "source": "digits()"})})
    assert (
        inspect_checkpoint(tmp_path / "best.safetensors").lines()[-1]
        == f"  robustmail eval {tmp_path}/best.safetensors"
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"model": 3, "classes": "x", "shape": [1], "normalize": [[0], [0]], "eps": NaN}',
     '{"model": "a\\nb", "classes": -1, "shape": [3, 32, 1e9], "normalize": 5, "epoch": true}', "[" * 50_000],
)  # fmt: skip
def test_facts_that_are_none_are_ignored(text: str, tmp_path: Path) -> None:
    save_file(dict(n.LeNet().state_dict()), tmp_path / "f.safetensors", {"robustmail": text})
    assert open_checkpoint(tmp_path / "f.safetensors").facts == {}


@pytest.mark.parametrize(("name", "mean", "std", "accuracy"), REAL)
def test_three_real_checkpoints_are_read_without_help(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], accuracy: float, mini_path: Path
) -> None:
    path = SHARED / "checkpoints" / name
    if not path.is_file():
        pytest.skip(f"needs {name} in ../shared/checkpoints")
    file = np.load(mini_path)
    x = torch.from_numpy(file["x_test"]).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(file["y_test"].astype(np.int64)).flatten()
    network = open_checkpoint(path).candidates[0].network
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in x.split(250)]) == y
    assert float(right.float().mean()) == pytest.approx(accuracy, abs=0.0025)
