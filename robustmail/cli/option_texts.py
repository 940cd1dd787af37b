"""How the texts of options are read."""

from __future__ import annotations

import re
from typing import Any

from robustmail.errors import RecipeError, RobustmailError

__all__ = ["check_count", "parse_eps", "parse_norm", "parse_shard", "read_number", "split_names"]


def split_names(option: str, text: str, example: str) -> list[str]:
    """Split a list at its commas. Raises RecipeError: no name (the message shows `example`), or one given twice."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(option, f"{twice[0]} is named twice")
    if not names:
        raise RecipeError(option, "no name given", f"Write {example}.")
    return names


def parse_shard(text: str | None) -> tuple[int, int]:
    """Read K/N as (K, N); (1, 1) where nothing is given. Raises RecipeError: not K/N with 1 <= K <= N."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"--shard {text}", "not K/N with 1 <= K <= N", "Write 1/4, 2/4, 3/4 and 4/4.")
    return int(match[1]), int(match[2])


def check_count(option: str, value: int | None) -> int | None:
    """Return a count that is None or at least 1. Raises RecipeError: less than 1."""
    if value is not None and value < 1:
        raise RecipeError(f"{option} {value}", "less than 1")
    return value


def parse_eps(text: str) -> list[float]:
    """The numbers of --eps, which are one or several in any order, smallest first.

    Raises RecipeError: not numbers, one of them twice, or of several one below 0 or none above 0.
    """
    numbers = sorted(read_number(part) for part in text.split(","))
    if len(numbers) > 1 and (len(set(numbers)) < len(numbers) or numbers[0] < 0 or not numbers[-1]):
        raise RecipeError(f"--eps {text}", "several eps differ from one another, and none is below 0",
                          "Write 0,4/255,8/255.")  # fmt: skip
    return numbers


def read_number(text: str) -> float:
    """The number of --eps. Raises RecipeError."""
    from robustmail.config.overrides import parse_value

    try:
        value = parse_value(text.strip())
    except RobustmailError:
        value = None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RecipeError(f"--eps {text}", "not a number", "Write 8/255.")
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(f"--eps {text}", "not a finite number", "Write 8/255.") from None


def parse_norm(text: str) -> Any:
    """linf or l2, however it is written. Raises RecipeError."""
    norm = text.lower().replace("-", "")
    if norm not in ("linf", "l2"):
        raise RecipeError(f"--norm {text}", "no such norm", "There are: linf, l2.")
    return norm
