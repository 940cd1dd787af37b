"""The lab's findings, read back, and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.errors import RunError
from robustmail.evaluation.results import budget, undamaged
from robustmail.margin_lab.results import Area, Estimate, Findings, Lab
from robustmail.report.log_lines import printable
from robustmail.runtime.untrusted import read_json
from robustmail.text import percent, plural

__all__ = ["lab_table", "read_lab"]


def read_lab(folder: Path) -> Lab:
    """What `robustmail margins` wrote; raises RunError where it is missing or damaged."""
    path = folder / "margins.json"
    if not path.is_file():
        raise RunError(str(folder), "has no margins.json", "Pass a folder that robustmail margins wrote.")
    return undamaged(path, lambda: Lab.of(read_json(path)))


def lab_table(lab: Lab) -> RenderableType:
    """A row per margin in two tables, the best first; below them the areas, and what must be said with the numbers."""
    norm, eps = lab.spec["norm"], lab.spec["eps"]
    title = printable(f"{lab.name}: {plural(lab.n, 'image')}, eps {budget(eps, norm)}, seed {lab.spec['seed']}")
    shape = _table(title, "values", "other path\nsame end", "other\nend", "extra\npasses")
    true = _table("a low margin foretells ...", "who is broken\nAUROC", "how far away\nrank correlation",
                  "critical\nat maximum", "who is critical\nAUROC")  # fmt: skip
    for found in lab.findings:
        shape.add_row(*_shape(found))
        if not found.wrong:
            true.add_row(*_true(found, lab))
    return Group(shape, true, *(Text(printable(text)) for text in _said(lab)))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="", header_style="")
    table.add_column("margin", overflow="fold")
    for name in columns:
        table.add_column(name, justify="left" if name == "values" else "right")
    return table


def _shape(found: Findings) -> Iterator[RenderableType]:
    yield Text(printable(found.margin))
    cost = f"{found.cost.forward} + {found.cost.backward}"
    if (some := found.continuity) is None:
        yield from (Text(found.wrong, style="yellow"), "–", "–", cost)
        return
    how = [some.verdict, "path-dependent" if found.path_dependent else "", "random" if found.random else ""]
    yield "\n".join([", ".join(filter(None, how)), f"{plural(some.distinct, 'value')}, {percent(some.ties)} tied"])
    yield from (percent(found.spread["path"].rank), percent(found.spread["end"].rank), cost)


def _true(found: Findings, lab: Lab) -> Iterator[RenderableType]:
    assert found.everywhere is not None
    assert found.hidden is not None
    tied = found.tied_with_best and found is not lab.findings[0]  # the best comes first
    yield Text(printable(found.margin) + (" =" if tied else ""))
    # Images that are wrong as they are all lie at distance 0, and flatter a margin of few values.
    far = found.right.distance if found.right is not None else None
    yield from (_estimate(found.everywhere.auroc), _estimate(far) if far else "–")
    yield f"{found.hidden.critical_at_maximum} of {lab.critical}"
    yield _estimate(found.hidden.auroc)


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
    yield "How far away: rank correlation with the smallest distance that FAB finds, over the images that are right."
    if any(found.tied_with_best for found in lab.findings[1:]):
        yield "=: not to be told apart from the best AUROC at this n."
    yield f"Areas: {'; '.join(map(_area, lab.areas))}."
    yield (
        f"Critical, standing under the training attack and not under the strongest: {lab.critical:,} of {lab.n:,}. "
        "Passes: forward + backward, beside a training step of AT."
    )
    if lab.fab_missed:
        missed = plural(lab.fab_missed, "example")
        yield f"FAB missed {missed} that an attack breaks inside eps: its distances are upper bounds."
    for found in lab.findings:
        if found.everywhere and (auroc := found.everywhere.auroc).high is not None and auroc.high < 0.5:
            yield f"{found.margin} is upside down: its high values need help. Turn its sign."


def _area(area: Area) -> str:
    if not area.n:
        return f"{area.name} 0"
    return f"{area.name} {area.n:,}, {percent(area.broken / area.n)} of them broken"
