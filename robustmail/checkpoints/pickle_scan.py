"""What a pickle would import and call, read off its instructions. Nothing is executed."""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections.abc import Iterator
from typing import IO, Any

__all__ = ["LONGEST", "PickleTooLongError", "global_names"]

LONGEST = 3_000_000
"""instructions; the checkpoint of a thousand-layer network with its optimizer has some 200,000"""

_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}


class PickleTooLongError(ValueError):
    """More instructions than any checkpoint has."""


def global_names(stream: IO[bytes], pickles: int = 1) -> list[str]:
    """The `module.name` of every global in the next pickles of a stream, in order of appearance.

    A name that the pickle computes, rather than spells out, is listed as `(computed)`. Raises ValueError where the
    stream is no pickle or ends early, and its kind PickleTooLongError.
    """
    names: dict[str, None] = {}
    count = 0
    for _ in range(pickles):
        for name in _globals(stream):
            count += 1
            if count > LONGEST:
                raise PickleTooLongError(f"more than {LONGEST:,} instructions")
            if name:
                names[name] = None
    return list(names)


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """The global that each instruction names, or nothing.

    Only what STACK_GLOBAL needs is followed: which texts were pushed last, and which of them are in the memo.
    """
    pushed: list[Any] = [None, None]
    memo: dict[int, Any] = {}
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST"):
            yield _modern(*str(argument).split(" ", 1))
        elif code.name == "STACK_GLOBAL":
            module, name = pushed
            spelled = isinstance(module, str) and isinstance(name, str)
            yield f"{module}.{name}" if spelled else "(computed)"
        else:
            yield ""
        if code.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif code.name in _PUT:
            memo[int(argument or 0)] = pushed[-1]
        elif code.stack_after:
            given = memo.get(int(argument or 0)) if code.name in _GET else argument if code.name in _TEXT else None
            pushed = [pushed[-1], given]


def _modern(module: str, name: str = "") -> str:
    """The name in Python 3 of a global as protocol 2 writes it."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
