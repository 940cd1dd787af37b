"""Run a Python file as a module: once per content, with the files of its folder importable while it runs."""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmail.catalog import module_of_name
from robustmail.errors import RecipeError, RobustmailError, asked_to_stop, did_you_mean
from robustmail.recipe import Recipe

__all__ = ["load_source"]

Modules = dict[str, types.ModuleType]


@dataclass(frozen=True)
class _Loaded:
    module: types.ModuleType
    source: bytes
    neighbours: Modules


_LOADED: dict[Path, _Loaded] = {}
_FOLDERS: dict[str, frozenset[str]] = {}  # folder of a file that was run -> names of the modules imported before it
_CONTENTS: dict[str, bytes] = {}  # path of an imported neighbour -> its content at that time


def load_source(path: Path) -> types.ModuleType:
    """Return the module of a Python file: the same one until the file, or one that it imports from its folder, changes.

    Raises RecipeError: a file that cannot be read or fails, with the line; or one that imports a file of its folder
    whose name is that of an imported file in another folder, since a process can hold only one of the two.
    """
    file, source = path.resolve(), _read(path)
    folder = str(file.parent)
    _FOLDERS.setdefault(folder, frozenset(sys.modules))
    of_other_folders = _neighbours(*(other for other in _FOLDERS if other != folder))
    for name in (*of_other_folders, *_edited(folder)):
        del sys.modules[name]
    try:
        known = _LOADED.get(file)
        if known and known.source == source and known.neighbours.items() <= _neighbours(folder).items():
            return known.module
        module = _run(path, file, source)
    finally:
        neighbours = _neighbours(folder)
        for neighbour in neighbours.values():
            _CONTENTS.setdefault(_file(neighbour), _content(neighbour))
        sys.modules.update(of_other_folders)
    if both := sorted(neighbours.keys() & of_other_folders.keys()):
        wrong = f"imports {both[0]} from beside it, which in this process is {_file(of_other_folders[both[0]])}"
        raise RecipeError(str(path), wrong, "Rename one of the two, or use them in two processes.")
    _LOADED[file] = _Loaded(module, source, neighbours)
    return module


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read: {error.strerror}") from error


def _neighbours(*folders: str) -> Modules:
    """The modules that were imported from these folders since the first file of each was run, by name."""
    before = {folder: _FOLDERS[folder] for folder in folders}
    old = frozenset.intersection(*before.values()) if before else sys.modules.keys()  # thousands: not looked at again
    return {
        name: module
        for name, module in sys.modules.copy().items()
        if name not in old and any(f in before and name not in before[f] for f in _import_folders(name, _file(module)))
    }


def _import_folders(name: str, file: str) -> Iterator[str]:
    """The folders from which a module of this name and file can have been imported: FOLDER/TOP.py, FOLDER/TOP/..."""
    top = name.partition(".")[0]
    if file.endswith(f"{os.sep}{top}.py"):
        yield file.removesuffix(f"{os.sep}{top}.py") or os.sep
    place = file.find(f"{os.sep}{top}{os.sep}")
    while place >= 0:
        yield file[:place] or os.sep
        place = file.find(f"{os.sep}{top}{os.sep}", place + 1)


def _edited(folder: str) -> list[str]:
    """Names of all neighbours of a folder if one of them was edited, since they may import each other; else []."""
    neighbours = _neighbours(folder)
    contents = {_file(module): _content(module) for module in neighbours.values()}
    if all(_CONTENTS.get(file, content) == content for file, content in contents.items()):
        return []
    for file in contents:
        _CONTENTS.pop(file, None)
    return list(neighbours)


def _file(module: object) -> str:
    """The path of a module's file, or ""; some entries of sys.modules are not modules."""
    return str(getattr(module, "__dict__", {}).get("__file__") or "")


def _content(module: types.ModuleType) -> bytes:
    file = Path(_file(module))
    return file.read_bytes() if file.is_file() else b""  # the file may have been deleted


def _run(path: Path, file: Path, source: bytes) -> types.ModuleType:
    try:
        code = compile(importlib.util.decode_source(source), str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: not text in the file's encoding
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else "it is not text"
        raise RecipeError(f"{path}{line}", f"not valid Python: {message}") from error
    path_hash = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]  # two files of one name are two modules
    module = types.ModuleType(f"robustmail_file_{path.stem}_{path_hash}")
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    linecache.checkcache(str(path))
    importlib.invalidate_caches()
    folder = str(file.parent)
    sys.path.insert(0, folder)
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        del sys.modules[module.__name__]
        sys.modules.update({module.__name__: before} if before else {})
        if asked_to_stop(error):
            raise
        raise _file_error(path, error) from error
    finally:
        sys.path.remove(folder)
    return module


def _file_error(path: Path, error: BaseException) -> RobustmailError:
    """The error to raise for a file that failed with `error`: with its path and line."""
    location = f"{path}{_line_in(path, error)}"
    if isinstance(error, RobustmailError):
        return type(error)(f"{location}: {error.who}", error.wrong, error.todo)
    return RecipeError(location, f"{type(error).__name__}: {error}", _suggestion(error))


def _suggestion(error: BaseException) -> str:
    """For a misspelt keyword, name or import: the sentence that offers the right one; else ""."""
    if match := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        owner = Recipe if match[1] == "Recipe" else _class(match[1])
        return did_you_mean(match[2], getattr(owner, "__dataclass_fields__", {}))
    match = re.search(r"cannot import name '(\w+)' from 'robustmail'", str(error))
    name = match[1] if match else error.name if isinstance(error, NameError) else None
    return did_you_mean(name, importlib.import_module("robustmail").__all__) if name else ""


def _class(name: str) -> Any:
    return getattr(importlib.import_module(module_of_name()[name]), name) if name in module_of_name() else None


def _line_in(path: Path, error: BaseException) -> str:
    trace, line = error.__traceback__, ""
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
