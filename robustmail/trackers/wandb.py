"""Weights & Biases: offline, unless the user has said otherwise or is logged in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.trackers.tracker import Opened, Outcome, TrackedRun, check_installed

__all__ = ["wandb"]


class wandb:
    """Weights & Biases; online if WANDB_MODE says so or you are logged in, otherwise in offline files for `wandb sync`.

    WANDB_PROJECT names the project. Steps that a killed run trains again are in the offline files twice.
    """

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it is read when wandb is imported
        check_installed("wandb", "wandb")

    def start(self, run: TrackedRun) -> Opened:
        import wandb as library

        self._library: Any = library
        mode = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if self._library.login(prompt=False, verify=False) else "offline")
        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", "robustmail"), name=run.name, id=run.id, resume="allow",
            dir=str(run.folder), mode=mode, settings=self._library.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.config.update(dict(run.config), allow_val_change=True)  # a resumed run may have another device
        upload = f"upload it with: wandb sync {run.folder}/wandb/offline-run-*"
        return Opened(self._run.id, upload if mode == "offline" else f"{mode}: {self._run.url}")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def histogram(self, name: str, counts: Sequence[int], span: tuple[float, float], step: int) -> None:
        edges = np.linspace(*span, len(counts) + 1).tolist()
        self._run.log({name: self._library.Histogram(np_histogram=(list(counts), edges))}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], step: int) -> None:
        self._run.log({name: self._library.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._library.Image(str(path))}, step=step)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish(exit_code={"finished": 0, "stopped": 255, "failed": 1}[outcome])  # 255: "killed" to W&B
