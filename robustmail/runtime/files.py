"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from robustmail.errors import InUseError, RunError, in_brief

_UMASK = os.umask(0)
os.umask(_UMASK)

__all__ = ["folder_lock", "make_folder", "atomic_write", "atomic_write_json", "atomic_write_text"]


def atomic_write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a temporary file beside `path`, then put it in its place at once.

    A reader, and a process killed at any moment, sees the old file or the new one. Raises RunError where the disk is
    full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        fill(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors writes for the owner's eyes alone
        os.replace(temporary, path)
    except Exception as error:  # torch's and safetensors' writers have errors of their own for a full disk
        temporary.unlink(missing_ok=True)
        raise RunError(
            str(path), f"cannot be written ({in_brief(error)})",
            "Free some space or pass --out DIR; the same command then goes on from the last saved state.",
        ) from error  # fmt: skip


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def make_folder(folder: Path, ours: Iterable[str] | None = None, kind: str = "") -> None:
    """Make a folder, or see that nothing but files of `ours`, whole or half written, lies in it (raises RunError)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise RunError(str(folder), f"cannot be made ({error.strerror})", "Pass another --out.") from error
    foreign = [name for name in names if ours is not None and name.removesuffix(".tmp") not in {*ours}]
    if foreign:
        wrong = f"holds things that are no {kind}'s: {', '.join(foreign[:3])}"
        raise RunError(str(folder), wrong, "Pass an empty folder with --out.")


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a folder; the lock falls with the process, however it ends.

    Raises InUseError where another one does.
    """
    try:
        import fcntl
    except ImportError:  # no such thing on this platform
        yield
        return
    with _open_lock(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUseError(
                str(folder), "another process is working in it", "Wait for it, or pass another --out."
            ) from error
        yield


def _open_lock(folder: Path) -> TextIO:
    try:
        return open(folder / "lock", "w")
    except OSError as error:
        raise RunError(str(folder), f"cannot be written ({error.strerror})", "Pass another --out.") from error
