"""The results table."""

from __future__ import annotations

from rich.table import Table

from robustmail.records import Finished
from robustmail.report.lines import percent

__all__ = ["results_table"]


def results_table(done: Finished) -> Table:
    """Accuracy per attack with its 95 % Wilson interval."""
    table = Table(
        title=f"test set, {done.weights} of epoch {done.epoch + 1}",
        title_justify="left",
        title_style="",
        header_style="",
    )
    table.add_column("attack")
    for name in ("accuracy", "95 % interval", "correct / n", "seconds"):
        table.add_column(name, justify="right")
    for row in done.rows:
        interval = f"{percent(row.low)} – {percent(row.high)}"
        table.add_row(row.name, percent(row.accuracy), interval, f"{row.correct} / {row.n}", f"{row.seconds:.1f}")
    return table
