"""A Python file as a module: run once for each content, with the files beside it importable while it runs."""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import re
import sys
import types
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
_FOLDERS: dict[Path, frozenset[str]] = {}  # of the files that were run, with the modules that were there before
_CONTENTS: dict[str, bytes] = {}  # of the neighbours that were imported


def load_source(path: Path) -> types.ModuleType:
    """The module of a Python file: always the same one, until the file or one that it imports from beside it is edited.

    Raises RecipeError: a file that fails (with the line), or one that imports a neighbour of the same name as another
    file's neighbour in another folder, for of these the process can have but one.
    """
    file, source = path.resolve(), _read(path)
    folder = file.parent
    _FOLDERS.setdefault(folder, frozenset(sys.modules))
    others = {name: module for f in _FOLDERS if f != folder for name, module in _neighbours(f).items()}
    for name in (*others, *_edited(folder)):
        del sys.modules[name]
    try:
        known = _LOADED.get(file)
        if known and known.source == source and known.neighbours.items() <= _neighbours(folder).items():
            return known.module
        module = _run(path, file, source)
    finally:
        mine = _neighbours(folder)
        for neighbour in mine.values():
            _CONTENTS.setdefault(_file(neighbour), _content(neighbour))
        sys.modules.update(others)
    if both := sorted(mine.keys() & others.keys()):
        wrong = f"imports {both[0]} from beside it, which in this process is {_file(others[both[0]])}"
        raise RecipeError(str(path), wrong, "Rename one of the two, or use them in two processes.")
    _LOADED[file] = _Loaded(module, source, mine)
    return module


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read: {error.strerror}") from error


def _neighbours(folder: Path) -> Modules:
    """What was imported from a folder since its first file was run."""
    before = _FOLDERS[folder]
    return {n: m for n, m in sys.modules.copy().items() if n not in before and _lies_in(folder, n, m)}


def _lies_in(folder: Path, name: str, module: object) -> bool:
    top = str(folder / name.partition(".")[0])
    return _file(module) == f"{top}.py" or _file(module).startswith(f"{top}{os.sep}")


def _edited(folder: Path) -> list[str]:
    """All neighbours in a folder where one of them is not what was imported, for they may import each other."""
    mine = _neighbours(folder)
    now = {_file(module): _content(module) for module in mine.values()}
    if all(_CONTENTS.get(file, content) == content for file, content in now.items()):
        return []
    for file in now:
        _CONTENTS.pop(file, None)
    return list(mine)


def _file(module: object) -> str:
    """Where a module comes from, or nothing; some entries of sys.modules are no modules."""
    return str(getattr(module, "__dict__", {}).get("__file__") or "")


def _content(module: types.ModuleType) -> bytes:
    file = Path(_file(module))
    return file.read_bytes() if file.is_file() else b""  # it may be gone by now


def _run(path: Path, file: Path, source: bytes) -> types.ModuleType:
    try:
        code = compile(importlib.util.decode_source(source), str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: bytes that are no text
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else "it is not text"
        raise RecipeError(f"{path}{line}", f"not valid Python: {message}") from error
    mark = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]  # two files of one stem are two modules
    module = types.ModuleType(f"robustmail_file_{path.stem}_{mark}")
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses look their module up
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
        raise _told(path, error) from error
    finally:
        sys.path.remove(folder)
    return module


def _told(path: Path, error: BaseException) -> RobustmailError:
    """The error of a file that fails, with the line in it."""
    at = f"{path}{_line_in(path, error)}"
    if isinstance(error, RobustmailError):
        return type(error)(f"{at}: {error.who}", error.wrong, error.todo)
    return RecipeError(at, f"{type(error).__name__}: {error}", _hint(error))


def _hint(error: BaseException) -> str:
    """What a misspelt keyword, name or import was meant to be."""
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        owner = Recipe if found[1] == "Recipe" else _class(found[1])
        return did_you_mean(found[2], getattr(owner, "__dataclass_fields__", {}))
    found = re.search(r"cannot import name '(\w+)' from 'robustmail'", str(error))
    name = found[1] if found else error.name if isinstance(error, NameError) else None
    return did_you_mean(name, importlib.import_module("robustmail").__all__) if name else ""


def _class(name: str) -> Any:
    return getattr(importlib.import_module(module_of_name()[name]), name) if name in module_of_name() else None


def _line_in(path: Path, error: BaseException) -> str:
    trace, found = error.__traceback__, ""
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return found
