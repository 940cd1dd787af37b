"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustmail.errors import RunError

_UMASK = os.umask(0)
os.umask(_UMASK)

__all__ = ["write", "write_json", "write_text"]


def write(path: Path, fill: Callable[[Path], Any]) -> None:
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
            str(path), f"cannot be written ({' '.join(str(error).split())[:160]})",
            "Free some space or pass --out DIR; the same command then goes on from the last saved state.",
        ) from error  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
