"""Numbers and names as text for people."""

from __future__ import annotations

import math

__all__ = ["plural", "percent", "duration", "format_eps", "split_at_commas"]

OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"


def plural(n: int, thing: str) -> str:
    """Format a number with its noun: 1 image, 2,000 images."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def percent(share: float) -> str:
    """Format a share in [0, 1]: 0.4321 -> 43.2 %."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Format seconds: 4000 -> 1 h 7 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def format_eps(eps: float | None, norm: str = "") -> str:
    """Format an eps or a distance: (8/255, "linf") -> 8/255 Linf; 0.031 -> 0.031, which is another budget.

    In l-inf, halves and quarters of 1/255 are fractions too. All else has three digits; None is "unknown".
    """
    if eps is None:
        return "unknown"
    short = f"{eps:.3g}"
    parts = 4 if norm == "linf" else 1
    levels = round(eps * 255 * parts) / parts
    is_short = math.isclose(eps, float(short), rel_tol=2e-6)  # also after rounding to float32
    is_fraction = not is_short and levels > 0 and abs(eps * 255 - levels) < 2e-3
    return f"{f'{levels:g}/255' if is_fraction else short} {norm.capitalize()}".strip()


def split_at_commas(text: str) -> tuple[list[str], str]:
    """Split a text at the commas outside of brackets and quotes.

    Returns (the parts, what is left open: "quote", "bracket" or ""). A bracket too many counts as one left open.
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        else:
            depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and not (depth or quote):
            parts.append("")
        else:
            parts[-1] += letter
    return parts, "quote" if quote else "bracket" if depth else ""
