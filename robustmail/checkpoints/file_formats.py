"""Files of weights, opened without running any code that is in them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from robustmail.checkpoints.pickle_values import Global, Unbuilt
from robustmail.checkpoints.storages import Storages
from robustmail.checkpoints.unpickler import parts, unpickle
from robustmail.errors import ModelError, did_you_mean, in_brief
from robustmail.runtime.files import atomic_write
from robustmail.runtime.untrusted import HEADER, check_inside, check_unpacked, parse_json, unpacked

__all__ = ["RawCheckpoint", "check_exists", "load_saved", "read_file", "save"]

_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""the number that torch's own pickles began with before 1.6"""

_UNPACKERS: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
}

_FOREIGN: dict[bytes, tuple[str, str]] = {
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as Keras writes", "Convert it to a torch state dict where it was trained."),
    b"\x93NUMPY": ("one numpy array", "A checkpoint has named tensors: use np.savez, or torch.save of a state dict."),
    b"GGUF": ("a GGUF file of a language model", "Image classifiers come as torch or safetensors files."),
    b"version https://git-lfs": (
        "a git-lfs pointer, not the file itself", "Run `git lfs pull` in the repository it came from."
    ),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Extract it and pass the checkpoint inside."),
    b"Rar!": ("a RAR archive", "Extract it and pass the checkpoint inside."),
    b"\x28\xb5\x2f\xfd": ("compressed with zstandard", "Unpack it with `unzstd` first."),
}  # fmt: skip

_RESAVE = "Where you trust it, re-save it in the code it came from: torch.save(model.state_dict(), 'weights.pt')."
_AGAIN = "Download or copy it again, and compare its size with the original's."


@dataclass(frozen=True)
class RawCheckpoint:
    """A checkpoint file as read.

    path: of the file. container: its format, in words: "torch file (zip)". content: plain values and tensors. metadata:
    the texts in the header of a safetensors file. size: in bytes. sha256: of the file.
    """

    path: Path
    container: str
    content: Any
    metadata: dict[str, str] = field(default_factory=dict)
    size: int = 0
    sha256: str = ""


def read_file(path: str | Path) -> RawCheckpoint:
    """Read a checkpoint in any format that can be read without running code: torch, safetensors, npz, also compressed.

    Raises ModelError: missing, empty, cut short, damaged, another kind of file, or one that needs code (named).
    """
    path = Path(path)
    check_exists(path)
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            container, content, metadata = _open(path, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except ModelError:
        raise
    except (MemoryError, RecursionError) as error:
        raise ModelError(str(path), f"too large or too deep to be opened ({type(error).__name__})") from error
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or in_brief(error)})") from error
    except Exception as error:  # what was written to be damaging may fail anywhere
        raise ModelError(str(path), f"damaged ({in_brief(error)})", _AGAIN) from error
    return RawCheckpoint(path, container, content, metadata, path.stat().st_size, digest)


def save(content: Any, path: Path) -> None:
    """Write tensors and plain values atomically, as `load_saved` and torch.load read them.

    torch opens no file by itself here: it would write the name into it, which is random for a temporary file.
    Raises RunError as `atomic_write`.
    """

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(content, file)

    atomic_write(path, fill)


def load_saved(path: Path, device: torch.device) -> Any:
    """The content of a file that `save` wrote. Somebody may have replaced the file, so no code in it is run.

    Raises ModelError, RunError, or what zipfile and torch raise of damaged files.
    """
    check_inside(path)
    with zipfile.ZipFile(path) as archive:
        check_unpacked(archive, path.stat().st_size)
        sizes = {member.file_size for member in archive.infolist()}
    content = torch.load(path, map_location=device, weights_only=True)
    _check_storages(path, content, sizes)
    return content


def check_exists(path: Path) -> None:
    """Refuse a path that is a folder, missing, empty or not a regular file (raises ModelError)."""
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
            todo = f"Pass one of its files: {', '.join(inside[:5])}." if inside else "Pass a file of weights."
            raise ModelError(str(path), "a folder, not a checkpoint", todo)
        if not path.exists():
            near = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
            hint = did_you_mean(path.name, near)
            raise ModelError(str(path), "no such file", hint if hint.startswith("Did") else "")
        if not path.is_file():
            raise ModelError(str(path), "not a regular file")
        if not path.stat().st_size:
            raise ModelError(str(path), "empty (0 bytes)", _AGAIN)
    except (OSError, ValueError) as error:
        raise ModelError(ascii(str(path))[1:-1], f"cannot be read ({in_brief(error)})") from error


_SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".safetensors", ".tar", ".bin", ".npz", ".gz", ".zip")


