"""TensorBoard, through torch.utils.tensorboard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.trackers.tracker import Opened, Outcome, TrackedRun, check_installed

__all__ = ["tensorboard"]


class tensorboard:
    """TensorBoard's event files; scalars, histograms, pictures, and tables as text.

    A resumed run goes on in the same folder, and its first event tells the reader to forget the steps that are trained
    again (purge_step).
    """

    def __init__(self) -> None:
        check_installed("tensorboard", "tensorboard")

    def start(self, run: TrackedRun) -> Opened:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder), purge_step=None if run.id is None else run.step + 1)
        if run.id is None:
            self.table("recipe", ("field", "value"), list(run.config.items()), run.step)
        return Opened("tensorboard", f"see it with: tensorboard --logdir {run.folder}")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, name: str, counts: Sequence[int], span: tuple[float, float], step: int) -> None:
        edges = np.linspace(*span, len(counts) + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        n, total, squares = sum(counts), float(centres @ counts), float(centres**2 @ counts)
        self._writer.add_histogram_raw(
            name, span[0], span[1], n, total, squares, edges[1:].tolist(), list(counts), step
        )  # fmt: skip

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        markdown = "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)
        self._writer.add_text(name, markdown, step)

    def image(self, name: str, path: Path, step: int) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def finish(self, outcome: Outcome) -> None:
        self._writer.close()
