"""What a disk or a file system may refuse: a full disk, a read-only folder, a lock."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from robustmail.checkpoints import load_saved, save
from robustmail.errors import InUseError, RunError
from robustmail.runtime.files import append, atomic_write, folder_lock, is_in_use


@pytest.mark.parametrize(
    ("number", "todo"), [(errno.ENOSPC, "Free some space"), (errno.EROFS, "Name a folder that you may write to")]
)
def test_an_error_says_what_the_system_says_also_where_a_library_has_put_its_own_on_top(tmp_path: Path, number, todo):
    def fill(temporary: Path) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise RuntimeError("unexpected pos 128 vs 0")  # noqa: B904

    with pytest.raises(RunError, match=f"cannot be written .{os.strerror(number)}.. {todo}"):
        atomic_write(tmp_path / "state.pt", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torch_on_a_full_disk_is_told_in_the_systems_words(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("robustmail.runtime.files.tempfile.mkstemp", lambda *_: (os.dup(1), "/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(RunError, match="No space left on device"):
        save({"weights": torch.zeros(10**5)}, tmp_path / "state.pt")


def test_a_log_on_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(RunError, match="No space left on device"):
        append(tmp_path / "log.txt", "a line")


def test_what_is_saved_twice_has_the_same_bytes(tmp_path: Path):
    content = {"epoch": 1, "weights": torch.arange(3)}
    for name in ("a.pt", "b.pt"):
        save(content, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert load_saved(tmp_path / "a.pt", torch.device("cpu"))["weights"].equal(content["weights"])


def test_a_file_system_without_locks_is_none_that_is_in_use(tmp_path: Path, monkeypatch):
    left = tmp_path / "ledger.csv.robustmail-a1b2c3d4.tmp"
    left.touch()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_lock(tmp_path):
        assert not is_in_use(tmp_path)
    assert left.exists(), "it may be another process's"


def test_a_folder_that_is_locked_is_in_use_until_it_is_not(tmp_path: Path):
    with folder_lock(tmp_path):
        assert is_in_use(tmp_path)
        with pytest.raises(InUseError, match="another process is working in it"), folder_lock(tmp_path):
            pass
    assert not is_in_use(tmp_path)
