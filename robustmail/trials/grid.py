"""The cells of a grid, recipes x settings x seeds, parsed from command-line texts."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from robustmail.config.overrides import apply_overrides
from robustmail.config.recorded import resolve_recipe
from robustmail.errors import RecipeError
from robustmail.fields import flatten
from robustmail.recipe import Recipe
from robustmail.text import split_at_commas
from robustmail.trials.paper import PaperTable, Scale

__all__ = ["Cell", "cells", "folders", "of_table", "recipes", "seeds", "variants"]

LONGEST = 100  # letters of a folder's name
MOST = 10_000  # seeds of a grid


@dataclass(frozen=True)
class Cell:
    """One run of a grid: a row with a seed. Holds texts only, so that it can be sent to another process."""

    row: str
    """name of the cells of all seeds, e.g. `mail_at margin=pm_nat`"""
    recipe: str
    """a built-in recipe, a file, or either with :variable"""
    overrides: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Row and seed, for people."""
        return f"{self.row}, seed {self.seed}"

    def load(self) -> Recipe:
        """Load the recipe and apply overrides and seed. Raises RecipeError or PluginError, naming the row."""
        return _with_overrides(self, resolve_recipe(self.recipe))


def seeds(text: str) -> tuple[int, ...]:
    """Parse seeds: `0:5` -> 0 ... 4, as in a slice; `1,2,7` -> 1, 2, 7. Raises RecipeError."""
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        low, high = int(match[1]), int(match[2])
        if low >= high:
            raise RecipeError(f"--seeds {text}", "names no seed", f"Write {high}:{low}." if low > high else "")
        if high - low > MOST:
            raise RecipeError(f"--seeds {text}", f"names {high - low:,} seeds", f"Name at most {MOST:,}.")
        return tuple(range(low, high))
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise RecipeError(f"--seeds {text}", "is no list of seeds", "Write 0:5 for 0, 1, 2, 3, 4, or 1,2,7.")
    numbers = tuple(map(int, text.split(",")))
    if twice := [seed for seed, count in Counter(numbers).items() if count > 1]:
        raise RecipeError(f"--seeds {text}", f"{twice[0]} is named twice")
    return numbers


def variants(text: str) -> list[str]:
    """Parse an option --over into one override per value: `margin=pm_adv,pm_nat` -> [`margin=pm_adv`, `margin=pm_nat`].

    A comma inside brackets or quotes belongs to its value. Raises RecipeError.
    """
    path, equals, values = text.partition("=")
    parts = [value.strip() for value in split_at_commas(values)[0]]
    if not equals or not all(parts):
        raise RecipeError(f"--over {text}", "is no path with values", "Write e.g. margin=pm_adv,pm_nat.")
    return [f"{path.strip()}={value}" for value in parts]


def cells(names: Sequence[str], overs: Iterable[str], overrides: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells of a grid: every recipe with every combination of settings and every seed.

    names: of recipes. overs: settings to vary, as `variants` takes them. overrides: of all cells. seeds: of each row.
    Raises RecipeError for a setting that is varied twice, or that has no values.
    """
    overs = list(overs)
    paths = [over.partition("=")[0].strip() for over in overs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise RecipeError(f"--over {twice[0]}", "is there twice", f"Write {twice[0]}=VALUE,VALUE once.")
    shown = {name: Path(name).name for name in names}  # a recipe's file without its folder,
    if len(set(shown.values())) < len(shown):  # unless two files have one name
        shown = {name: name for name in names}
    return [
        Cell(" ".join((shown[name], *chosen)), name, (*overrides, *chosen), seed)
        for name in names
        for chosen in product(*map(variants, overs))
        for seed in seeds
    ]


def of_table(table: PaperTable, scale: Scale, seeds: Sequence[int], overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells of a table of the paper at a scale.

    table, scale: from `trials.paper`. seeds: of each row. overrides: applied last. Raises RecipeError where the scale
    does not have the table.
    """
    if scale.narrow and any(line.recipe.endswith(":wrn") for line in table.lines):
        raise RecipeError(
            "table 3", "a WRN-32-10 is not for a CPU", "Tables 1 and 2 have that scale; this one has --scale paper."
        )
    return [
        Cell(line.row, line.recipe, (*scale.common, *changed, *line.overrides, *overrides), seed)
        for line in table.lines
        for changed in [scale.recipes.get(line.recipe, ())]
        for seed in seeds
    ]


def recipes(grid: Iterable[Cell]) -> dict[Cell, Recipe]:
    """The recipe of each cell; each file is read once.

    Raises RecipeError or PluginError, naming the row, for a cell whose recipe is invalid, or that occurs twice.
    """
    bare: dict[str, Recipe] = {}
    recipe_of: dict[Cell, Recipe] = {}
    for cell in grid:
        if cell in recipe_of:
            raise RecipeError(f"trials ({cell.row})", "is there twice", "Name each recipe and each value once.")
        if cell.recipe not in bare:
            bare[cell.recipe] = resolve_recipe(cell.recipe)
        recipe_of[cell] = _with_overrides(cell, bare[cell.recipe])
    first_seed = next(iter(recipe_of)).seed if recipe_of else None
    _refuse_equal_rows({cell: recipe for cell, recipe in recipe_of.items() if cell.seed == first_seed})
    return recipe_of


def folders(grid: Iterable[Cell], out: Path) -> dict[Cell, Path]:
    """The folder of each cell: out/runs/ROW/SEED, with characters that file names should not have replaced."""
    grid = list(grid)
    plain = {cell.row: re.sub(r"[^\w.=+-]+", "-", cell.row).strip("-.") or "row" for cell in grid}
    shared = {name for name, count in Counter(plain.values()).items() if count > 1}
    names = {row: _hashed(name, row) if name in shared or len(name) > LONGEST else name for row, name in plain.items()}
    return {cell: out / "runs" / names[cell.row] / str(cell.seed) for cell in grid}


def _hashed(name: str, row: str) -> str:
    """A name that is too long or not unique, shortened and with a hash of its row."""
    return f"{name[:LONGEST]}-{hashlib.blake2b(row.encode(), digest_size=4).hexdigest()}"


def _with_overrides(cell: Cell, recipe: Recipe) -> Recipe:
    if any(text.partition("=")[0].strip() == "seed" for text in cell.overrides):
        raise RecipeError(f"trials ({cell.row})", "sets the seed", "Seeds go into --seeds.")
    return apply_overrides(recipe, (*cell.overrides, f"seed={cell.seed}"))


def _refuse_equal_rows(recipe_of: Mapping[Cell, Recipe]) -> None:
    """Two rows of one recipe would be the same runs under two names."""
    row_of: dict[tuple[tuple[str, str], ...], str] = {}
    for cell, recipe in recipe_of.items():
        first = row_of.setdefault(tuple(flatten(recipe).items()), cell.row)
        if first != cell.row:
            raise RecipeError(
                f"trials ({first}; {cell.row})", "are the same recipe", "Name each recipe and each value once."
            )
