"""Atomic writes, folder checks and folder locks; nothing is written outside the folder that was named."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustmail.errors import InUseError, RunError, in_brief

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # anything else: a network's file system that has no locks
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
FREE_SPACE = "Free some space and give the same command again; what was saved stays."
_UMASK = os.umask(0)
os.umask(_UMASK)

__all__ = [
    "FREE_SPACE",
    "SIGNS",
    "append",
    "check_folder",
    "folder_lock",
    "is_in_use",
    "make_folder",
    "opened",
    "remove",
    "atomic_write",
    "atomic_write_json",
    "atomic_write_text",
]

SIGNS = {
    "run": "state.pt", "evaluation": "ledger.csv", "lab": "margins.json", "corruptions": "corruptions.json",
    "curve": "curve.json",
}  # fmt: skip
"""The file that marks a folder of each kind; results of different kinds are never mixed in one folder."""
_MARK = ".robustmail-"
_LEFT = re.compile(re.escape(_MARK) + r"\w{8}\.tmp$")
"""Ending of temporary file names: unique per writer, and recognisable after a writer was killed."""
_UNLOCKED = ("report.html", "curves.png")
"""Files that are written without the lock."""


def atomic_write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Call fill(temporary path beside `path`), then rename the temporary file to `path`.

    Readers see the old file or the new one, also after a kill; a symbolic link is replaced, not followed. Raises
    RunError where the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = None
    try:
        number, name = tempfile.mkstemp(".tmp", f"{path.name}{_MARK}", path.parent)
        os.close(number)
        temporary = Path(name)
        fill(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors and mkstemp give no rights to group and others
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors raise errors of their own for a full disk
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: BaseException) -> RunError:
    """The system's words, such as "No space left on device", also where a library has put its own error on top."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and cause.errno in READ_ONLY:
        return RunError(str(path), f"cannot be written ({cause.strerror})", "Name a folder that you may write to.")
    reason = in_brief(error) if cause is None or not cause.strerror else cause.strerror
    return RunError(str(path), f"cannot be written ({reason})", FREE_SPACE)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append(path: Path, text: str) -> None:
    """Append to a text file. Raises RunError where it is a link or no regular file, or the disk is full."""
    with opened(path, os.O_WRONLY | os.O_APPEND) as number:
        try:
            with open(number, "a", encoding="utf-8", closefd=False) as file:
                file.write(text)
        except OSError as error:
            raise _unwritable(path, error) from error


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Yield the descriptor of a regular file, created if missing. Raises RunError for a link, a pipe or a device."""
    flags |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (*READ_ONLY, errno.ENOSPC) and not path.is_symlink():
            raise _unwritable(path, error) from error
        wrong = "is a symbolic link" if path.is_symlink() else f"cannot be written ({error.strerror})"
        raise RunError(str(path), wrong, "Delete it, or pass another --out.") from error
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise RunError(str(path), "is no regular file", "Delete it, or pass another --out.")
        yield number
    finally:
        os.close(number)


def make_folder(folder: Path, ours: Iterable[str] | None = None, kind: str = "") -> None:
    """Create a folder if needed; with `ours`, check that these files may be written (raises as `check_folder`)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(str(folder), f"cannot be made ({error.strerror})", "Pass another --out.") from error
    if ours is not None:
        check_folder(folder, ours, kind)


def check_folder(folder: Path, ours: Iterable[str], kind: str) -> None:
    """Check that files of these names may be written into an existing folder.

    folder: an existing folder; files of other names in it are ignored, and stay.
    ours: names that would be written.
    kind: of the results, a key of SIGNS.

    Raises RunError for a folder of another kind, and where files of these names are not robustmail's.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise RunError(str(folder), f"cannot be read ({error.strerror})", "Pass another --out.") from error
    of_a_run = kind == "run" and bool(names & {SIGNS["run"], "recipe.json"})  # which ends in an evaluation
    for other, sign in SIGNS.items():
        if sign in names and other != kind and not (of_a_run and other == "evaluation"):
            article = "an" if other == "evaluation" else "a"
            raise RunError(str(folder), f"is no {kind}'s: it holds {sign}, {article} {other}'s", "Pass another --out.")
    taken = sorted(names & {*ours} - {"lock"})
    if taken and not _is_lock(folder / "lock") and SIGNS.get(kind) not in names:
        wrong = f"holds {', '.join(taken[:3])}, which would be overwritten, but no {kind}"
        raise RunError(str(folder), wrong, "Pass another --out.")


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete the files of these names, and temporary files that killed writers of them have left."""
    names = list(names)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for path in _leftovers(folder):
        if _LEFT.sub("", path.name) in names:
            path.unlink(missing_ok=True)


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _LEFT.search(path.name)] if folder.is_dir() else []


def _is_lock(path: Path) -> bool:
    """Our lock is an empty regular file."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_size == 0


def is_in_use(folder: Path) -> bool:
    """Whether another process holds the lock of a folder. Writes nothing; False where the platform has no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        number = os.open(folder / "lock", os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(number)  # and gives the lock back
    return False


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process inside the block; the system releases the lock when the process ends.

    Without effect where the platform or the file system has no locks. Raises InUseError where another process holds the
    lock.
    """
    with opened(folder / "lock", os.O_RDWR) as number:
        if _locked(number, folder):
            for path in _leftovers(folder):  # of killed writers: a living one would hold the lock
                if _LEFT.sub("", path.name) not in _UNLOCKED:
                    path.unlink(missing_ok=True)
        yield


def _locked(number: int, folder: Path) -> bool:
    """Lock an open file; whether there are locks here. Raises InUseError."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            todo = "Wait for it, or pass another --out."
            raise InUseError(str(folder), "another process is working in it", todo) from error
        return False
    return True
