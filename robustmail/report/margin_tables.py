"""Read the results of the margin lab and show them as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.errors import RunError
from robustmail.evaluation.results import undamaged
from robustmail.margin_lab.results import Area, Estimate, Findings, LabResults
from robustmail.runtime.untrusted import printable, read_json
from robustmail.text import format_eps, percent, plural

__all__ = ["lab_table", "read_lab"]

SAME_ORDER = 0.95  # two margins rank alike where the whole interval of their rank correlation is above this


def read_lab(folder: Path) -> LabResults:
    """Read the margins.json of a folder. Raises RunError: missing or damaged."""
    path = folder / "margins.json"
    if not path.is_file():
        raise RunError(str(folder), "no margins.json in it", "Pass a folder that robustmail margins wrote.")
    return undamaged(path, lambda: LabResults.of(read_json(path)))


def lab_table(lab: LabResults) -> RenderableType:
    """Two tables with a row per margin, the best first; below them the areas and notes on the numbers."""
    norm, eps = lab.spec["norm"], lab.spec["eps"]
    title = printable(f"{lab.name}: {plural(lab.n, 'image')}, eps {format_eps(eps, norm)}, seed {lab.spec['seed']}")
    values = _table(title, "values", "other path\nsame end", "other\nend", "extra\npasses")
    predictions = _table(
        "a low margin predicts ...",
        "broken\nAUROC",
        "small distance\nrank correlation",
        "critical\nat maximum",
        "critical\nAUROC",
    )
    for findings in lab.findings:
        values.add_row(*_value_cells(findings))
        if not findings.wrong:
            predictions.add_row(*_prediction_cells(findings, lab))
    return Group(values, predictions, *(Text(printable(note)) for note in _notes(lab)))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="", header_style="")
    table.add_column("margin", overflow="fold")
    for name in columns:
        table.add_column(name, justify="left" if name == "values" else "right", overflow="fold")
    return table


def _value_cells(findings: Findings) -> Iterator[RenderableType]:
    yield Text(printable(findings.margin))
    cost = f"{findings.cost.forward} + {findings.cost.backward}"
    if (continuity := findings.continuity) is None:
        yield from (Text(findings.wrong, style="yellow"), "–", "–", cost)
        return
    adjectives = [continuity.verdict]
    adjectives += ["path-dependent"] * bool(findings.path_dependent) + ["random"] * bool(findings.random)
    n_values = f"{plural(continuity.distinct, 'value')}, {percent(continuity.ties)} tied"
    yield f"{', '.join(adjectives)}\n{n_values}"
    yield from (percent(findings.spread["path"].rank), percent(findings.spread["end"].rank), cost)


def _prediction_cells(findings: Findings, lab: LabResults) -> Iterator[RenderableType]:
    assert findings.everywhere is not None
    assert findings.hidden is not None
    is_tied = findings.tied_with_best and findings is not lab.findings[0]  # the best comes first
    yield Text(printable(findings.margin) + (" =" if is_tied else ""))
    yield _estimate(findings.everywhere.auroc)
    # Over the correct images: all others have distance 0, which favours a margin with few values.
    yield _estimate(findings.right.distance) if findings.right is not None else "–"
    yield f"{findings.hidden.critical_at_maximum} of {lab.critical}"
    yield _estimate(findings.hidden.auroc)


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return "–"
    interval = "" if estimate.low is None else f"\n{estimate.low:.3f} – {estimate.high:.3f}"
    return f"{estimate.value:.3f}{interval}"


def _notes(lab: LabResults) -> Iterator[str]:
    """What the columns mean."""
    yield (
        "Other path, other end: mean change of an example's rank, in % of all ranks, with the trace or the end of "
        "another attack path."
    )
    against = ", ".join(lab.spec["against"])
    yield f"Broken: by {against} or an attack path. AUROC: 0.5 is guessing, 1 is always right."
    yield "Distance: the smallest that FAB finds, over the images that are correct without an attack."
    if any(findings.tied_with_best for findings in lab.findings[1:]):
        yield "=: the difference to the best AUROC is not significant at this n."
    yield f"Areas: {'; '.join(map(_area, lab.areas))}."
    yield f"Critical: correct under the training attack, broken by another one: {lab.critical:,} of {lab.n:,}."
    yield "Extra passes: forward + backward, added to a training step of AT."
    if lab.fab_missed:
        missed = plural(lab.fab_missed, "example")
        yield f"FAB missed {missed} that an attack breaks inside eps: its distances are upper bounds."
    yield from _same_orders(lab)
    for findings in lab.findings:
        if findings.everywhere and (auroc := findings.everywhere.auroc).high is not None and auroc.high < 0.5:
            yield f"{findings.margin} is inverted: broken examples have high values. Change its sign."


def _same_orders(lab: LabResults) -> Iterator[str]:
    """A line for each group of margins that rank all examples nearly like its best one."""
    rows, named = lab.rank_correlation.get("everywhere", {}), set()
    for best in (findings.margin for findings in lab.findings if findings.margin in rows):
        alike = {
            name: rho
            for name, rho in rows[best].items()
            if name not in named and name != best and rho.low is not None and rho.low >= SAME_ORDER
        }
        if best not in named and alike:
            named |= {best, *alike}
            margins = ", ".join(f"{name} {rho.value:.3f}" for name, rho in alike.items())
            yield f"Nearly the order of {best} (rank correlation over all images at least {SAME_ORDER}): {margins}."


def _area(area: Area) -> str:
    if not area.n:
        return f"{area.name} 0"
    return f"{area.name} {area.n:,}, {percent(area.broken / area.n)} of them broken"
