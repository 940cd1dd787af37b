"""The lab's findings, read back, and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.errors import RunError
from robustmail.lab.records import Area, Estimate, Findings, Lab
from robustmail.report.lines import percent, printable
from robustmail.report.results import budget, undamaged

__all__ = ["lab_table", "read_lab"]


def read_lab(folder: Path) -> Lab:
    """What `robustmail margins` wrote; raises RunError where it is missing or damaged."""
    path = folder / "margins.json"
    if not path.is_file():
        raise RunError(str(folder), "has no margins.json", "Pass a folder that robustmail margins wrote.")
    return undamaged(path, lambda: Lab.of(json.loads(path.read_text(encoding="utf-8"))))


def lab_table(lab: Lab) -> RenderableType:
    """A row per margin, the best first; below it the areas, and what must be said with the numbers."""
    norm, eps = lab.spec["norm"], lab.spec["eps"]
    title = Text(printable(f"{lab.name}: {lab.n:,} images, eps {budget(eps, norm)}, seed {lab.spec['seed']}"))
    table = Table(title=title, title_justify="left", title_style="", header_style="")
    table.add_column("margin")
    table.add_column("values", min_width=26)
    for name in ("other path\nsame end", "other\nend", "AUROC\n95 % interval", "rank corr.\nwith distance",
                 "critical\nat maximum", "AUROC of\ncritical", "extra\npasses"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for found in lab.findings:
        table.add_row(*_cells(found, lab.critical))
    return Group(table, *(Text(printable(text)) for text in _said(lab)))


def _cells(found: Findings, critical: int) -> Iterator[RenderableType]:
    yield Text(printable(found.margin) + (" =" if found.tied_with_best else ""))
    if not (found.continuity and found.hidden and found.everywhere):
        yield Text(found.wrong, style="yellow")
        return
    some = found.continuity
    how = [some.verdict, "path-dependent" if found.path_dependent else "", "random" if found.random else ""]
    yield "\n".join([", ".join(filter(None, how)), f"{some.distinct:,} values, {percent(some.ties)} tied"])
    for cause in ("path", "end"):
        yield percent(found.spread[cause].rank)
    yield _estimate(found.everywhere.auroc)
    yield _estimate(found.everywhere.distance)
    yield f"{found.hidden.critical_at_maximum} of {critical}"
    yield _estimate(found.hidden.auroc)
    yield f"{found.cost.forward} + {found.cost.backward}"


def _estimate(some: Estimate) -> str:
    if some.value is None:
        return "–"
    interval = "" if some.low is None else f"\n{some.low:.3f} – {some.high:.3f}"
    return f"{some.value:.3f}{interval}"


def _said(lab: Lab) -> Iterator[str]:
    """What the columns mean, in as few lines as will do."""
    yield (
        "Paths: by how much an example's rank changes, of all ranks, on another path to the same end, and at another "
        "path's end."
    )
    against = ", ".join(lab.spec["against"])
    yield f"AUROC: does a low margin foretell who is broken by {against} or a path? 0.5 is guessing, 1 is always."
    if any(found.tied_with_best for found in lab.findings[1:]):
        yield "=: not to be told apart from the best AUROC at this n."
    yield f"Areas: {'; '.join(map(_area, lab.areas))}."
    yield (
        f"Critical: {lab.critical} of {lab.n:,} stand under the training attack and not under the strongest. "
        "Passes: forward + backward, beside a training step of AT."
    )
    if lab.fab_missed:
        yield f"FAB missed {lab.fab_missed} examples that an attack breaks inside eps: its distances are upper bounds."
    for found in lab.findings:
        if found.everywhere and (auroc := found.everywhere.auroc).high is not None and auroc.high < 0.5:
            yield f"{found.margin} is upside down: its high values need help. Turn its sign."


def _area(area: Area) -> str:
    if not area.n:
        return f"{area.name} 0"
    return f"{area.name} {area.n:,}, {percent(area.broken / area.n)} of them broken"
