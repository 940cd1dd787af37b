"""What cells have in common is trained once: a trunk, from which each cell goes on as if it had trained it itself.

Weights are one until `burn_in`, so recipes that differ in margin or weight alone are equal until then. Nothing here
knows that: two cells share the epochs at which their recipes, with every schedule resolved, are equal in whatever
training depends on.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustmail.fields import field_values, iter_schedules, map_schedules
from robustmail.recipe import Recipe
from robustmail.runtime.files import atomic_write, atomic_write_json, folder_lock, make_folder
from robustmail.runtime.untrusted import check_inside, read_json, read_text
from robustmail.schedules import Stairs
from robustmail.text import plural
from robustmail.train.run import write_recipe
from robustmail.trials.grid import Cell

__all__ = ["Job", "started", "fork", "forked_from", "own_job", "plan_jobs", "is_trained"]

ONLY_LATER = ("epochs", "burn_in", "eps", "evaluate", "select", "test_size")
"""Fields that say when something happens, or what happens afterwards; `eps` counts as `budget`."""


@dataclass(frozen=True)
class Job:
    """One run to be made: of a cell, or of a trunk, which ends after `until` epochs."""

    cell: Cell
    folder: Path
    trunk: Path | None = None
    """the folder it goes on from"""
    begin: int = 0
    """the epochs that are trained already then"""
    until: int | None = None
    cells: int = 1
    """how many cells need it"""

    @property
    def name(self) -> str:
        """For people."""
        if self.until is None:
            return self.cell.name
        return f"epochs {self.begin + 1} to {self.until} of {plural(self.cells, 'cell')} ({self.cell.name})"


def plan_jobs(recipes: Mapping[Cell, Recipe], folders: Mapping[Cell, Path], out: Path) -> list[Job]:
    """The jobs of a grid, every trunk before what goes on from it."""
    planner = _Planner(recipes, folders, out / "trunks")
    return list(planner.branch(list(recipes), 0, None))


def own_job(jobs: Sequence[Job], cells: Container[Cell]) -> list[Job]:
    """Of the jobs of several grids those that some of the cells need; trunks count these cells alone."""
    users: dict[Path | None, int] = {}
    found = []
    for job in reversed(jobs):  # a trunk comes before what goes on from it
        needed = users.get(job.folder, 0) if job.until is not None else int(job.cell in cells)
        if needed:
            found.append(replace(job, cells=needed))
            users[job.trunk] = users.get(job.trunk, 0) + needed
    return found[::-1]


def forked_from(folder: Path) -> Path | None:
    """The trunk that a run went on from, or None."""
    try:
        name = str(read_json(folder / "forked.json")["trunk"])
        return (folder / name).resolve()
    except (OSError, ValueError, TypeError, LookupError):  # what was saved is not worth an error
        return None


def started(folder: Path) -> bool:
    """Has the run in a folder begun, so that it needs no trunk any more?"""
    return (folder / "state.pt").exists()


def is_trained(folder: Path, epochs: int) -> bool:
    """Has the run in a folder trained and saved so many epochs?"""
    try:
        return len(read_text(folder / "metrics.csv").splitlines()) > epochs  # it has a heading
    except OSError:
        return False


def fork(recipe: Recipe, trunk: Path, folder: Path, source: Path | None) -> None:
    """Make a run of the recipe that is as far as the trunk is; the state comes last, so that a kill leaves none.

    forked.json says which trunk it was. Raises RunError where the folder is in use or cannot be written.
    """
    make_folder(folder)
    with folder_lock(folder):
        write_recipe(recipe, folder, source.read_bytes() if source is not None else None)
        atomic_write_json(folder / "forked.json", {"trunk": os.path.relpath(trunk, folder)})
        for name in ("best.safetensors", "last.safetensors", "metrics.csv", "state.pt"):
            check_inside(trunk / name)
            atomic_write(folder / name, functools.partial(shutil.copyfile, trunk / name))


class _Planner:
    """Groups cells by the epochs that they share: a tree, whose inner nodes are trunks."""

    def __init__(self, recipes: Mapping[Cell, Recipe], folders: Mapping[Cell, Path], trunks: Path) -> None:
        self._recipes, self._folders, self._trunks = recipes, folders, trunks
        self._ways: dict[tuple[Cell, int], dict[str, Any]] = {}

    def branch(self, cells: list[Cell], epoch: int, trunk: Path | None) -> Iterator[Job]:
        """What becomes of cells that were alike before an epoch."""
        for group in self._alike(cells, epoch):
            first = group[0]
            if len(group) == 1:
                yield Job(first, self._folders[first], trunk, epoch)
                continue
            until = epoch + 1
            while len(self._alike(group, until)) == 1:
                until += 1
            folder = self._trunks / f"{self._folders[first].parent.name}-{until}" / str(first.seed)
            yield Job(first, folder, trunk, epoch, until, len(group))
            yield from self.branch(group, until, folder)

    def _alike(self, cells: list[Cell], epoch: int) -> list[list[Cell]]:
        """The cells in groups that train alike in an epoch; one whose training is over is alone."""
        groups: list[list[Cell]] = []
        for cell in cells:
            over = self._recipes[cell].epochs <= epoch
            group = None if over else next((g for g in groups if self._same(g[0], cell, epoch)), None)
            if group is None:
                groups.append([cell])
            else:
                group.append(cell)
        return groups

    def _same(self, first: Cell, second: Cell, epoch: int) -> bool:
        if self._recipes[first].epochs <= epoch:
            return False
        try:
            return self._way(first, epoch) == self._way(second, epoch)
        except Exception:  # a plugin whose values cannot be compared, say because they hold tensors
            return False

    def _way(self, cell: Cell, epoch: int) -> dict[str, Any]:
        recipe = self._recipes[cell]
        if all(isinstance(schedule, Stairs) for schedule in iter_schedules(recipe)):  # then nothing moves between turns
            epoch = max(turn for turn in recipe.change_points() if turn <= epoch)
        if (cell, epoch) not in self._ways:
            self._ways[cell, epoch] = shared_prefix(recipe, epoch)
        return self._ways[cell, epoch]


def shared_prefix(recipe: Recipe, epoch: int) -> dict[str, Any]:
    """Everything that an epoch of training, its validation and its files depend on.

    The optimiser's schedules are read within epochs too: one that is not constant there stands for itself.
    """
    now = {name: value for name, value in field_values(recipe.at(epoch)).items() if name not in ONLY_LATER}
    now["optimizer"] = map_schedules(recipe.optimizer, lambda s: s.at_epoch(epoch) if isinstance(s, Stairs) else s)
    return now | {"budget": recipe.budget, "norm": recipe.norm}
