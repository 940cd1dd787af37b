"""Accuracies in a notebook."""

from __future__ import annotations

from collections.abc import Iterable

from robustmail.markup import Html, card, table
from robustmail.records import AttackResult
from robustmail.text import percent

__all__ = ["accuracy_card"]


def accuracy_card(title: str, rows: Iterable[AttackResult], *sentences: str) -> Html:
    """A row for each attack, with accuracy, its 95 % interval, images that stand, and seconds; then sentences."""
    cells: list[list[object]] = [
        [row.name, percent(row.accuracy), f"{percent(row.low)} – {percent(row.high)}", f"{row.correct:,} / {row.n:,}",
         f"{row.seconds:.1f}"]
        for row in rows
    ]  # fmt: skip
    heads = ["attack", "accuracy", "95 % interval", "correct / n", "seconds"]
    return card(title, table("", heads, cells), *sentences)
