"""A grid in a folder: its jobs, its results, and the file that summarises them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustmail.errors import RecipeError, RunError, did_you_mean
from robustmail.fields import describe
from robustmail.records import CellFinished, CellStarted
from robustmail.runtime.devices import pick_device
from robustmail.runtime.files import atomic_write_json, folder_lock, make_folder
from robustmail.runtime.provenance import provenance
from robustmail.runtime.untrusted import check_shape, check_within, read_json
from robustmail.trials.execute import Outcome, Submit, check, missing, ordered
from robustmail.trials.fork import Job, forked_from, own_job, plan_jobs
from robustmail.trials.grid import Cell, folders, recipes
from robustmail.trials.summary import Row, images_per_class, read_accuracies, rows, summary_card

__all__ = ["Study"]

FORMAT = 1


class Study:
    """The runs of a grid in one folder, with a file that summarises their results.

    cells: of the grid.
    out: folder of all runs.
    file: name of the summary in it.
    command: for the summary's provenance.
    kin: cells of other grids in the same folder; epochs that they share with these cells are trained once for all.
    baseline: the row that the others are compared with, besides the best one.

    Raises RecipeError or PluginError for a cell whose recipe is invalid or a baseline that is no row, RunError where a
    folder holds another run.
    """

    def __init__(
        self, cells: Sequence[Cell], out: Path, file: str, command: str, kin: Sequence[Cell] = (),
        baseline: str | None = None,
    ) -> None:  # fmt: skip
        self.out, self.file, self.command, self.baseline = out, out / file, command, baseline
        names = list(dict.fromkeys(cell.row for cell in cells))
        if baseline is not None and baseline not in names:
            raise RecipeError(f"--baseline {baseline}", "no row of this grid", did_you_mean(baseline, names))
        all_cells = dict.fromkeys(kin) | dict.fromkeys(cells) if kin else cells
        self._all_recipes = recipes(all_cells)
        self.recipes = {cell: self._all_recipes[cell] for cell in cells}
        all_folders = folders(all_cells, out)
        self.folders = {cell: all_folders[cell] for cell in cells}
        for folder in (*all_folders.values(), out / "trunks", out / "jobs"):
            check_within(folder, out)
        self.jobs = own_job(plan_jobs(self._all_recipes, all_folders, out), self.recipes)
        self.missing = missing(self.jobs, self._all_recipes)
        self.errors: dict[Cell, str] = {}
        self._read: dict[Cell, dict[str, float]] = {}
        self.trunks = self._earlier_trunks()
        self._next_save = 0.0  # on the monotonic clock

    def _repr_html_(self) -> str:
        return summary_card(str(self.file), self.rows(), self.seeds)

    @property
    def seeds(self) -> list[int]:
        """Every seed, in order."""
        return list(dict.fromkeys(cell.seed for cell in self.recipes))

    def check(self) -> None:
        """Check every cell before anything is trained; raises the first error."""
        check(self._all_recipes, self.jobs)

    def carry_out(self, submit: Submit, width: int = 1) -> Iterator[CellStarted | CellFinished]:
        """Run the missing jobs, at most `width` at once; a failed one does not stop the others.

        submit: starts a job (`execute.run_here`, `execute.executor`). Yields a record before and after each job. Raises
        RunError where another process works in the folder.
        """
        make_folder(self.out)
        with folder_lock(self.out):
            done, total = 0, len(self.missing)
            self.save()
            try:
                for event in ordered(self.missing, submit, width):
                    if isinstance(event, CellStarted):
                        yield event
                        continue
                    done += 1
                    self._enter(*event)
                    self._save_in_proportion()
                    yield CellFinished(event[0].name, event[1].error, done, total)
            finally:
                self.save()

    def _enter(self, job: Job, outcome: Outcome) -> None:
        """Take note of how a job ended."""
        if job.until is None and outcome.error:
            self.errors[job.cell] = outcome.error
        elif job.until is not None and not outcome.error:
            self._add_trunk(str(job.folder.relative_to(self.out)), job.until - job.begin, outcome)

    def rows(self) -> list[Row]:
        """The current results of every row over its seeds, with missing and failed seeds."""
        accuracies = {(cell.row, cell.seed): self._accuracies(cell) for cell in self.recipes}
        failed = {(cell.row, cell.seed): error for cell, error in self.errors.items()}
        names = dict.fromkeys(cell.row for cell in self.recipes)
        finished = {key: value for key, value in accuracies.items() if value is not None}
        return rows(names, self.seeds, finished, failed, self.baseline)

    def images_per_class(self) -> tuple[int, int] | None:
        """(fewest, most) test images of a class, of the first finished run; None without one."""
        finished = (folder for cell, folder in self.folders.items() if self._accuracies(cell) is not None)
        return images_per_class(first) if (first := next(finished, None)) else None

    def saved(self) -> dict[str, Any]:
        """What sharing epochs has saved these cells: the trunks, and the steps and seconds that were not repeated."""
        forks = Counter(forked_from(job.folder) for job in self.jobs)
        trunks = [{**trunk, "cells": forks[(self.out / name).resolve()]} for name, trunk in self.trunks.items()]
        repeats = [(trunk, max(trunk["cells"] - 1, 0)) for trunk in trunks]
        return {
            "trunks": trunks,
            "steps_saved": sum(times * trunk["epochs"] * trunk["steps"] for trunk, times in repeats),
            "seconds_saved": round(sum(times * trunk["seconds"] for trunk, times in repeats), 1),
        }

    def save(self) -> None:
        """Write the summary file."""
        summary = self.rows()
        texts = {cell.row: describe(recipe) for cell, recipe in self.recipes.items()}
        device = pick_device(next(iter(self.recipes.values())).device)
        atomic_write_json(self.file, {
            "format": FORMAT,
            "complete": not any(row.missing for row in summary),
            "seeds": self.seeds,
            "baseline": self.baseline,
            "rows": [asdict(row) for row in summary],
            "cells": [self._cell(cell, folder) for cell, folder in self.folders.items()],
            "shared": self.saved(),
            "recipes": texts,
            "provenance": {**provenance(device), "command": self.command},
        })  # fmt: skip

    def _save_in_proportion(self) -> None:
        """Save, but spend no more than a twentieth of the time on it: each save lists all cells, so its cost
        grows with the grid."""
        begun = time.monotonic()
        if begun >= self._next_save:
            self.save()
            now = time.monotonic()
            self._next_save = now + 20 * (now - begun)

    def _cell(self, cell: Cell, folder: Path) -> dict[str, Any]:
        return {
            **asdict(cell), "folder": str(folder.relative_to(self.out)), "error": self.errors.get(cell),
            "accuracy": self._accuracies(cell),
        }  # fmt: skip

    def _accuracies(self, cell: Cell) -> dict[str, float] | None:
        """Those of a cell; of a finished one they are read once, since `save` looks at all cells after each."""
        if cell not in self._read:
            found = read_accuracies(self.folders[cell])
            if found is None:
                return None
            self._read[cell] = found
        return self._read[cell]

    def _add_trunk(self, folder: str, epochs: int, outcome: Any) -> None:
        """Add a trunk's seconds to those of earlier calls; a killed call's are lost, so the saving is a lower bound."""
        before = self.trunks.get(folder, {"seconds": 0.0})["seconds"]
        self.trunks[folder] = {
            "folder": folder, "epochs": epochs, "steps": outcome.steps,
            "seconds": round(before + outcome.seconds, 2),
        }  # fmt: skip

    def _earlier_trunks(self) -> dict[str, dict[str, Any]]:
        """The trunks of earlier calls, from the summary file."""
        try:
            trunks = read_json(self.file)["shared"]["trunks"]
            check_shape(trunks, [{"folder": str, "epochs": int, "steps": int, "seconds": float}], "trunks")
            return {trunk["folder"]: trunk for trunk in trunks}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise RunError(
                str(self.file), f"is damaged ({type(error).__name__})", "Delete it; the runs below it stay."
            ) from error
