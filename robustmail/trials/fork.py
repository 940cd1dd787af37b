"""Epochs that several cells have in common are trained once, in a trunk; each cell resumes from a copy of it.

Weights are one until `burn_in`, so recipes that differ only in margin or weighter are equal until then. This module
does not know that: two cells share the epochs in which their recipes, with every schedule resolved, are equal in all
that training depends on.
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
from robustmail.train.run import recorded_hashes, write_recipe
from robustmail.train.state import kept_epochs
from robustmail.trials.grid import Cell

__all__ = ["Job", "started", "fork", "forked_from", "own_job", "plan_jobs", "is_trained"]

ONLY_LATER = ("epochs", "burn_in", "eps", "evaluate", "select", "test_size")
"""fields without influence on an epoch of training itself; `eps` is compared as `budget`"""


@dataclass(frozen=True)
class Job:
    """One run to do: of a cell, or of a trunk, which ends after `until` epochs."""

    cell: Cell
    folder: Path
    trunk: Path | None = None
    """the folder whose state it starts from; None: from the beginning"""
    begin: int = 0
    """number of epochs that the trunk has trained"""
    until: int | None = None
    cells: int = 1
    """number of cells that need it"""

    @property
    def name(self) -> str:
        """Name for people."""
        if self.until is None:
            return self.cell.name
        return f"epochs {self.begin + 1} to {self.until} of {plural(self.cells, 'cell')} ({self.cell.name})"


def plan_jobs(recipes: Mapping[Cell, Recipe], folders: Mapping[Cell, Path], out: Path) -> list[Job]:
    """The jobs of a grid, every trunk before the jobs that start from it."""
    planner = _Planner(recipes, folders, out / "trunks")
    return list(planner.branch(list(recipes), 0, None))


def own_job(jobs: Sequence[Job], cells: Container[Cell]) -> list[Job]:
    """The jobs that some of the cells need; `Job.cells` of a trunk then counts only these cells."""
    users: dict[Path | None, int] = {}
    selected = []
    for job in reversed(jobs):  # trunks come before the jobs that start from them
        needed = users.get(job.folder, 0) if job.until is not None else int(job.cell in cells)
        if needed:
            selected.append(replace(job, cells=needed))
            users[job.trunk] = users.get(job.trunk, 0) + needed
    return selected[::-1]


def forked_from(folder: Path) -> Path | None:
    """The trunk that a run started from, or None."""
    try:
        name = str(read_json(folder / "forked.json")["trunk"])
        return (folder / name).resolve()
    except (OSError, ValueError, TypeError, LookupError):  # only used to report what sharing saved
        return None


def started(folder: Path) -> bool:
    """True if the run in a folder has a state of its own, and needs no trunk any more."""
    return (folder / "state.pt").exists()


def is_trained(folder: Path, epochs: int) -> bool:
    """True if the run in a folder has trained and saved so many epochs."""
    try:
        return len(read_text(folder / "metrics.csv").splitlines()) > epochs  # it has a heading
    except OSError:
        return False


def fork(recipe: Recipe, trunk: Path, folder: Path, source: Path | None) -> None:
    """Create a run of the recipe from a copy of a trunk's state.

    recipe: of the new run.
    trunk: folder of the trunk's run.
    folder: of the new run; forked.json in it names the trunk.
    source: the recipe's file.

    The state is written last: a kill before leaves a folder without a run. Raises RunError where the folder is in use
    or cannot be written.
    """
    make_folder(folder)
    with folder_lock(folder):
        text = source.read_bytes() if source is not None else None
        write_recipe(recipe, folder, text, recorded_hashes(trunk))
        atomic_write_json(folder / "forked.json", {"trunk": os.path.relpath(trunk, folder)})
        for name in (*kept_epochs(trunk).values(), "best.safetensors", "last.safetensors", "metrics.csv", "state.pt"):
            check_inside(trunk / name)
            atomic_write(folder / name, functools.partial(shutil.copyfile, trunk / name))


class _Planner:
    """Groups cells by the epochs that they share, as a tree whose inner nodes are trunks."""

    def __init__(self, recipes: Mapping[Cell, Recipe], folders: Mapping[Cell, Path], trunks: Path) -> None:
        self._recipes, self._folders, self._trunks = recipes, folders, trunks
        self._settings_at: dict[tuple[Cell, int], dict[str, Any]] = {}
        self._turns: dict[Cell, Sequence[int]] = {}
        """the epochs at which settings may change; asked for once, for every cell is compared with many"""

    def branch(self, cells: list[Cell], epoch: int, trunk: Path | None) -> Iterator[Job]:
        """The jobs of cells that share all epochs before this one."""
        for group in self._groups(cells, epoch):
            first = group[0]
            if len(group) == 1:
                yield Job(first, self._folders[first], trunk, epoch)
                continue
            until = epoch + 1
            while len(self._groups(group, until)) == 1:
                until += 1
            folder = self._trunks / f"{self._folders[first].parent.name}-{until}" / str(first.seed)
            yield Job(first, folder, trunk, epoch, until, len(group))
            yield from self.branch(group, until, folder)

    def _groups(self, cells: list[Cell], epoch: int) -> list[list[Cell]]:
        """Group the cells that train alike in an epoch; a cell whose training is over is alone."""
        groups: list[list[Cell]] = []
        alike: dict[int, list[list[Cell]]] = {}  # by hash, so that not every cell is compared with every group
        for cell in cells:
            candidates = alike.setdefault(self._hash(cell, epoch), [])
            is_over = self._recipes[cell].epochs <= epoch
            group = None if is_over else next((g for g in candidates if self._same(g[0], cell, epoch)), None)
            if group is None:
                group = []
                groups.append(group)
                candidates.append(group)
            group.append(cell)
        return groups

    def _hash(self, cell: Cell, epoch: int) -> int:
        """Equal for cells that train alike in an epoch; values that have no hash are left out."""
        if self._recipes[cell].epochs <= epoch:
            return 0
        try:
            return hash(tuple(map(_hash_or_none, self._settings(cell, epoch).items())))
        except Exception:  # a plugin that fails at this epoch, which then is equal to none
            return 0

    def _same(self, first: Cell, second: Cell, epoch: int) -> bool:
        if self._recipes[first].epochs <= epoch:
            return False
        try:
            return self._settings(first, epoch) == self._settings(second, epoch)
        except Exception:  # a plugin whose values cannot be compared, say because they hold tensors
            return False

    def _settings(self, cell: Cell, epoch: int) -> dict[str, Any]:
        if cell not in self._turns:
            recipe = self._recipes[cell]
            is_constant = all(isinstance(schedule, Stairs) for schedule in iter_schedules(recipe))
            self._turns[cell] = recipe.change_points() if is_constant else range(recipe.epochs)
        turn = max(turn for turn in self._turns[cell] if turn <= epoch)
        if (cell, turn) not in self._settings_at:
            self._settings_at[cell, turn] = shared_prefix(self._recipes[cell], turn)
        return self._settings_at[cell, turn]


def _hash_or_none(value: object) -> int | None:
    try:
        return hash(value)
    except TypeError:
        return None


def shared_prefix(recipe: Recipe, epoch: int) -> dict[str, Any]:
    """All that an epoch of training, its validation and its files depend on, by name.

    A schedule of the optimiser that changes within an epoch is compared as a schedule.
    """
    fields = {name: value for name, value in field_values(recipe.at(epoch)).items() if name not in ONLY_LATER}
    fields["optimizer"] = map_schedules(recipe.optimizer, lambda s: s.at_epoch(epoch) if isinstance(s, Stairs) else s)
    return fields | {"budget": recipe.budget, "norm": recipe.norm, "kept_weights": recipe.kept_weights}
