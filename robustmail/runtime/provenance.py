"""Provenance of a result: versions, commit, hardware, date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["provenance"]


def provenance(device: torch.device) -> dict[str, Any]:
    """Plain values that are stored with every result: versions, commit, hardware, date."""
    return {"versions": _versions(), "commit": _commit(), "hardware": _hardware(device),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}  # fmt: skip


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    art = "adversarial-robustness-toolbox"
    for package in ("robustmail", "torch", "torchvision", "torchattacks", art, "timm", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@cache  # the code that runs is that of the first call, whatever is checked out later
def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with a + where it has changes; None outside a checkout.

    Only the package's own checkout is read, whose code runs already, never the current folder; hooks and the file
    system monitor, which git would execute, are switched off.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        result = subprocess.run(command, capture_output=True, timeout=20, env=environment)
        return result.stdout.decode(errors="replace").strip()

    try:
        commit = git("rev-parse", "HEAD")
        return (commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) or None
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"device": str(device), "gpu": gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
