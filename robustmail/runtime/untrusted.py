"""What comes from a file is data: it never names code that is then run, nor a path that is opened elsewhere.

Everything that reads a folder which somebody else may have written goes through here. What the user names on the
command line is trusted; what is found in a file is not. SECURITY.md says the same for people.
"""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from robustmail.catalog import catalog_entries
from robustmail.errors import RecipeError, RunError

__all__ = [
    "HEADER", "beside", "check_inside", "check_shape", "check_tensors", "check_unpacked", "check_within", "data_source",
    "inside", "is_code", "parse_json", "printable", "quoted", "read_bytes", "read_json", "read_text", "unpacked",
    "verify_command",
]  # fmt: skip

LARGEST = 64 * 2**20
"""bytes of a text file, and what a compressed file of any size may unpack to"""
RATIO = 100
"""how many times its own size a larger one may unpack to; weights and images shrink to a tenth at most"""
DEEPEST = 40
"""levels of brackets in JSON"""
LONGEST = 300
"""letters of a name"""
HEADER = 100 * 10**6
"""bytes of a safetensors header, as the library has it"""


# Files


def check_inside(path: Path) -> None:
    """Refuse what is no regular file, and a link that leads out of the file's own folder.

    Raises RunError, FileNotFoundError where there is nothing.
    """
    check_within(path, path.parent)
    if not stat.S_ISREG(path.stat().st_mode):
        raise RunError(str(path), "is no regular file")


def check_within(path: Path, folder: Path) -> None:
    """Refuse a path that links lead out of a folder (raises RunError); there need not be anything yet."""
    try:
        real = path.resolve()
    except RuntimeError as error:  # a ring of links
        raise RunError(str(path), "is a symbolic link to itself") from error
    if not real.is_relative_to(folder.resolve()):
        wrong = f"is a symbolic link that leads out of {folder}"
        raise RunError(str(path), wrong, "Name its target itself, or copy it into there.")


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """A file of a folder, whole. Raises RunError as `check_inside`, or where it is too large; and OSError."""
    check_inside(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise RunError(str(path), f"has more than {most >> 20} MiB, which no file of this kind has")
    return content


def read_text(path: Path) -> str:
    """A UTF-8 file of a folder, with its line ends as they are. Raises as `read_bytes`, and ValueError."""
    return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    """A JSON file of a folder. Raises as `read_bytes`, and ValueError as `parse_json`."""
    return parse_json(read_text(path))


def inside(folder: Path, name: object) -> Path | None:
    """The file of that name in a folder; None where there is none, or the name is none but a path.

    Raises RunError as `check_inside`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name) or len(name) > LONGEST:
        return None
    try:
        check_inside(folder / name)
    except FileNotFoundError:
        return None
    return folder / name


# JSON


def parse_json(text: str) -> Any:
    """JSON without what two readers might read differently or what breaks the next one.

    Raises ValueError: no JSON, a key that is there twice, NaN or infinity, whole numbers beyond 64 bits, texts that are
    no Unicode, brackets too deep.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite, parse_int=_small)
    except RecursionError as error:
        raise ValueError("brackets too deep") from error
    todo = [(found, 0)]
    while todo:
        value, depth = todo.pop()
        if depth > DEEPEST:
            raise ValueError("brackets too deep")
        if isinstance(value, str):
            value.encode()  # a lone surrogate can be neither printed nor written
        elif isinstance(value, dict):
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            todo += [(part, depth + 1) for part in value]
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!a} is there twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse(text[:40])


def _small(text: str) -> int:
    return value if len(text) < 20 and -(2**63) <= (value := int(text)) < 2**63 else _refuse(text[:40])


def check_shape(value: Any, shape: Any, where: str = "it") -> None:
    """Compare parsed JSON with a shape: a type, (several shapes), {key: shape}, [shape of each]; None is null.

    A dictionary may hold more than the keys that are named, and lack those that end in "?", or have null there; "*" is
    every key. Raises ValueError naming the place.
    """
    if isinstance(shape, tuple):
        if not any(_fits(value, one) for one in shape):
            raise ValueError(f"{where} is {type(value).__name__}")
        shape = next(one for one in shape if _fits(value, one))
    elif not _fits(value, shape):
        raise ValueError(f"{where} is {type(value).__name__}")
    if isinstance(shape, dict):
        for key, part in shape.items():
            for name in value if key == "*" else (key.removesuffix("?"),):
                if name not in value and name == key:
                    raise ValueError(f"{where} has no {name}")
                if not key.endswith("?") or value.get(name) is not None:
                    check_shape(value[name], part, f"{where}.{name}")
    elif isinstance(shape, list):
        for i, part in enumerate(value):
            check_shape(part, shape[0], f"{where}[{i}]")


