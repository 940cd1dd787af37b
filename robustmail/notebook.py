"""A recipe in a notebook."""

from __future__ import annotations

import dataclasses
from typing import Any

from robustmail.fields import describe
from robustmail.markup import Html, card, table, tag

__all__ = ["recipe_card"]


def recipe_card(recipe: Any) -> Html:
    """The loss as a formula and the fields of a recipe; those that have their defaults are folded away."""
    rows: dict[bool, list[list[object]]] = {False: [], True: []}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        rows[bool(value == field.default)].append([field.name, describe(value)])
    lines = (part for line in recipe.formula.splitlines() for part in (tag("code", line.strip()), tag("br")))
    chosen, defaults = (table("", ["field", "value"], rows[is_default]) for is_default in (False, True))
    folded = tag("details", tag("summary", f"{len(rows[True])} fields have their defaults"), defaults)
    return card("Recipe", tag("p", *lines), chosen, folded)
