"""Accuracy of the worst class and of the worst 30 % of the classes, as texts for tables and pages."""

from __future__ import annotations

from collections.abc import Iterator

from robustmail.evaluation.class_accuracies import CLASS_METRICS, KINDS, bias_note
from robustmail.evaluation.results import Results
from robustmail.text import percent

__all__ = ["CLASS_HEADS", "class_cells", "class_notes", "class_rows", "class_title"]

CLASS_HEADS = [name for names in CLASS_METRICS.values() for name in names]


def class_title(r: Results, number: int) -> str:
    """The name of a class, or "class 3" where names are not known."""
    names = r.data.get("class_names") or ()
    return str(names[number]) if 0 <= number < len(names) else f"class {number}"


def class_rows(r: Results) -> Iterator[tuple[str, str, str, str]]:
    """(name, accuracy, interval, of what) of the worst class and the tail, natural and robust."""
    for kind, worst in r.worst_classes.items():
        one, tail = worst.worst, worst.tail_classes
        interval = f"{percent(one.low)} – {percent(one.high)}"
        worst_class, tail_name = CLASS_METRICS[kind]
        yield (
            f"{worst_class}: {class_title(r, one.number)}",
            percent(one.accuracy),
            interval,
            f"{round(one.accuracy * one.n)} / {one.n}",
        )
        yield tail_name, percent(worst.tail), "–", f"{len(tail)} of {len(r.classes[kind])} classes"


def class_cells(r: Results) -> list[str]:
    """The numbers in % under CLASS_HEADS."""
    found = [r.worst_classes.get(kind) for kind in KINDS]
    pairs = [(worst.worst.accuracy, worst.tail) if worst else (None, None) for worst in found]
    return ["–" if value is None else f"{100 * value:.1f}" for pair in pairs for value in pair]


def class_notes(r: Results) -> list[str]:
    """What has to be said with these numbers: of the robust ones, if there are any."""
    return [bias_note(r.classes[kind]) for kind in reversed(KINDS) if kind in r.worst_classes][:1]