def _open(path: Path, file: IO[bytes], packed: str = "") -> tuple[str, Any, dict[str, str]]:
    head = file.read(1024)
    file.seek(0)
    for magic, (name, unpacker) in _UNPACKERS.items():
        if head.startswith(magic) and not packed:
            container, content, metadata = _open(path, _unpack(path, file, name, unpacker), name)
            return f"{container}, packed with {name}", content, metadata
    if head.startswith(b"PK"):
        return _zip(path, file)
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return _tar(path, file)
    if _is_safetensors(head):
        return _safetensors(path, file)
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "torch file (pickle, of before 1.6)", *_legacy(path, file, head)
    raise _foreign(path, head)


def _unpack(path: Path, file: IO[bytes], name: str, unpacker: Callable[[Any], Any]) -> IO[bytes]:
    most = unpacked(path.stat().st_size)
    try:
        with unpacker(file) as packed:
            content = packed.read(most + 1)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise ModelError(
            str(path), f"damaged or cut short: {name} cannot unpack it ({in_brief(error)})", _AGAIN
        ) from error
    except Exception as error:  # zlib has an error of its own
        raise ModelError(str(path), f"damaged: {name} cannot unpack it ({in_brief(error)})", _AGAIN) from error
    if len(content) > most:
        raise ModelError(str(path), f"unpacks to more than {most:,} bytes, far more than it has", "Unpack it by hand.")
    if not content:
        raise ModelError(str(path), f"empty once {name} has unpacked it", _AGAIN)
    return io.BytesIO(content)


