"""Choice of the torch device."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch import Tensor

from robustmail.errors import DeviceError
from robustmail.text import plural

__all__ = ["describe_device", "keep_freed_memory", "pick_device", "wide"]

NO_FLOAT64 = {"mps"}
USE = "Use auto, cpu, cuda, cuda:1 or mps."


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto": the first GPU, or the CPU where there is none.

    "mps", the GPU of a Mac, is chosen by name only; where torch has none, a line on standard error says so, and it is
    the CPU. Raises DeviceError for a CUDA device that this machine does not have, and for other kinds.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device={name!r}", "no such device", USE) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device={name!r}", f"this machine has {count} CUDA devices", "Use device=auto or cpu.")
    elif device.type == "mps":
        return _mps_or_cpu(device)
    elif device.type != "cpu":
        raise DeviceError(f"device={name!r}", f"{device.type} is not supported", USE)
    return device


@functools.cache
def _mps_or_cpu(device: torch.device) -> torch.device:
    """The GPU of a Mac, or the CPU and, once, a line that says so."""
    if torch.backends.mps.is_available():
        return device
    why = "torch was built without it" if not torch.backends.mps.is_built() else "this machine has none"
    print(f"robustmail: device=mps: {why}; the CPU is used", file=sys.stderr)
    return torch.device("cpu")


def wide(x: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has no float64, as a Mac's GPU."""
    return x.float() if x.device.type in NO_FLOAT64 else x.double()


def describe_device(device: torch.device) -> str:
    """The device for people: cuda:0 with the name of the GPU, cpu with the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({plural(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)


@functools.cache
def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let glibc keep up to 2 GB of freed memory for the next pass, from now on in this process.

    By default it returns the activations to the system after each pass, and the system maps and zeroes them again.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
