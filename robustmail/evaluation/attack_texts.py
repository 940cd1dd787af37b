"""Attacks as people write them: names with restarts and knobs, calls of an attack's class, FILE.py:NAME.

Texts are read, never run: a knob is a literal, and only a file that the text names is loaded.
"""

from __future__ import annotations

import ast
import re
from typing import Any, NamedTuple

from robustmail.catalog import ATTACK_NAMES as NAMES
from robustmail.catalog import catalog_entries
from robustmail.config.overrides import parse_value
from robustmail.errors import RecipeError, did_you_mean
from robustmail.fields import describe
from robustmail.text import split_at_commas

__all__ = ["NAMES", "AttackName", "parse_name", "read_attack", "split_attacks"]

MAX_RESTARTS = 1000
RESTARTED = ("cw", "pma", "md", "cr", "apgd", "apgd-t", "fab-t", "square")  # and pgdN
NAME = re.compile(rf"({'|'.join(map(re.escape, NAMES))}|pgd[1-9]\d{{0,5}})(?:x(\d{{1,6}}))?\s*(?:\((.*)\))?", re.DOTALL)
LITERAL = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop)  # a name may come from a stranger's file
EXAMPLE = "Write pgd20(eot=20)."


class AttackName(NamedTuple):
    """A name of a built-in attack: pgd50x10(eot=20) is the base pgd50 with 10 restarts and a knob."""

    base: str
    restarts: int
    knobs: dict[str, Any]

    @property
    def without_restarts(self) -> str:
        """The name of one start, in a form that is the same however the knobs were written."""
        knobs = ", ".join(f"{name}={describe(value)}" for name, value in sorted(self.knobs.items()))
        return f"{self.base}({knobs})" if knobs else self.base

    def __str__(self) -> str:
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        return self.base + restarts + self.without_restarts.removeprefix(self.base)


def split_attacks(text: str, who: str = "attacks") -> list[str]:
    """Split a list at its commas, but not inside brackets or quotes.

    who: gave the list, for errors. Raises RecipeError: no attack, one named twice, or a bracket or a quote that is not
    closed.
    """
    parts, left_open = split_at_commas(text)
    if left_open:
        raise RecipeError(f"{who} {text}", f"a {left_open} is not closed", EXAMPLE)
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise RecipeError(who, "no name given", "Write pgd100,cw.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(who, f"{twice[0]} is named twice")
    return names


def parse_name(text: str) -> AttackName | None:
    """Read the name of a built-in attack, NAME, NAMExRESTARTS, NAME(KNOB=VALUE, ...); None for anything else.

    Raises RecipeError: knobs that cannot be read, or restarts of an attack that has no random start of its own.
    """
    match = NAME.fullmatch(text)
    if match is None:
        return None
    base, restarts, knobs = match.groups()
    if restarts is not None:
        can_restart = base.startswith("pgd") or base in RESTARTED
        if not can_restart or not 1 <= int(restarts) <= MAX_RESTARTS:
            wrong = f"takes 1 to {MAX_RESTARTS} starts" if can_restart else "has no restarts of its own"
            raise RecipeError(f"attack {text!r}", wrong, "Write pgd50x10 for ten restarts of pgd50.")
    return AttackName(base, int(restarts or 1), _knobs(text, knobs) if knobs else {})


def read_attack(text: str) -> Any:
    """Read one attack: names of built-in attacks stay texts; a call of an attack's class, such as
    torchattack("Square", eps=8/255), and FILE.py:NAME become values.

    Raises RecipeError or PluginError: it cannot be read, or there is no such attack.
    """
    if re.fullmatch(r"[^()'\"]+\.py:\w+", text):
        return parse_value(text, "attacks")
    if parse_name(text) is not None:
        return text
    found, classes = re.match(r"(\w+)\s*\(", text), catalog_entries("attacks")
    if found is None and text not in classes:
        return text  # `attack_spec` names what is near
    if found is not None and found[1] not in classes:
        raise RecipeError(f"attack {text!r}", f"no attack {found[1]!r}", did_you_mean(found[1], [*classes, *NAMES]))
    return parse_value(text, "attacks")


def _knobs(text: str, knobs: str) -> dict[str, Any]:
    """The knobs of a name: literals by name."""
    try:
        call = ast.parse(f"knobs({knobs})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecipeError(f"attack {text!r}", "its knobs cannot be read", EXAMPLE) from None
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise RecipeError(f"attack {text!r}", "a knob is NAME=VALUE", EXAMPLE)
    for keyword in call.keywords:
        if not all(isinstance(node, LITERAL) for node in ast.walk(keyword.value)):
            raise RecipeError(f"attack {text!r}", f"{keyword.arg} must be a number or a text in quotes", EXAMPLE)
    return {str(keyword.arg): parse_value(ast.unparse(keyword.value)) for keyword in call.keywords}
