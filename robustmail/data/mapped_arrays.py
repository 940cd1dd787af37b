"""Arrays of npz and npy files that stay on disk: the system reads a page when it is used, and drops it when it must.

Memory holds one copy at most, and that is shared by all processes. An npz file is a zip; np.savez stores its arrays
uncompressed, so that each lies in the file as in an npy file. np.savez_compressed does not.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from robustmail.errors import DataError

__all__ = ["map_member", "map_npy"]

LOCAL = struct.Struct("<4s22xHH")
"""a zip's header before each member: its signature, and the lengths of the name and of the extra field that follow"""


def map_member(who: str, path: Path, file: Any, key: str) -> Any:
    """An array of an npz file, left on disk; read into memory where it is compressed.

    who: the data, for errors. file: of `np.load(path)`. key: of the array. Raises DataError where it is compressed and
    larger than this machine's memory, and ValueError where the file is damaged.
    """
    archive: zipfile.ZipFile = file.zip
    member = archive.getinfo(key if key in archive.namelist() else f"{key}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        if member.file_size > _memory():
            wrong = f"{key} is compressed, and unpacks to {member.file_size / 1e9:.3g} GB, more than there is memory"
            stored = f"(cd unpacked && zip -0 ../stored.npz *.npy), and pass {path.with_name('stored.npz')}."
            raise DataError(who, wrong, f"Store it: unzip {path} -d unpacked && {stored}")
        return np.asarray(file[key])
    with open(path, "rb") as opened:
        opened.seek(member.header_offset)
        signature, *lengths = LOCAL.unpack(opened.read(LOCAL.size))
        if signature != b"PK\x03\x04":
            raise ValueError(f"{key} is not where the file says")
        opened.seek(sum(lengths), os.SEEK_CUR)
        return map_npy(path, opened)


def map_npy(path: Path, file: IO[bytes]) -> Any:
    """The npy array that begins at the position of an open file, left on disk; what is written into it, is not."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be mapped")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "c", file.tell(), shape, "F" if fortran else "C")


def _memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
