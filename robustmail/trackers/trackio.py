"""Trackio: a database in the run's folder, or what Trackio's own variables name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.trackers.tracker import Opened, Outcome, TrackedRun, Unseen, check_installed

__all__ = ["trackio"]

PROJECT = "robustmail"


class trackio:
    """Trackio, in SQLite in the run's folder unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set.

    Trackio has one folder in a process. Steps that a killed run trains again are kept once, but in a Space.
    """

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        check_installed("trackio", "trackio")

    def start(self, run: TrackedRun) -> Opened:
        folder = Path(os.environ.get("TRACKIO_DIR") or run.folder).resolve()
        before = os.environ.get("TRACKIO_DIR")
        os.environ["TRACKIO_DIR"] = str(folder)  # Trackio reads it once, when it is imported
        try:
            import trackio as library
            from trackio.utils import TRACKIO_DIR
        finally:
            os.environ.pop("TRACKIO_DIR")
            os.environ.update({"TRACKIO_DIR": before} if before else {})
        if TRACKIO_DIR.resolve() != folder:
            raise RuntimeError(f"Trackio writes into {TRACKIO_DIR} in this process, and has one folder in each")
        self._library: Any = library
        name = run.id or f"{run.name[:50]}-{uuid.uuid4().hex[:8]}"  # Trackio resumes by the name
        self._run = self._library.init(
            PROJECT, name, config=dict(run.config), resume="allow" if run.id else "never", embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip
        self._unseen = Unseen(self._last_steps(name) if run.id else None)
        return Opened(name, f"see it with: TRACKIO_DIR={folder} trackio show --project {PROJECT}")

    def _last_steps(self, name: str) -> dict[str, int]:
        from trackio.sqlite_storage import SQLiteStorage

        last: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(PROJECT, name):
            last |= {key: max(row["step"], last.get(key, -1)) for key in row}
        return last

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        if new := self._unseen(scalars, step):
            self._run.log(new, step=step)

    def histogram(self, name: str, counts: Sequence[int], span: tuple[float, float], step: int) -> None:
        edges = np.linspace(*span, len(counts) + 1)
        if self._unseen({name: 0.0}, step):
            self._run.log({name: self._library.Histogram(np_histogram=(np.array(counts), edges))}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], step: int) -> None:
        table = self._library.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._library.Image(str(path))}, step=step)

    def finish(self, outcome: Outcome) -> None:
        self._library.finish()
