"""Numbers and names as text for people."""

from __future__ import annotations

__all__ = ["plural", "percent", "duration", "fraction"]


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


def fraction(eps: float) -> str:
    """Format an eps: 0.0313725 -> 8/255, but 0.031 -> 0.031, which is another budget."""
    short = f"{eps:.3g}"
    whole = round(eps * 255)
    return f"{whole}/255" if eps != float(short) and abs(eps * 255 - whole) < 2e-3 else short
