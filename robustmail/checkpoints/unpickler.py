"""Pickles, read without importing or calling anything: an interpreter of their instructions that knows tensors only.

Python's and torch's unpicklers build objects by importing their classes. This one answers every name that it does not
know with an `Unbuilt`, a dictionary that remembers what the pickle would have done with it. So tensors can be had from
a file that also holds arguments, loggers or a whole nn.Module, of classes that nobody here has. It reads protocols 0-5.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch

from robustmail.checkpoints.pickle_values import MOST_COPIED, Global, PickleError, Storage, Unbuilt, as_key, call_known

__all__ = ["parts", "unpickle"]

LONGEST = 3_000_000
"""instructions; the checkpoint of a thousand-layer network with its optimizer has some 200,000"""
_NAME = 200
"""letters of the name of a class"""


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
        return call_known(function, args, knobs)

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
        target.update((as_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def persistent(self, key: Any) -> Any:
        kind = key[0] if isinstance(key, tuple) and key else None
        if kind == "module" and len(key) > 1:  # before 1.6: a class, with the source of its code, which is left
            return key[1]
        if kind != "storage" or self.load_storage is None:
            raise PickleError("a pickle with an object that lies elsewhere")
        return self.load_storage(key)


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


# What is known


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
