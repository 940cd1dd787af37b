"""Pickles, read without importing or calling anything: an interpreter of their instructions that knows tensors only.

Python's and torch's unpicklers build objects by importing their classes. This one answers every name that it does not
know with an `Unbuilt`, a dictionary that remembers what the pickle would have done with it. So tensors can be had from
a file that also holds arguments, loggers or a whole nn.Module, of classes that nobody here has. It reads protocols 0-5.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SETSTATE", "Global", "Storage", "Unbuilt", "parts", "unpickle"]

LONGEST = 3_000_000
"""instructions; the checkpoint of a thousand-layer network with its optimizer has some 200,000"""
MOST_COPIED = 2**25
"""elements and letters of all arguments of calls, which copy them"""
_NAME = 200
"""letters of the name of a class"""
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


def unpickle(stream: IO[bytes], load_storage: Callable[[Any], Storage] | None = None) -> Any:
    """The content of the next pickle in a stream: plain values, tensors, and `Unbuilt` for everything else.

    load_storage: called with the persistent id of a storage, as torch.save writes it.
    Raises ValueError: no pickle, a damaged one, or one of more than LONGEST instructions.
    """
    return _Machine(load_storage).run(stream)


_MARK = object()
_TEXTS = {"SHORT_BINSTRING", "BINSTRING"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "UNICODE",
           "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
           "BYTEARRAY8"}  # fmt: skip
_NEW = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list}
_IGNORED = {"PROTO", "FRAME", "STOP"}


class _Machine:
    """The stack, the memo and the instructions of a pickle."""

    def __init__(self, load_storage: Callable[[Any], Storage] | None) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.load_storage = load_storage

    def run(self, stream: IO[bytes]) -> Any:
        for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= LONGEST:
                raise PickleError(f"a pickle of more than {LONGEST:,} instructions")
            self.step(code.name, argument)
        return self.pop()

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("a pickle that takes more than it has")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            if (item := self.stack.pop()) is _MARK:
                return items[::-1]
            items.append(item)
        raise PickleError("a pickle that takes more than it has")

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction, by pickletools' name of it."""
        push = self.stack.append
        if name in _VALUES:
            push(argument)
        elif name in _TEXTS:
            push(_text(argument))
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _NEW:
            push(_NEW[name]())
        elif name == "MARK":
            push(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if int(argument) not in self.memo:
                raise PickleError("a pickle that asks for what it never had")
            push(self.memo[int(argument)])
        elif name.startswith("TUPLE"):
            items = self.pop_to_mark() if name == "TUPLE" else [self.pop() for _ in range(int(name[-1]))][::-1]
            push(tuple(items))
        elif name in ("LIST", "FROZENSET"):
            push(self.pop_to_mark())
        elif name == "DICT":
            items = self.pop_to_mark()
            push({})
            self.set_items(items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            self.append([self.pop()] if name == "APPEND" else self.pop_to_mark())
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items([self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark())
        elif name == "POP":
            if not self.stack:
                raise PickleError("a pickle that takes more than it has")
            self.stack.pop()
        elif name == "POP_MARK":
            self.pop_to_mark()
        elif name == "DUP":
            push(self.top())
        else:
            self.call_or_name(name, argument)

    def call_or_name(self, name: str, argument: Any) -> None:
        """Execute an instruction that would import or call something."""
        push = self.stack.append
        if name == "GLOBAL":
            push(_global(*str(argument).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            push(_global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = self.pop(), self.pop()
            push(self.call(function, args))
        elif name == "NEWOBJ_EX":
            knobs, args, function = self.pop(), self.pop(), self.pop()
            push(self.call(function, args, knobs))
        elif name == "INST":
            push(self.call(_global(*str(argument).split(" ", 1)), tuple(self.pop_to_mark())))
        elif name == "OBJ":
            function, *args = self.pop_to_mark() or [None]
            push(self.call(function, tuple(args)))
        elif name == "BUILD":
            state, built = self.pop(), self.top()
            if isinstance(built, Unbuilt):
                built.build(state)
        elif name == "BINPERSID":
            push(self.persistent(self.pop()))
        elif name.startswith("EXT"):
            push(Global(f"copyreg extension {argument}"))
        elif name not in _IGNORED:
            raise PickleError(f"a pickle with the instruction {name}, which no checkpoint has")

    def call(self, function: Any, args: Any, knobs: Any = None) -> Any:
        """What a call gives: a value of a known function, else an `Unbuilt`, which remembers the call."""
        sized = (str, bytes, bytearray, list, tuple, dict)
        self.copied += sum(len(arg) for arg in args if isinstance(arg, sized)) if isinstance(args, tuple) else 0
        if self.copied > MOST_COPIED:
            raise PickleError(f"a pickle whose calls copy more than {MOST_COPIED:,} elements")
        return _call(function, args, knobs)

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target += items
        elif isinstance(target, Unbuilt):
            target.elements += items
        else:
            raise PickleError(f"a pickle that appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError(f"a pickle that sets items of a {type(target).__name__}")
        target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def persistent(self, key: Any) -> Any:
        kind = key[0] if isinstance(key, tuple) and key else None
        if kind == "module" and len(key) > 1:  # before 1.6: a class, with the source of its code, which is left
            return key[1]
        if kind != "storage" or self.load_storage is None:
            raise PickleError("a pickle with an object that lies elsewhere")
        return self.load_storage(key)


def _key(key: Any) -> Any:
    """A key of a dictionary. Python hashes nested tuples without a bound, so these are kept out of it."""
    is_flat = isinstance(key, tuple) and not any(isinstance(part, (tuple, list, dict)) for part in key)
    is_plain = isinstance(key, (str, bytes, int, float, Global, Unbuilt, torch.dtype, type(None))) or is_flat
    return key if is_plain else Unbuilt(type(key).__name__)


def _text(argument: str) -> Any:
    """A text of Python 2, which pickletools decodes as latin-1."""
    data = argument.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _global(module: Any, name: Any) -> Any:
    """A name, as Python 3 has it; or what it stands for, where that is a dtype."""
    if not (isinstance(module, str) and isinstance(name, str)):
        return Global("(computed)")
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    return Global(f"{module}.{name}"[:_NAME])


def _call(function: Any, args: Any, knobs: Any = None) -> Any:
    name = function.name if isinstance(function, (Global, Unbuilt)) else "(computed)"
    if isinstance(function, Global) and isinstance(args, tuple) and (known := _KNOWN.get(name)):
        return known(*args)
    if name in ("copyreg._reconstructor", "copyreg.__newobj__") and args and isinstance(args[0], Global):
        name = args[0].name
    return Unbuilt(name, (args, knobs) if knobs else args)


# What is known


def _dictionary(*args: Any) -> dict[Any, Any]:
    """OrderedDict(), OrderedDict([[name, value], ...]), defaultdict(kind) and their like."""
    given = next((arg for arg in args if isinstance(arg, (dict, list, tuple))), ())
    if isinstance(given, dict):
        return dict(given)
    return {_key(pair[0]): pair[1] for pair in given if isinstance(pair, (list, tuple)) and len(pair) == 2}


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
    return Unbuilt(function.name, args) if is_nested else _call(function, args)


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


def parts(value: Any) -> Iterator[Any]:
    """The values within a value that `unpickle` returned."""
    if isinstance(value, dict):
        yield from value.values()
    if isinstance(value, (list, tuple, set)):
        yield from value
    if isinstance(value, Unbuilt):
        yield from value.state.values()
        yield from value.elements
        yield value.args