def _zip(path: Path, file: IO[bytes]) -> tuple[str, Any, dict[str, str]]:
    """A zip is torch's format since 1.6, TorchScript's, numpy's npz, or an archive of other files."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            check_unpacked(archive, file.seek(0, os.SEEK_END))
            names = [m.filename for m in members if not m.is_dir()]
            pickled = [n for n in names if n.endswith("/data.pkl") or n == "data.pkl"]
            if any("/code/" in n or n.endswith("constants.pkl") for n in names):
                todo = (
                    "Save its weights where you trust it: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')."
                )
                raise ModelError(str(path), "a TorchScript archive, which is a program", todo)
            if len(pickled) != 1 and not (names and all(n.endswith(".npy") for n in names)):
                raise _archive(path, names)
            if broken := archive.testzip():
                raise ModelError(str(path), f"damaged: the checksum of {broken!a} is wrong", _AGAIN)
            if not pickled:
                return "numpy npz", _npz(path, file), {}
            folder = pickled[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
                raise ModelError(str(path), "written on a big-endian machine", _RESAVE)

            def read(key: str, nbytes: int) -> torch.UntypedStorage:
                return _bytes(archive.read(f"{folder}data/{key}")).untyped_storage()

            storages = Storages(read, sum(m.file_size for m in members))
            content = _unpickle(path, io.BytesIO(archive.read(pickled[0])), storages)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, KeyError, RuntimeError) as error:
        raise ModelError(str(path), f"damaged or cut short: not a whole zip ({in_brief(error)})", _AGAIN) from error
    _check_storages(path, content, None)
    return "torch file (zip)", content, {}


def _archive(path: Path, names: list[str]) -> ModelError:
    if not names:
        return ModelError(str(path), "an archive without files in it", _AGAIN)
    shown = ", ".join(ascii(n)[1:-1] for n in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return ModelError(str(path), f"an archive of {shown}", "Extract it and pass the checkpoint inside.")


def _tar(path: Path, file: IO[bytes]) -> tuple[str, Any, dict[str, str]]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            names = [member.name for member in archive.getmembers() if not member.isdir()]
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise ModelError(str(path), f"damaged or cut short: not a whole tar ({in_brief(error)})", _AGAIN) from error
    if {"pickle", "tensors", "storages"} <= set(names):
        raise ModelError(str(path), "torch's tar format of before 0.2, which cannot be opened safely", _RESAVE)
    raise _archive(path, names)


def _is_old_tar(head: bytes) -> bool:
    """The tar of before 1988 has no magic: a checksum in octal at 148 tells it."""
    try:
        return len(head) >= 512 and tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape") is not None
    except tarfile.TarError:
        return False


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= 2**40


def _safetensors(path: Path, file: IO[bytes]) -> tuple[str, Any, dict[str, str]]:
    from safetensors.torch import load

    data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(len(data) - 8, HEADER):
        raise ModelError(str(path), "cut short: a safetensors file that ends within its header", _AGAIN)
    try:
        metadata = parse_json(data[8 : 8 + length].decode()).get("__metadata__") or {}
        tensors = load(data)
    except Exception as error:  # json's, safetensors' and torch's
        raise ModelError(
            str(path), f"a safetensors file that is damaged or cut short ({in_brief(error)})", _AGAIN
        ) from error
    texts = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
    return "safetensors", tensors, texts


def _npz(path: Path, file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays}
    except Exception as error:  # numpy's in a dozen ways, and torch's for types it lacks
        raise ModelError(str(path), f"an npz file whose arrays cannot be read ({in_brief(error)})", _RESAVE) from error


def _legacy(path: Path, file: IO[bytes], head: bytes) -> tuple[Any, dict[str, str]]:
    """Five pickles one after another (magic number, version, machine, content, storage keys), then the numbers."""
    if _MAGIC not in head[:32]:
        names = {part.name for part in _unbuilt(_unpickle(path, file))}
        named = sorted(names, key=lambda name: (name.startswith(("torch.", "collections.")), name))
        shown = f" (it names {ascii(', '.join(named[:3]))[1:-1]})" if named else ""
        raise ModelError(str(path), f"a plain pickle, not written by torch.save{shown}; nothing was run", _RESAVE)
    _, _, machine = (_unpickle(path, file) for _ in range(3))
    if isinstance(machine, dict) and not machine.get("little_endian", True):
        raise ModelError(str(path), "written on a big-endian machine", _RESAVE)
    start = file.tell()
    most = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    storages = Storages(lambda key, nbytes: torch.UntypedStorage(nbytes), most)  # the numbers come after all pickles
    content = _unpickle(path, file, storages)
    keys = _unpickle(path, file)
    for key in keys if isinstance(keys, list) else ():
        untyped = storages.by_key.get(key) if isinstance(key, str) else None
        data = file.read(8 + untyped.nbytes())[8:] if untyped is not None else b""
        if untyped is None or len(data) < untyped.nbytes():
            raise ModelError(str(path), "damaged or cut short: it ends within its tensors", _AGAIN)
        torch.empty(0, dtype=torch.uint8).set_(untyped).copy_(_bytes(data))  # type: ignore[arg-type]
        del storages.by_key[key]
    if storages.by_key:
        raise ModelError(str(path), "damaged or cut short: numbers of its tensors are not there", _AGAIN)
    _check_storages(path, content, None)
    return content, {}


def _unbuilt(content: Any) -> Iterator[Global | Unbuilt]:
    """The classes and functions that a content names, and the objects that were not built."""
    seen, todo = set(), [content]
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen.add(id(value))
            todo += parts(value)
            if isinstance(value, (Global, Unbuilt)):
                yield value


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _unpickle(path: Path, stream: IO[bytes], storages: Storages | None = None) -> Any:
    try:
        return unpickle(stream, storages)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # pickletools raises whatever its decoding of arguments does
        raise ModelError(
            str(path), f"damaged or cut short: its pickle cannot be read ({in_brief(error)})", _AGAIN
        ) from error


def _check_storages(path: Path, content: Any, sizes: set[int] | None) -> None:
    """Refuse tensors that claim more bytes than the file has for them: to touch them would read foreign memory.

    A view may repeat its numbers, which costs nothing until it is copied; so all views together must stay small.
    """
    seen, todo, claimed = set(), [content], 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        todo += parts(value)
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            nbytes = value.untyped_storage().nbytes()
            claimed += value.numel() * value.element_size()
            if claimed > unpacked(path.stat().st_size):
                raise ModelError(str(path), f"its tensors claim {claimed:,} bytes, far more than it has", _AGAIN)
            if nbytes and sizes is not None and nbytes not in sizes:
                raise ModelError(
                    str(path), f"damaged: a tensor claims {nbytes:,} bytes that are not in the file", _AGAIN
                )


def _foreign(path: Path, head: bytes) -> ModelError:
    """What a file that holds no weights seems to be."""
    for magic, (what, todo) in _FOREIGN.items():
        if head.startswith(magic):
            return ModelError(str(path), what, todo)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<")):
        todo = "The download gave an error or a confirmation page: open the link in a browser, or use `gdown`."
        return ModelError(str(path), "a web page saved in place of the file", todo)
    if path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head[:64]):
        return ModelError(str(path), "an ONNX graph", "Save the torch state dict it was exported from.")
    if start.startswith((b"{", b"[")):
        return ModelError(str(path), "JSON, not weights", "Pass the .pt, .pth or .safetensors file beside it.")
    if not head.strip(b"\x00"):
        return ModelError(
            str(path), "begins with nothing but zeros: damaged, or a download that was broken off", _AGAIN
        )
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n\x0c\x1b" for byte in head):
        text = " ".join(head[:80].decode("ascii").split())[:50]
        return ModelError(str(path), f"a text file ({ascii(text)[1:-1]})", "Pass the file of weights.")
    return ModelError(
        str(path), f"of an unknown kind (it begins with {head[:8].hex(' ')})",
        "Checkpoints are torch files (.pt, .pth, .ckpt, .tar), safetensors or npz.",
    )  # fmt: skip
