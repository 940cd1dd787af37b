"""Where a result comes from: versions, commit, hardware, date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["provenance"]


def provenance(device: torch.device) -> dict[str, Any]:
    """Plain values that go with every result."""
    return {"versions": _versions(), "commit": _commit(), "hardware": _hardware(device),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    art = "adversarial-robustness-toolbox"
    for package in ("robustmail", "torch", "torchvision", "torchattacks", art, "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    """The commit of this checkout, with a + where it has changes; None outside one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return (commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) or None
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"device": str(device), "gpu": gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
