"""The storages of tensors in torch's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from robustmail.checkpoints.pickle_values import Global, Storage

__all__ = ["Storages"]


class Storages:
    """The numbers of a torch file, read once each when a tensor asks for them.

    read: the numbers that a storage's key stands for; its second argument is how many bytes there should be. most:
    bytes that all may have.
    """

    def __init__(self, read: Callable[[str, int], torch.UntypedStorage], most: int) -> None:
        self.read, self.left = read, most
        self.by_key: dict[str, torch.UntypedStorage] = {}

    def __call__(self, identifier: Any) -> Storage:
        """The storage of a persistent id: ("storage", its type, its key, its device, how many numbers, its part)."""
        _, kind, key, _, count, *view = identifier
        dtype = storage_dtype(kind)
        itemsize = dtype.itemsize if dtype else 1
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**48:
            raise ValueError("a storage that is none")
        if key not in self.by_key:
            self.left -= count * itemsize
            if self.left < 0:
                raise ValueError(f"a tensor claims {count * itemsize:,} bytes that are not in the file")
            self.by_key[key] = self.read(key, count * itemsize)
        untyped = self.by_key[key]
        start, n = 0, count
        if view and view[0] is not None:
            _, start, n = view[0]
            if type(start) is not int or type(n) is not int or min(start, n) < 0:
                raise ValueError("a part of a storage that is none")
        if (start + n) * itemsize > untyped.nbytes():
            raise ValueError(f"a tensor claims {(start + n) * itemsize:,} bytes that are not in the file")
        return Storage(untyped, dtype, start * itemsize, n * itemsize)


_DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32,
}  # fmt: skip
"""by the names of torch's classes of storages, FloatStorage and so on"""


def storage_dtype(kind: Any) -> torch.dtype | None:
    """The type of a storage's numbers, by the name of its class; None for bytes."""
    name = kind.name.rpartition(".")[2].removesuffix("Storage") if isinstance(kind, Global) else ""
    if name == "Untyped":
        return None
    if name not in _DTYPES:
        raise ValueError("a storage of an unknown type")
    return _DTYPES[name]
