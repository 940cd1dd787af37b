"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["plural", "percent", "duration", "fraction"]


def plural(n: int, thing: str) -> str:
    """A number with its noun: 1 image, 2,000 images."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def percent(share: float) -> str:
    """0.4321 -> 43.2 %"""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """4000 -> 1 h 7 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def fraction(eps: float) -> str:
    """0.0313725 -> 8/255; 0.031 stays 0.031, which is another budget."""
    short = f"{eps:.3g}"
    whole = round(eps * 255)
    return f"{whole}/255" if eps != float(short) and abs(eps * 255 - whole) < 2e-3 else short
