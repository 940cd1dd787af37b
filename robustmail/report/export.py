"""Folders side by side: a row per folder, a column per attack, for a terminal, a paper or another program."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from robustmail.errors import RunError, did_you_mean
from robustmail.evaluation.results import Results, budget, read_results
from robustmail.records import AttackResult
from robustmail.report.log_lines import printable
from robustmail.report.tables import TextTable, as_latex, as_markdown, as_table

__all__ = ["FORMATS", "export"]

Fact = Callable[[Results], str]
FACTS: dict[str, Fact] = {
    "n": lambda r: f"{r.n:,}",
    "eps": lambda r: budget(r.eps, r.norm),
    "seed": lambda r: "–" if r.seed is None else str(r.seed),
    "images": lambda r: _fingerprint(r),
}
SHOWN = ("n", "eps", "seed")  # in columns, where they differ
COMPARABLE = ("n", "eps", "images")  # where these are the same


def export(folders: Sequence[Path], format: str, width: int | None = None) -> str:
    """Several evaluations or training runs as `table`, `csv`, `markdown`, `latex` or `json`.

    width: of a table; that of the terminal if not given. Raises RunError for an unknown format, and for a folder that
    has no results.json or a damaged one.
    """
    if format not in FORMATS:
        raise RunError(f"export {format!r}", "no such format", did_you_mean(format, FORMATS))
    read = {str(folder): read_results(folder) for folder in folders}
    if format == "table":
        return as_table(_grid(read), width)
    return FORMATS[format](read)


def _csv(read: dict[str, Results]) -> str:
    out = io.StringIO()
    names = [
        "folder", "name", "attack", "accuracy", "low", "high", "correct", "n", "seconds", "eps", "norm", "seed",
        "shard", "complete", "light", "gap", "settings",
    ]  # fmt: skip
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for folder, r in read.items():
        for row in r.rows:
            about = _about(r) | {"shard": "{} of {}".format(*r.shard) if r.shard else None}
            numbers = asdict(row) | {"settings": json.dumps(row.settings) if row.settings else ""}
            numbers["attack"] = numbers.pop("name")
            writer.writerow({name: _plain(value) for name, value in {"folder": folder, **about, **numbers}.items()})
    return out.getvalue()


def _plain(value: object) -> object:
    """A cell as text and nothing else: no control characters, and no formula for a spreadsheet."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _json(read: dict[str, Results]) -> str:
    rows = [
        {"folder": folder, "n": r.n, **_about(r), "attacks": [asdict(row) for row in r.rows]}
        for folder, r in read.items()
    ]
    return json.dumps({"format": 1, "rows": rows, "notes": _notes(read)}, indent=2) + "\n"


FORMATS: dict[str, Callable[[dict[str, Results]], str]] = {
    "table": lambda read: as_table(_grid(read)), "csv": _csv, "markdown": lambda read: as_markdown(_grid(read)),
    "latex": lambda read: as_latex(_grid(read)), "json": _json,
}  # fmt: skip


def _about(r: Results) -> dict[str, object]:
    return {
        "name": r.name, "eps": r.eps, "norm": r.norm, "seed": r.seed, "shard": r.shard, "complete": r.complete,
        "light": r.light and r.light.colour, "gap": r.light and r.light.gap,
    }  # fmt: skip


def _grid(read: dict[str, Results]) -> TextTable:
    """A row for each folder; settings that all rows share are left to the notes."""
    several = list(read.values())
    attacks = _union(several)
    facts = [name for name in SHOWN if len(_said(several, name)) > 1]
    lit = any(r.light for r in several)
    body = []
    for folder, r in read.items():
        by_name = {row.name: row for row in r.rows}
        cells = [
            _called(read, folder),
            *(FACTS[name](r) for name in facts),
            *(_cell(by_name.get(name)) for name in attacks),
        ]
        body.append(cells + ([r.light.colour if r.light else "–"] if lit else []))
    head = ["name", *facts, *attacks, *(["light"] if lit else [])]
    return TextTable(head, body, _notes(read))


def _union(several: Iterable[Results]) -> list[str]:
    """The attacks of all, in order; what sums them up comes last."""
    several = list(several)
    attacks = [row.name for r in several for row in r.attacks]
    sums = [row.name for r in several for row in (r.worst, r.eight_bit) if row]
    return list(dict.fromkeys(attacks)) + [name for name in dict.fromkeys(sums) if name not in attacks]


def _cell(row: AttackResult | None) -> str:
    return f"{100 * row.accuracy:.1f} ±{50 * (row.high - row.low):.1f}" if row else "–"


def _notes(read: dict[str, Results]) -> list[str]:
    """What must stand below the numbers: settings shared, settings that differ, doubts, attacks spelt out."""
    several = list(read.values())
    same = [f"{name} {_said(several, name)[0]}" for name in SHOWN if len(_said(several, name)) == 1]
    notes = ["Accuracy in %, ± half the width of its 95 % Wilson interval" + "".join(f"; {s}" for s in same)]
    if differ := [name for name in COMPARABLE if len(_said(several, name)) > 1]:
        details = "; ".join(f"{name}: {_each(read, FACTS[name])}" for name in differ)
        notes.append(f"Rows that differ in {' or '.join(differ)} cannot be compared as they stand ({details})")
    for folder, r in read.items():
        notes += [f"{_called(read, folder)}: {caveat}" for caveat in r.caveats]
        flags = [flag.name for flag in r.light.flags] if r.light else []
        if r.light and flags:
            notes.append(f"{_called(read, folder)}: the light is {r.light.colour} because of {', '.join(flags)}")
    return [printable(note) for note in notes + _settings(read)]


def _settings(read: dict[str, Results]) -> list[str]:
    """Every attack as it was run: once, where it was the same in all rows."""
    notes = []
    for name in _union(read.values()):
        ways: dict[str, list[str]] = {}
        for folder, r in read.items():
            for row in r.attacks:
                stages = {k: v for k, v in row.settings.items() if k not in ("seed", "standing", "note")}
                spelt = "; ".join(text if len(stages) == 1 else f"{stage} {text}" for stage, text in stages.items())
                if row.name == name and spelt:
                    ways.setdefault(spelt, []).append(_called(read, folder))
        for spelt, who in ways.items():
            whose = f" ({', '.join(who)})" if len(ways) > 1 else ""
            notes.append(f"{name}{whose}: {spelt}")
    return notes


def _said(several: Iterable[Results], name: str) -> list[str]:
    return list(dict.fromkeys(FACTS[name](r) for r in several))


def _each(read: dict[str, Results], fact: Fact) -> str:
    return ", ".join(f"{_called(read, folder)} {fact(r)}" for folder, r in read.items())


def _called(read: dict[str, Results], folder: str) -> str:
    """The name, or the folder where two have the same name."""
    name = read[folder].name
    return name if [r.name for r in read.values()].count(name) == 1 else folder


def _fingerprint(r: Results) -> str:
    return str(r.data.get("fingerprint", "–"))[:8]
