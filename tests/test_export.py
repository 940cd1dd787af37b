"""Exports: the file gives the model's logits on any number of images, and a file that does not is never written."""

from __future__ import annotations

import json
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from robustmail import Classifier, export_model
from robustmail.errors import ModelError, RunError
from robustmail.export import SUFFIXES, _run_content
from tests.conftest import Small

SHAPE = (3, 8, 8)
has_onnx = find_spec("onnxscript") and find_spec("onnxruntime")
needs_onnx = pytest.mark.skipif(not has_onnx, reason="needs pip install -e '.[export]'")
each_form = pytest.mark.parametrize("form", ["torchscript", "pt2", pytest.param("onnx", marks=needs_onnx)])


@pytest.fixture
def model(small: Small) -> Classifier:
    """With statistics of BatchNorm that are not those of a new one, and in train mode."""
    small(torch.rand(8, *SHAPE))
    return Classifier(small, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))).train()


@each_form
def test_a_file_gives_the_models_logits_on_any_number_of_images(model, form, tmp_path, capfd):
    path = tmp_path / f"net{SUFFIXES[form]}"
    done = export_model(model, path, SHAPE, facts={"name": "net"})
    assert (done.form, done.classes, done.images, list(tmp_path.iterdir())) == (form, 10, 12, [path])
    images = torch.rand(7, *SHAPE)
    (got,) = _run_content(form, path.read_bytes(), [images])
    torch.testing.assert_close(got, model.eval()(images), atol=1e-5, rtol=0)
    assert (got - model.net(images)).abs().max() > 0.01, "normalisation is inside"
    assert done.difference < 1e-5 < done.scale
    assert capfd.readouterr() == ("", ""), "torch's own words"
    if form == "onnx":
        check_names(path)


def check_names(path: Path) -> None:
    """Input and output of an ONNX file have names, and the number of images is free."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    ((images,), (logits,)) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape[1:], logits.name, logits.shape[1:]) == ("images", [3, 8, 8], "logits", [10])
    assert isinstance(images.shape[0], str)
    assert "robustmail" in session.get_modelmeta().custom_metadata_map


def test_exporting_changes_nothing_of_the_model(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path / "net.pt", SHAPE)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.memory_format == torch.channels_last
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_tells_where_it_comes_from(model, tmp_path):
    export_model(model, tmp_path / "net.pt", SHAPE, facts={"name": "net"})
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:  # torch.jit.load warns that it is deprecated
        (name,) = (name for name in archive.namelist() if name.endswith("extra/robustmail"))
        stored = json.loads(archive.read(name))
    assert stored == {"shape": [3, 8, 8], "classes": 10, "name": "net"}


class Branching(Small):
    """Takes another way for bright images; a trace keeps one of the two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if x.mean() > 0.5 else 2)


class FixedBatch(Small):
    """Takes any number of images; a trace keeps the number of the traced ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).reshape(len(x), 10)


class Random(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * torch.rand_like(x))


class NaN(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 0


@pytest.mark.parametrize(
    ("network", "form", "message"),
    [
        (Branching, "torchscript", "gives other logits than the model, by up to .*nothing is written. Try --to pt2"),
        (FixedBatch, "torchscript", "the file does not run .*Try --to pt2"),
        (Branching, "pt2", "torch cannot export this network .*Try --to torchscript"),
        (Random, "pt2", "gives other logits each time"),
        (NaN, "pt2", "expected finite logits"),
    ],
)
def test_a_wrong_export_is_refused_and_nothing_is_left(network, form, message, tmp_path, capfd):
    torch.manual_seed(0)
    path = tmp_path / "net.pt"
    path.write_bytes(b"an older one")
    with pytest.raises(ModelError, match=message) as error:
        export_model(network(), path, SHAPE, form, replace=True)
    assert "\n" not in str(error.value)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"an older one", [path])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("there.pt", None, "is there already.*--replace"),
        ("folder.pt", None, "is a folder"),
        ("nowhere/net.pt", None, "there is no folder"),
        ("net.onx", None, "no such form"),
        ("net.onnx", "onx", "no such form. Did you mean 'onnx'?"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(small, name, form, message, tmp_path: Path):
    (tmp_path / "there.pt").write_bytes(b"mine")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(RunError, match=message):
        export_model(small, tmp_path / name, SHAPE, form)
    assert (tmp_path / "there.pt").read_bytes() == b"mine"


def test_images_that_the_model_does_not_take_are_told(small, tmp_path):
    with pytest.raises(ModelError, match=r"fails on images of 3 x 9 x 9 .*--shape"):
        export_model(small, tmp_path / "net.pt", (3, 9, 9))


def test_any_module_can_be_exported(tmp_path):
    done = export_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), tmp_path / "net.pt2", (3, 2, 2))
    assert (done.form, done.classes) == ("pt2", 4)
