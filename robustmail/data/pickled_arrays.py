"""Arrays in a pickle, read without running any of it: Carmon et al.'s 500,000 pseudo-labelled images are one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.checkpoints.pickle_values import SETSTATE, Unbuilt
from robustmail.checkpoints.unpickler import unpickle
from robustmail.data.dataset import Split
from robustmail.data.image_arrays import as_split
from robustmail.errors import DataError, in_brief

__all__ = ["is_pickle", "read_pickle"]

KEYS = ("data", "extrapolated_targets")
"""of the images and of their labels"""
SAVE = "Save the arrays with numpy.savez(FILE, image=x, label=y)."
_PLAIN = re.compile(r"[<>|=][iu][1248]")


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


def read_pickle(who: str, path: Path) -> Split:
    """The images and pseudo-labels of a pickle, a dictionary with data and extrapolated_targets.

    who: the data, for errors. Raises DataError: damaged, or something else.
    """
    try:
        with open(path, "rb") as file:
            content = unpickle(file)
    except (ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        todo = f"It is damaged, or older than protocol 3. {SAVE}"
        raise DataError(who, f"not a readable pickle ({in_brief(error)})", todo) from error
    x, y = (_array(content.get(key)) if isinstance(content, dict) else None for key in KEYS)
    if x is None or y is None:
        wrong = f"is a pickle without the arrays {' and '.join(KEYS)}"
        raise DataError(who, wrong, SAVE)
    return as_split(who, x, y, copy=False)


def _array(value: Any) -> Any:
    """The array of whole numbers that a pickle describes; None for anything else."""
    state = _state(value, "multiarray._reconstruct", 5)
    if state is None:
        return None
    _, shape, dtype, fortran, data = state
    kind = _dtype(dtype)
    whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if kind is None or not whole or not isinstance(data, bytes) or math.prod(shape) * kind.itemsize != len(data):
        return None
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C").copy()  # of bytes, which are fixed


def _dtype(value: Any) -> Any:
    """numpy's type of whole numbers; None for another."""
    state, text = _state(value, "numpy.dtype", 8), value.args[0] if isinstance(value, Unbuilt) and value.args else ""
    order = state[1] if state else "="
    text = f"{order}{text}"
    return np.dtype(text) if isinstance(order, str) and _PLAIN.fullmatch(text) else None


def _state(value: Any, name: str, length: int) -> Any:
    """What an object of that class would be built from, a tuple of that length; None for another value."""
    state = value.state.get(SETSTATE) if isinstance(value, Unbuilt) and value.name.endswith(name) else None
    return state if isinstance(state, tuple) and len(state) == length else None
