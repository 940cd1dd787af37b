"""curves.png: how a run went, from its metrics.csv."""

from __future__ import annotations

__all__ = []

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # apart for the colour-blind, and in print
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
