"""The table and the chart of a benchmark."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from robustmail.records import PLAIN, BenchReport
from robustmail.runtime.files import atomic_write, atomic_write_json, make_folder

__all__ = ["bench_table", "draw_bench", "save_bench"]


def bench_table(report: BenchReport) -> Table:
    """A rich table of a report."""
    from rich.box import SIMPLE
    from rich.table import Table

    s = report.settings
    title = f"{s['model']}, batch {s['batch']}, {s['repeats']} repeats, {s['threads']} threads"
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in report.machine.items())
    shown = Table(
        title=title,
        box=SIMPLE,
        caption=f"{s['precision']}\na matrix product does {rates} GFLOP/s; share is of the most",
    )
    for name in ("who", "images/s", "x plain", "spread", "GFLOP/s", "share"):
        shown.add_column(name, justify="left" if name == "who" else "right", no_wrap=True)
    for task in dict.fromkeys(row.task for row in report.rows):
        shown.add_section()
        shown.add_row(task, style="bold")
        for row in (row for row in report.rows if row.task == task):
            work = ("", "") if row.gflops is None else (f"{row.gflops:.0f}", f"{100 * (row.share or 0):.0f}%")
            spread = f"{row.low:.2f}–{row.high:.2f}"
            shown.add_row(row.who, f"{row.images_per_second:.1f}", f"{row.ratio:.2f}", spread, *work)
    return shown


def draw_bench(report: BenchReport, path: Path) -> None:
    """A bar chart of the ratios with their spread, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in report.rows))
    figure = Figure(figsize=(3.2 * len(tasks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        rows = [row for row in report.rows if row.task == task]
        spread = [[r.ratio - r.low for r in rows], [r.high - r.ratio for r in rows]]
        colours = ["#1f77b4" if "robustmail" in r.who or "our view" in r.who else "#aaaaaa" for r in rows]
        bars = axes.bar([r.who for r in rows], [r.ratio for r in rows], yerr=spread, color=colours, capsize=3)
        axes.bar_label(bars, [f"{r.ratio:.1f}x\n{r.images_per_second:.0f}/s" for r in rows], fontsize=8)
        axes.set_title(task, fontsize=10)
        axes.tick_params("x", rotation=60, labelsize=8)
        axes.margins(y=0.2)
        axes.set_ylabel(f"times the {PLAIN}" if task == tasks[0] else "")
    s = report.settings
    figure.suptitle(f"images/s over those of the {PLAIN}: {s['model']}, batch {s['batch']}", fontsize=11)
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def save_bench(report: BenchReport, folder: Path) -> list[Path]:
    """Write bench.json and bench.png; returns where. Raises RunError where that cannot be done."""
    make_folder(folder)
    stem = f"bench-{report.settings['model']}-{report.settings['batch']}"
    numbers, picture = folder / f"{stem}.json", folder / f"{stem}.png"
    atomic_write_json(numbers, asdict(report))
    draw_bench(report, picture)
    return [numbers, picture]
