"""The table and the chart of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from robustmail.records import PLAIN, BenchReport, BenchRow, EvaluationBenchRow
from robustmail.report.style import BLUE, GREY, save_picture, styled_figure
from robustmail.runtime.files import atomic_write_json, make_folder

__all__ = ["bench_table", "draw_bench", "evaluation_line", "evaluation_table", "save_bench", "save_evaluation"]

COLUMNS = ("implementation", "images/s", "speed-up", "lowest – highest", "GFLOP/s", "of peak")


def bench_table(report: BenchReport) -> Table:
    """A benchmark as a table: a section for each task, a row for each implementation.

    The speed-up is over the plain loop, the median of the repeats. GFLOP/s and their share of the peak are empty where
    the amount of work depends on the images.
    """
    settings = report.settings
    peaks = ", ".join(f"{name} {rate:,.0f}" for name, rate in report.machine.items())
    table = Table(
        title=f"{settings['model']}, batch {settings['batch']}, {settings['repeats']} repeats, "
        f"{settings['threads']} threads",
        box=SIMPLE,
        caption=f"{settings['precision']}\nspeed-up: over the {PLAIN}\npeak: the faster of matrix products, in "
        f"GFLOP/s: {peaks}",
    )
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for task, rows in _by_task(report).items():
        table.add_section()
        table.add_row(task, style="bold")
        for row in rows:
            work = ("", "") if row.gflops is None else (f"{row.gflops:.0f}", f"{100 * (row.share or 0):.0f}%")
            interval = f"{row.low:.2f} – {row.high:.2f}"
            table.add_row(row.who, f"{row.images_per_second:.1f}", f"{row.ratio:.2f}", interval, *work)
    return table


def evaluation_line(row: EvaluationBenchRow) -> str:
    """One stage of an evaluation, for the screen while the next ones run."""
    seconds = f"{row.ours:.2f} s, reference {row.reference:.2f} s, ratio {row.ratio:.2f}"
    return f"{row.network}, {row.stage}: {seconds}; of {row.n} images {row.ours_stand} and {row.reference_stand} stand"


def evaluation_table(rows: list[EvaluationBenchRow]) -> Table:
    """Seconds of an evaluation: a section for each network, a row for each stage, and their sum for AutoAttack."""
    caption = "theirs: the official AutoAttack; for pgd20 a loop of ten lines in batches of 250"
    table = Table(title="evaluation, ours beside the reference", box=SIMPLE, caption=caption)
    for i, name in enumerate(("stage", "images", "ours, s", "theirs, s", "ratio", "ours stand", "theirs stand")):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for network in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == network]
        table.add_section()
        table.add_row(network, style="bold")
        for row in own:
            seconds = f"{row.ours:.2f}", f"{row.reference:.2f}", f"{row.ratio:.2f}"
            table.add_row(row.stage, str(row.n), *seconds, str(row.ours_stand), str(row.reference_stand))
        ours, reference = (
            sum(getattr(row, who) for row in own if row.stage != "pgd20") for who in ("ours", "reference")
        )
        if reference:
            table.add_row("aa", "", f"{ours:.2f}", f"{reference:.2f}", f"{ours / reference:.2f}", "", "")
    return table


def draw_bench(report: BenchReport, path: Path) -> None:
    """Draw the speed-ups as a bar chart, a panel for each task; the error bars are the lowest and highest repeat.

    path: of a PNG file.
    """
    by_task = _by_task(report)
    with styled_figure(3.2 * len(by_task), 4) as page:
        panels = page.subplots(1, len(by_task), squeeze=False)[0]
        for k, (axis, (task, rows)) in enumerate(zip(panels, by_task.items(), strict=True)):
            errors = [[row.ratio - row.low for row in rows], [row.high - row.ratio for row in rows]]
            colours = [BLUE if "robustmail" in row.who or "our view" in row.who else GREY for row in rows]
            names, ratios = [row.who for row in rows], [row.ratio for row in rows]
            bars = axis.bar(names, ratios, yerr=errors, color=colours, capsize=3)
            axis.bar_label(bars, [f"{row.ratio:.1f}x\n{row.images_per_second:.0f}/s" for row in rows], fontsize=8)
            axis.set_title(task, fontsize=10)
            axis.tick_params("x", rotation=60, labelsize=8)
            axis.margins(y=0.2)
            axis.set_ylabel("" if k else f"speed-up over the {PLAIN}")
        settings = report.settings
        page.suptitle(f"Images per second: {settings['model']}, batch {settings['batch']}", fontsize=11)
        save_picture(page, path)


def save_bench(report: BenchReport, folder: Path) -> list[Path]:
    """Write bench-MODEL-BATCH.json and .png; returns their paths. Raises RunError: the folder cannot be written."""
    make_folder(folder)
    stem = f"bench-{report.settings['model']}-{report.settings['batch']}"
    numbers, picture = folder / f"{stem}.json", folder / f"{stem}.png"
    atomic_write_json(numbers, asdict(report))
    draw_bench(report, picture)
    return [numbers, picture]


def save_evaluation(rows: Sequence[EvaluationBenchRow], provenance: dict[str, Any], folder: Path) -> Path:
    """Write bench-evaluation.json; returns its path. Raises RunError: the folder cannot be written."""
    make_folder(folder)
    path = folder / "bench-evaluation.json"
    atomic_write_json(path, {"rows": [asdict(row) for row in rows], "provenance": provenance})
    return path


def _by_task(report: BenchReport) -> dict[str, list[BenchRow]]:
    tasks: dict[str, list[BenchRow]] = {}
    for row in report.rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks
