"""Pickles are read without importing or calling anything: tensors are had, everything else is named."""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustmail.checkpoints import inspect_checkpoint, open_checkpoint
from robustmail.checkpoints.pickle_values import Unbuilt
from robustmail.checkpoints.unpickler import unpickle
from robustmail.errors import ModelError
from tests.checkpoints import networks as n

MINE = """
import argparse
from torch import nn
class Some:
    def __init__(self): self.lr, self.eps = 0.1, 8
class Config(dict): pass
class Args(argparse.Namespace): pass
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.body.register_buffer("scratch", self.body.weight[0].detach(), persistent=False)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that is there when a file is written, and gone when it is read."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine")
    sys.modules.pop("mine", None)


def written(content: Any, folder: Path, **knobs: Any) -> Path:
    torch.save(content, folder / "file.pth", **knobs)
    sys.modules.pop("mine", None)
    (folder / "mine.py").write_text("raise AssertionError('imported')")
    return folder / "file.pth"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_beside_objects_of_unknown_classes_are_read(mine, tmp_path, protocol: int, is_zip: bool) -> None:
    net = n.conv_small()
    content = {
        "model": net.state_dict(), "args": mine.Some(), "config": mine.Config(lr=1), "more": mine.Args(a=1),
        "rng": np.random.get_state(), "opt": torch.optim.SGD(net.parameters(), 0.1), "kind": mine.Net,
        "plain": argparse.Namespace(lr=0.5), "best": collections.Counter(a=1),
    }  # fmt: skip
    path = written(content, tmp_path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    report = inspect_checkpoint(path)
    assert all(torch.equal(report.checkpoint.tensors[key], tensor) for key, tensor in net.state_dict().items())
    notes = report.checkpoint.notes
    assert "args: an object of mine.Some, not built" in notes
    assert {"config", "more", "kind"} <= {note.partition(":")[0] for note in notes}
    assert not any("Namespace" in note or "numpy" in note for note in notes)
    assert report.checkpoint.plain_values["args"] == "mine.Some, not built: lr=0.1, eps=8"
    assert report.checkpoint.plain_values["plain"] == "lr=0.5"
    assert "mine" not in sys.modules


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, lambda net: {"ema": net, "epoch": 3}])
def test_a_whole_module_is_read_without_its_code(mine, tmp_path, wrap: Any, is_zip: bool) -> None:
    net = mine.Net()
    expected = net.state_dict()
    checkpoint = open_checkpoint(written(wrap(net), tmp_path, _use_new_zipfile_serialization=is_zip))
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[key], tensor) for key, tensor in expected.items())
    assert any("a whole module of" in note and "its code was not run" in note for note in checkpoint.notes)
    assert "mine" not in sys.modules


def test_a_file_without_weights_names_what_is_in_it(mine, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"has no weights.*trainer: an object of mine\.Some, not built"):
        open_checkpoint(written({"trainer": mine.Some()}, tmp_path))


def test_numbers_of_numpy_are_pythons() -> None:
    content = {"acc": np.float64(91.5), "n": np.int64(3), "ok": np.bool_(True)}
    for protocol in range(6):
        assert unpickle(io.BytesIO(pickle.dumps(content, protocol))) == {"acc": 91.5, "n": 3, "ok": True}


def test_tensors_share_storages_and_keep_strides_as_written(tmp_path) -> None:
    base = torch.arange(24.0).view(4, 6)
    content = {"a": base, "b": base.t(), "c": base[1:3, 2:], "d": nn.Parameter(base), "e": base.to(torch.bfloat16)}
    for is_zip in (True, False):
        torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=is_zip)
        read = open_checkpoint(tmp_path / "f.pth").raw_tensors
        for key, tensor in content.items():
            assert torch.equal(read[key], tensor)
            assert read[key].stride() == tensor.stride()
        assert read["a"].data_ptr() == read["b"].data_ptr()


# Hostile pickles


def op(text: str) -> bytes:
    """GLOBAL of module.name."""
    module, _, name = text.rpartition(".")
    return f"c{module}\n{name}\n".encode()


HOSTILE = {
    "an object": b"(" + op("os.system") + b"U\x04trueo",
    "reduce": op("os.system") + b"U\x04true\x85R",
    "reduce of a reduce": op("builtins.getattr") + op("os.system") + b"U\x08__call__\x86RU\x04true\x85R",
    "eval": op("builtins.eval") + b"U\x031+1\x85R",
    "new object": op("subprocess.Popen") + b"U\x04true\x85\x81",
    "instance": b"(U\x04trueios\nsystem\n",
    "stack global": b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R",
    "stack global of no texts": b"K\x01K\x02\x93)R",
    "stack global of dots": b"\x8c\x05torch\x8c\x0fos.path.abspath\x93\x8c\x01x\x85R",
    "build": op("argparse.Namespace") + b")\x81}U\x09__class__" + op("os.system") + b"sb",
    "build of a function": op("torch._utils._rebuild_tensor_v2") + b"N}U\x08__code__K\x01s\x86b",
    "build of a class": op("collections.OrderedDict") + b"}U\x03getK\x01sb",
    "code under a known name": op("torch._tensor._rebuild_from_type_v2") + op("os.system") + b"NU\x04true\x85}t",
    "extension": b"\x82\x01)R",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_a_pickle_calls_stays_inert(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("called")

    for module, name in ((os, "system"), (os, "popen")):
        monkeypatch.setattr(module, name, forbidden)
    before = set(sys.modules)
    try:
        value = unpickle(io.BytesIO(b"\x80\x02" + HOSTILE[kind] + b"."))
    except ValueError:
        pass
    else:
        assert not callable(value)
    assert set(sys.modules) == before
    assert collections.OrderedDict.get is dict.get
    assert torch._utils._rebuild_tensor_v2.__code__.co_name == "_rebuild_tensor_v2"


BOMBS = {
    "bytearray": op("builtins.bytearray") + b"J\x00\x00\x00\x7f\x85R",
    "range": op("builtins.list") + op("builtins.range") + b"J\x00\x00\x00\x7f\x85R\x85R",
    "repeated text": op("operator.mul") + b"U\x01aJ\x00\x00\x00\x7f\x86R",
    "meta": op("torch._utils._rebuild_meta_tensor_no_storage") + b"NJ\x00\x00\x00\x7f\x85J\x01\x00\x00\x00\x85\x89tR",
    "copies of a list": op("builtins.list") + b"q\x00]q\x01(" + b"K\x01" * 100_000 + b"e0"
    + b"h\x00h\x01\x85R0" * 2000 + b"N",
    "lists doubled": b"]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(5000)),
    "a text longer than the file": b"X\xff\xff\xff\x7fabc",
    "deep tuples as a key": b"N" + b"\x85" * 100_000 + b"q\x00}h\x00K\x01s",
    "deep dictionaries": b"}" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_no_pickle_makes_more_than_it_has(kind: str) -> None:
    tracemalloc.start()
    with contextlib.suppress(ValueError, MemoryError):
        unpickle(io.BytesIO(b"\x80\x02" + BOMBS[kind] + b"."))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02R.", b"\x80\x02(.", b"\x80\x02h\x05.", b"\x80\x02K\x01K\x02a.",
             b"\x80\x02K\x01K\x02K\x03s.", b"\x80\x02Pab\n.", b"\x80\x02N\x51.", b"\x80\x05\x97.", b"\xff",
             b"\x80\x02Ibig\n."],
)  # fmt: skip
def test_a_damaged_pickle_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpickle(io.BytesIO(data))


def test_an_unbuilt_object_keeps_what_it_would_have_been() -> None:
    value = unpickle(io.BytesIO(pickle.dumps(argparse.Namespace(lr=0.1), 4)))
    assert isinstance(value, Unbuilt)
    assert (value.name, value.state) == ("argparse.Namespace", {"lr": 0.1})


@pytest.mark.parametrize("claim", ["size", "stride", "offset", "count", "negative"])
def test_a_tensor_that_claims_what_is_not_there_is_refused(claim: str, tmp_path) -> None:
    data = io.BytesIO()
    torch.save({"a": torch.zeros(3, 5), "b": torch.zeros(2, 2)}, data)
    shape, numbers = b"K\x03K\x05\x86", {"size": b"K\x7fK\x05\x86", "negative": b"J\xff\xff\xff\xffK\x05\x86"}
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(tmp_path / "f.pth", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                wrong = {
                    "stride": content.replace(b"K\x05K\x01\x86", b"K\x7fK\x01\x86"),
                    "offset": content.replace(b"QK\x00", b"QK\x7f"),
                    "count": content.replace(b"K\x0ft", b"K\x7ft"),
                }.get(claim) or content.replace(shape, numbers[claim])
                assert wrong != content
                content = wrong
            new.writestr(name, content)
    with pytest.raises(ModelError, match=r"damaged|claim"):
        open_checkpoint(tmp_path / "f.pth")
