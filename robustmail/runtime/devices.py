"""Choice of the torch device."""

from __future__ import annotations

import torch

from robustmail.errors import DeviceError
from robustmail.text import plural

__all__ = ["describe_device", "pick_device"]


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto": the first GPU, or the CPU where there is none.

    Raises DeviceError for a device that this machine does not have, and for kinds other than CPU and CUDA.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device={name!r}", "no such device", "Use auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device={name!r}", f"this machine has {count} CUDA devices", "Use device=auto or cpu.")
    elif device.type != "cpu":
        raise DeviceError(f"device={name!r}", f"{device.type} is not supported", "Use auto, cpu, cuda or cuda:1.")
    return device


def describe_device(device: torch.device) -> str:
    """The device for people: cuda:0 with the name of the GPU, cpu with the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({plural(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)
