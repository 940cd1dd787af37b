"""What a pickle may stand for: tensors and plain values, and placeholders for everything that is not built."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Global", "MOST_COPIED", "PickleError", "SETSTATE", "Storage", "Unbuilt", "call_known", "as_key"]

MOST_COPIED = 2**25
"""elements and letters of all arguments of calls, which copy them"""


SETSTATE = "__setstate__"


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names; nothing is imported."""

    name: str


class Unbuilt(dict[Any, Any]):
    """What would be an object of an unknown class, or the result of an unknown function.

    name: of the class or function. args: of the call. state: the attributes that it would get, and as SETSTATE what it
    would get in place of attributes, as numpy's arrays do. elements: what would be appended to it. Its items are those
    that the pickle puts into it, as into a dictionary.
    """

    __slots__ = ("args", "elements", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        super().__init__()
        self.name = name
        self.args = args
        self.state: dict[Any, Any] = {}
        self.elements: list[Any] = []

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"Unbuilt({self.name!r})"

    def build(self, state: Any) -> None:
        """Take the attributes of a BUILD instruction: a dictionary, a pair of one and another for slots, or a tuple."""
        if isinstance(state, tuple) and len(state) > 2:
            self.state[SETSTATE] = state
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                self.state = {**self.state, **part} if self.state else part


@dataclass(frozen=True)
class Storage:
    """Numbers of a file that tensors are views of.

    untyped: the bytes. dtype: of the numbers; None if the tensor says it. offset: of the first byte. nbytes: in all.
    """

    untyped: torch.UntypedStorage
    dtype: torch.dtype | None
    offset: int = 0
    nbytes: int = 0


class PickleError(ValueError):
    """A pickle that no version of Python writes, or that is cut short."""


def as_key(key: Any) -> Any:
    """A key of a dictionary. Python hashes nested tuples without a bound, so these are kept out of it."""
    is_flat = isinstance(key, tuple) and not any(isinstance(part, (tuple, list, dict)) for part in key)
    is_plain = isinstance(key, (str, bytes, int, float, Global, Unbuilt, torch.dtype, type(None))) or is_flat
    return key if is_plain else Unbuilt(type(key).__name__)


def call_known(function: Any, args: Any, knobs: Any = None) -> Any:
    """The value of a call in a pickle: of the few functions that are known, else a placeholder."""
    name = function.name if isinstance(function, (Global, Unbuilt)) else "(computed)"
    if isinstance(function, Global) and isinstance(args, tuple) and (known := _KNOWN.get(name)):
        return known(*args)
    if name in ("copyreg._reconstructor", "copyreg.__newobj__") and args and isinstance(args[0], Global):
        name = args[0].name
    return Unbuilt(name, (args, knobs) if knobs else args)


def _dictionary(*args: Any) -> dict[Any, Any]:
    """OrderedDict(), OrderedDict([[name, value], ...]), defaultdict(kind) and their like."""
    given = next((arg for arg in args if isinstance(arg, (dict, list, tuple))), ())
    if isinstance(given, dict):
        return dict(given)
    return {as_key(pair[0]): pair[1] for pair in given if isinstance(pair, (list, tuple)) and len(pair) == 2}


def _sequence(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], (list, tuple)) else []


def _bytes(text: Any = "", *_: Any) -> Any:
    return text.encode("latin-1", "replace") if isinstance(text, str) else b""


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def _size(shape: Any = (), *_: Any) -> tuple[int, ...]:
    return _integers(shape)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > 64 or not all(type(v) is int for v in values):
        raise PickleError("a tensor whose shape is none")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
    """A tensor over a storage of the file; everything that is claimed is checked. more: what gradients would need."""
    return _view(storage, storage.dtype if isinstance(storage, Storage) else None, offset, size, stride)


def _tensor_with_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *more: Any
) -> Any:
    return _view(storage, dtype, offset, size, stride)


def _view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Any:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        return Unbuilt("torch.Tensor")
    size, stride, (offset,) = _integers(size), _integers(stride), _integers([offset])
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or max((offset, *size, *stride)) >= 2**48:
        raise PickleError("a tensor whose shape is none")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else -1
    needed = (offset + last + 1) * dtype.itemsize
    if needed > storage.nbytes:
        raise PickleError(f"a tensor claims {needed:,} bytes that are not in the file")
    start, rest = divmod(storage.offset, dtype.itemsize)
    if rest:
        raise PickleError("a tensor that begins within a number")
    return torch.empty(0, dtype=dtype).set_(storage.untyped, start + offset, size, stride)  # type: ignore[arg-type]


def _parameter(data: Any = None, *_: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor of a subclass, as timm's or a library's own."""
    is_nested = isinstance(function, Global) and function.name == "torch._tensor._rebuild_from_type_v2"
    return Unbuilt(function.name, args) if is_nested else call_known(function, args)


def _quantised(*_: Any) -> Tensor:
    """In place of any quantised tensor: weights that cannot be used, whatever their numbers."""
    tensor: Tensor = torch._empty_affine_quantized([1, 1], scale=1.0, zero_point=0, dtype=torch.qint8)
    return tensor


def _sparse(*_: Any) -> Tensor:
    """In place of any sparse tensor."""
    return torch.eye(1).to_sparse()


def _without_numbers(*_: Any) -> Tensor:
    """In place of a tensor on the meta device or of an accelerator that keeps its numbers elsewhere."""
    return torch.empty(1, 1, device="meta")


_DTYPE = re.compile(r"[<>|=]?[biufS]\d{1,2}")


def _numpy_dtype(text: Any = "", *_: Any) -> Any:
    return Unbuilt("numpy.dtype", (text,))


def _numpy_scalar(dtype: Any = None, data: Any = b"", *_: Any) -> Any:
    """A number of numpy, as Python's own."""
    text = dtype.args[0] if isinstance(dtype, Unbuilt) and dtype.name == "numpy.dtype" else ""
    if not isinstance(text, str) or not _DTYPE.fullmatch(text) or not isinstance(data, bytes):
        return Unbuilt("numpy.scalar")
    kind = np.dtype(text)
    return np.frombuffer(data, kind, 1)[0].item() if len(data) == kind.itemsize else Unbuilt("numpy.scalar")


_KNOWN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"),
                    _dictionary),
    **dict.fromkeys(("builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset"), _sequence),
    "_codecs.encode": _bytes, "builtins.complex": _complex, "torch.Size": _size,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar, "numpy._core.multiarray.scalar": _numpy_scalar,
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter, "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter, "torch.nn.parameter.Buffer": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_qtensor": _quantised, "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_numbers,
    "torch._utils._rebuild_device_tensor_from_numpy": _without_numbers,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data=None, *_: data,
}  # fmt: skip
"""functions that a pickle may call: ours, under the names of those that they stand for"""
