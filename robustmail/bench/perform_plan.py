"""Carries the plan out: a finished step is skipped, a failed one stops only the steps that need it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from robustmail.bench.plan import CHECKOUT, PlanStep
from robustmail.errors import DeviceError
from robustmail.runtime.devices import pick_device
from robustmail.runtime.files import atomic_write_json, folder_lock, make_folder
from robustmail.runtime.provenance import provenance
from robustmail.runtime.untrusted import printable, read_json, read_text

__all__ = ["check_device", "is_finished", "perform", "result_path"]

TAIL = 12  # last lines of a step's log that are shown where it fails


def check_device(device: str, small: bool) -> None:
    """Raises DeviceError: no GPU, unless the CPU is named and the plan is small."""
    if pick_device(device).type == "cpu" and not (small and device == "cpu"):
        wrong = "needs a GPU: on a CPU it would take weeks"
        raise DeviceError("bench --paper", wrong, "Add --device cpu --small to try it, or --dry-run to read it.")


def result_path(folder: Path, step: PlanStep) -> Path:
    """The file to be committed: what the step measured, with its command and provenance."""
    return folder / "results" / f"{step.name}.json"


def is_finished(folder: Path, step: PlanStep) -> bool:
    """Whether the folder has the result of this very command."""
    try:
        return bool(read_json(result_path(folder, step))["command"] == step.command)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def perform(steps: Sequence[PlanStep], folder: Path, device: str, say: Callable[[str], object]) -> bool:
    """Carry out what is not finished yet; returns whether all steps are finished then.

    say: is given a line before and after each step. Raises RunError: another process works in the folder.
    """
    make_folder(folder)
    done: set[str] = set()
    with folder_lock(folder):
        for number, step in enumerate(steps, start=1):
            head = f"{number}/{len(steps)} {step.name}"
            missing = [name for name in step.needs if name not in done]
            if is_finished(folder, step):
                say(f"{head}: finished before")
            elif missing:
                say(f"{head}: left out, for it needs {', '.join(missing)}")
                continue
            else:
                say(f"{head}: {step.about}\n    {step.command}")
                if error := _work(step, folder, device):
                    say(f"{head}: FAILED: {error}\n    {step.todo} The same command goes on with the plan.")
                    continue
                say(f"{head}: {result_path(folder, step)}")
            done.add(step.name)
    return len(done) == len(steps)


def _work(step: PlanStep, folder: Path, device: str) -> str:
    """Run the command of a step, and keep what it measured; returns what went wrong, or ""."""
    log = folder / "logs" / f"{step.name}.log"
    make_folder(log.parent)
    make_folder(step.measured.parent)
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        command = [sys.executable, *step.words]
        code = subprocess.run(command, stdout=out, stderr=out, cwd=step.cwd, env=environment, check=False).returncode
    if code:
        ended = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        lines = read_text(log).splitlines()[-TAIL:]
        return "\n    ".join([f"{ended}; the end of {log}:", *map(printable, lines)])
    try:
        measured = _read(step.measured)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        return f"{step.measured} cannot be read ({type(error).__name__})"
    make_folder(folder / "results")
    atomic_write_json(result_path(folder, step), {
        "step": step.name, "command": step.command, "seconds": round(time.monotonic() - began, 1),
        "measured": measured, "provenance": provenance(pick_device(device)),
    })  # fmt: skip
    return ""


def _read(path: Path) -> Any:
    """What a step measured: JSON, or pytest's counts."""
    if path.suffix == ".json":
        return read_json(path)
    (suite,) = ElementTree.fromstring(read_text(path)).iter("testsuite")
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
