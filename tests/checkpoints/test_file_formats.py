"""Whatever the file: its weights, or one sentence that says what it is. Nothing in it is ever run."""

from __future__ import annotations

import argparse
import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustmail.checkpoints import inspect_checkpoint, open_checkpoint
from robustmail.checkpoints.file_formats import read_file
from robustmail.errors import ModelError, in_brief
from robustmail.runtime import untrusted
from tests.checkpoints import networks as n


class Creates:
    """A pickle of this would make a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Own:
    """A class that only its own code has."""

    value = 1


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(n.conv_small().state_dict())


def saved(content: Any, **knobs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **knobs)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def arrays(content: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: tensor.numpy() for name, tensor in content.items()})
    return file.getvalue()


def safe(content: dict[str, torch.Tensor], folder: Path, **metadata: str) -> bytes:
    path = folder / "made.safetensors"
    save_file(content, path, metadata)
    return path.read_bytes()


def legacy(content: Any, **knobs: Any) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False, **knobs)


CONTAINERS: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "zip": (saved, "torch file (zip)"),
    "legacy": (legacy, "torch file (pickle, of before 1.6)"),
    "npz": (arrays, "numpy npz"),
    "gzip": (lambda c: gzip.compress(saved(c)), "torch file (zip), packed with gzip"),
    "bzip2": (lambda c: bz2.compress(legacy(c)), "torch file (pickle, of before 1.6), packed with bzip2"),
    "xz": (lambda c: lzma.compress(saved(c)), "torch file (zip), packed with xz"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    make, name = CONTAINERS[kind]
    path = tmp_path / "file.pth"
    path.write_bytes(make(weights()))
    checkpoint = open_checkpoint(path)
    assert checkpoint.container == name
    assert checkpoint.tensors.keys() == weights().keys()
    assert all(torch.equal(checkpoint.tensors[key], tensor) for key, tensor in weights().items())


def test_safetensors_give_weights_and_metadata_also_packed(tmp_path: Path) -> None:
    data = safe(weights(), tmp_path, note="hello")
    for packed in (data, gzip.compress(data)):
        (tmp_path / "file").write_bytes(packed)
        opened = read_file(tmp_path / "file")
        assert opened.metadata == {"note": "hello"}
        assert opened.content.keys() == weights().keys()


def test_plain_values_beside_the_weights_are_read(tmp_path: Path) -> None:
    torch.save(
        {
            "state_dict": weights(), "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs/1")),
            "acc": np.float64(91.5), "loss": np.float32(0.5), "table": np.arange(3), "epoch": 7,
            "history": collections.defaultdict(list, a=[1]),
            "optimizer": torch.optim.SGD([torch.zeros(1)]).state_dict(),
        },
        tmp_path / "file.pth",
    )  # fmt: skip
    others = open_checkpoint(tmp_path / "file.pth").plain_values
    assert others["acc"] == "91.5"
    assert others["epoch"] == "7"
    assert "lr=0.1" in others["args"]


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    """One bit of the first kernel turned, which only a checksum can tell."""
    kernel = weights()["0.weight"].numpy().tobytes()
    at = data.index(kernel[:64]) + 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def claims_more_than_there_is() -> bytes:
    """A storage of 4 numbers whose pickle says 40,000."""
    data = saved({"a.weight": torch.zeros(2, 2)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, content in members.items():
        if name.endswith("data.pkl"):
            members[name] = content.replace(b"K\x04t", b"M@\x9ct")
            assert members[name] != content
    return zipped(members)


def many_opcodes() -> bytes:
    return zipped({"a/data.pkl": b"\x80\x02" + b"N0" * 2_000_000 + b"N.", "a/version": b"3\n"})


def deep_pickle(depth: int = 200_000) -> bytes:
    return zipped({"a/data.pkl": b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", "a/version": b"3\n"})


def hidden_name() -> bytes:
    """A global whose name the pickle puts together through its memo."""
    data = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94000h\x00h\x01\x93\x8c\x04true\x85R."
    return zipped({"a/data.pkl": data.replace(b"000", b"00"), "a/version": b"3\n"})


MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "zeros": (lambda: bytes(5000), "nothing but zeros"),
    "html": (lambda: b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "web page"),
    "html after a blank": (lambda: b"\n  <html>", "web page"),
    "json": (lambda: b'{"epoch": 3}', "JSON"),
    "text": (lambda: b"not found\n", "text file"),
    "git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "npy": (lambda: b"\x93NUMPY\x01\x00" + bytes(100), "one numpy array"),
    "onnx": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "ONNX"),
    "noise": (lambda: bytes(range(255, 0, -1)), "unknown kind"),
    "one byte": (lambda: b"\x80", "unknown kind"),
    "truncated zip": (lambda: truncated(saved(weights())), "cut short"),
    "truncated legacy": (lambda: truncated(legacy(weights())), "cut short"),
    "truncated within the pickle": (lambda: legacy(weights())[:300], "cut short"),
    "truncated gzip": (lambda: truncated(gzip.compress(saved(weights()))), "cut short"),
    "truncated npz": (lambda: truncated(arrays(weights())), "cut short"),
    "no gzip after all": (lambda: b"\x1f\x8b" + bytes(50), "damaged"),
    "gzip of nothing": (lambda: gzip.compress(b""), "empty"),
    "gzip of gzip": (lambda: gzip.compress(gzip.compress(saved(weights()))), "unknown kind"),
    "broken checksum": (lambda: flipped(saved(weights())), "checksum"),
    "tar": (lambda: tarred({"best.pth": saved(weights()), "log.txt": b"x"}), "best.pth, log.txt"),
    "tar.gz": (lambda: gzip.compress(tarred({"best.pth": saved(weights())})), "best.pth"),
    "zip of files": (lambda: zipped({"model/best.pth": saved(weights())}), "model/best.pth"),
    "zip of nothing": (lambda: zipped({}), "without files"),
    "torch's tar": (lambda: tarred({"sys_info": b"", "pickle": b"", "tensors": b"", "storages": b""}), "before 0.2"),
    "torchscript": (lambda: zipped({"m/data.pkl": b"N.", "m/code/a.py": b"", "m/constants.pkl": b""}), "TorchScript"),
    "objects in npz": (lambda: _object_npz(), "arrays cannot be read"),
    "a class of one's own": (lambda: saved({"recorder": Own()}), "Own, not built"),
    "a class in a legacy file": (lambda: legacy(Own()), "Own, not built"),
    "plain pickle": (lambda: pickle.dumps({"a": 1}), "plain pickle"),
    "pickle with a function": (lambda: pickle.dumps({"a": os.getcwd}), "getcwd"),
    "a name from the memo": (hidden_name, "posix.system, not built"),
    "too many instructions": (many_opcodes, "instructions"),
    "very deep": (deep_pickle, "no weights"),
    "a tensor larger than its storage": (claims_more_than_there_is, "damaged"),
    "a list of tensors": (lambda: saved([torch.zeros(2, 2)]), "no weights"),
    "a number": (lambda: saved(3), "no weights"),
    "one tensor": (lambda: saved(torch.zeros(3, 3)), "no weights"),
    "an optimizer": (lambda: saved(torch.optim.Adam([torch.zeros(2, 2)]).state_dict()), "no weights"),
    "safetensors cut in the header": (lambda: struct.pack("<Q", 500) + b'{"a":', "header"),
    "safetensors of nonsense": (lambda: struct.pack("<Q", 5) + b"{nope" + bytes(9), "damaged"),
    "safetensors of a list": (lambda: struct.pack("<Q", 9) + b'{"a":[1]}', "damaged"),
    "nan": (lambda: saved({"0.weight": torch.full((2, 3, 3, 3), torch.nan)}), "NaN"),
    "inf": (lambda: saved({"a.weight": torch.tensor([[1.0, torch.inf]])}), "1 of 2 numbers"),
    "complex": (lambda: saved({"a.weight": torch.zeros(2, 2, dtype=torch.complex64)}), "complex64"),
    "int8": (lambda: saved({"a.weight": torch.zeros(2, 2, dtype=torch.int8)}), "quantised"),
    "quantised": (
        lambda: _quantised(), "qint8",
    ),
    "float8": (lambda: saved({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}), "float8"),
    "sparse": (lambda: saved({"a.weight": torch.eye(2).to_sparse()}), "sparse"),
    "meta": (lambda: saved({"a.weight": torch.zeros(2, 2, device="meta")}), "no numbers"),
    "no numbers": (lambda: saved({"a.weight": torch.zeros(0, 3)}), "without a number"),
    "expanded beyond its storage": (
        lambda: saved({"a.weight": torch.zeros(1).expand(2**21, 2**10)}), "its tensors claim",
    ),
}  # fmt: skip


def _quantised() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved({"a.weight": torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)})


def _object_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.array([{}], dtype=object))
    return file.getvalue()


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, said = MALFORMED[kind]
    path = tmp_path / "file.pth"
    path.write_bytes(make())
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert said in text
    assert "\n" not in text
    assert text.startswith(str(path))
    assert len(text) < 700


@pytest.mark.parametrize("write", [saved, legacy, lambda c, **knobs: gzip.compress(saved(c, **knobs))])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_malicious_pickle_is_named_and_not_run(write: Callable[..., bytes], protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "made"
    content = {"state_dict": weights(), "extra": Creates(target)}
    (tmp_path / "file.pth").write_bytes(write(content, pickle_protocol=protocol))
    told = inspect_checkpoint(tmp_path / "file.pth").checkpoint
    assert [note for note in told.notes if re.fullmatch(r"extra: an object of (posix|nt)\.mkdir, not built", note)]
    assert all(torch.equal(told.tensors[key], tensor) for key, tensor in weights().items())
    (tmp_path / "file.pth").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ModelError, match=r"plain pickle.*(posix|nt)\.mkdir"):
        inspect_checkpoint(tmp_path / "file.pth")
    assert not target.exists()


@pytest.mark.parametrize("at", range(0, 100, 4))
def test_a_file_cut_anywhere_is_refused(at: int, tmp_path: Path) -> None:
    for write in (saved, legacy, lambda c: safe(c, tmp_path)):
        data = write(weights())
        (tmp_path / "file.pth").write_bytes(data[: len(data) * at // 100])
        with pytest.raises(ModelError):
            open_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_changed_bytes_is_refused_or_read(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    for write in (saved, legacy, lambda c: safe(c, tmp_path)):
        data = bytearray(write({"a.weight": torch.ones(4, 3), "b.weight": torch.ones(2, 4)}))
        for at in rng.integers(0, len(data), 1 + seed % 8):
            data[at] = rng.integers(256)
        (tmp_path / "file.pth").write_bytes(bytes(data))
        try:
            report = inspect_checkpoint(tmp_path / "file.pth")
        except ModelError:
            pass
        else:
            json.dumps(report.as_dict(), allow_nan=False)
            assert all("\n" not in line for line in report.lines())


def test_self_reference_and_sharing_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"state_dict": weights()}
    endless["self"] = endless
    shared: list[Any] = []
    for _ in range(60):
        shared = [shared, shared]
    endless["lists"] = shared
    torch.save(endless, tmp_path / "file.pth")
    assert open_checkpoint(tmp_path / "file.pth").weights == "state_dict"


def test_a_missing_file_a_folder_and_a_device_are_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_bytes(saved(weights()))
    with pytest.raises(ModelError, match=r"no such file.*best\.pth"):
        read_file(tmp_path / "bset.pth")
    with pytest.raises(ModelError, match=r"a folder.*best\.pth"):
        read_file(tmp_path)
    with pytest.raises(ModelError, match="regular"):
        read_file("/dev/null")
    with pytest.raises(ModelError):
        read_file("a\0b")


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "LARGEST", 10_000)
    (tmp_path / "file.gz").write_bytes(gzip.compress(bytes(2_000_000)))
    with pytest.raises(ModelError, match="unpacks to more than"):
        read_file(tmp_path / "file.gz")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(20_000_000))
    (tmp_path / "file.pth").write_bytes(packed.getvalue())
    with pytest.raises(ModelError, match=r"thousand|unpacks"):
        read_file(tmp_path / "file.pth")


@pytest.mark.long
def test_no_hostile_name_reaches_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[31mred": 1, "state_dict": {f"\x1b]0;{k}": v for k, v in weights().items()}}, tmp_path / "f.pth")
    assert all(line.isprintable() for line in inspect_checkpoint(tmp_path / "f.pth").lines())


def test_a_module_with_buffers_only_is_read(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "f.pth")
    assert open_checkpoint(tmp_path / "f.pth").candidates[0].size == 2


def test_an_error_without_words_is_its_kind_alone() -> None:
    assert in_brief(EOFError()) == "EOFError"
    assert in_brief(ValueError("two\nlines  " + "x" * 200)) == "ValueError: two lines " + "x" * 150