def _fits(value: Any, shape: Any) -> bool:
    if shape is None or isinstance(value, bool):
        return value is None if shape is None else shape is bool
    kind = shape if isinstance(shape, type) else type(shape)
    return isinstance(value, (int, float) if kind is float else kind)


# Archives and tensors


def unpacked(size: int) -> int:
    """Bytes that a compressed file of that size may unpack to."""
    return max(RATIO * size, LARGEST)


def check_unpacked(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse a zip, a file of that size, that announces far more than it holds (raises ValueError).

    No member can give more than it announces: zipfile stops there. An npy file in it announces its array, too.
    """
    most = unpacked(size)
    if (announced := sum(member.file_size for member in archive.infolist())) > most:
        raise ValueError(f"it unpacks from {size:,} bytes to {announced:,}")
    for member in archive.infolist():
        if member.filename.endswith(".npy"):
            with archive.open(member) as file:
                _check_array(file, member)


def _check_array(file: IO[bytes], member: zipfile.ZipInfo) -> None:
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename[:40]!a} announces more numbers than it has")


def check_tensors(path: Path) -> None:
    """Refuse a safetensors file of a folder whose header announces more than there is.

    Raises as `check_inside`, and ValueError.
    """
    check_inside(path)
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8 or struct.unpack("<Q", start)[0] > min(HEADER, path.stat().st_size):
        raise ValueError("it ends within its header")


# Names of data and models


def data_source(text: object) -> Callable[[], Any] | None:
    """The built-in data source that a file names: `digits()`, `cifar10(validation=500)`, or a subset of one.

    None for everything else: paths, own and installed sources, texts as arguments but where they are the argument's
    default, and arguments that the source does not take.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        return None
    try:
        return _source(ast.parse(text, mode="eval").body)
    except (RecipeError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _source(node: ast.expr) -> Callable[[], Any] | None:
    called, args, words = (node.func, node.args, node.keywords) if isinstance(node, ast.Call) else (node, [], [])
    entry = catalog_entries("data").get(called.id) if isinstance(called, ast.Name) else None
    if entry is None or not entry.module:
        return None
    kind = getattr(import_module(entry.module), entry.name)
    fields = kind.__dataclass_fields__
    if len(args) > len(fields):
        return None
    knobs: dict[str, Any] = {}
    for name, part in [*zip(fields, args, strict=False), *((word.arg, word.value) for word in words)]:
        value = _source(part) if isinstance(part, ast.Call) else ast.literal_eval(part)
        number = value is None or isinstance(value, (bool, int, float))
        default = name in fields and value == fields[name].default
        if name is None or (isinstance(part, ast.Call) and value is None) or not (number or default or callable(value)):
            return None
        knobs[name] = value
    made: Callable[[], Any] = kind(**knobs)
    return made


def is_code(model: object) -> bool:
    """Does a recorded model name a function in somebody's file, rather than a network of timm or ours?"""
    return isinstance(model, str) and ".py:" in model


def verify_command(folder: Path, spec: Mapping[str, Any]) -> str:
    """The command that verifies an evaluation, with all that its results name and that may not be opened unasked."""
    words = ["robustmail", "verify", str(folder)]
    if spec.get("checkpoint") and beside(folder, spec["checkpoint"]) is None:
        words += ["--checkpoint", spec["checkpoint"]]
    if spec.get("data_given") and data_source(spec["data_given"]) is None:
        words += ["--data", spec["data_given"]]
    if is_code(spec.get("model")):
        words += ["--model", spec["model"]]
    return quoted(*words)


def beside(folder: Path, recorded: object) -> Path | None:
    """The file in a folder that has the name of the recorded path, if there is one that does not lead out of it."""
    try:
        return inside(folder, re.split(r"[/\\]", recorded)[-1]) if isinstance(recorded, str) else None
    except RunError:
        return None


def quoted(*words: object) -> str:
    """Words of a command to copy; one that would not survive copying is left for the reader to write."""
    texts = [str(word) for word in words]
    return shlex.join(text if text.isprintable() and len(text) <= LONGEST else "..." for text in texts)


def printable(text: str) -> str:
    """One line without control characters: a name from a file must not steer a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
