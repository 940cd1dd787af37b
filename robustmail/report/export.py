"""Compare folders of results: a row per folder, a column per attack, in several formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from robustmail.errors import RunError, did_you_mean
from robustmail.evaluation.class_accuracies import CLASS_METRICS
from robustmail.evaluation.results import Results, read_results
from robustmail.records import AttackResult
from robustmail.report.classes import CLASS_HEADS, class_cells, class_notes
from robustmail.report.tables import TextTable, as_latex, as_markdown, as_table
from robustmail.runtime.untrusted import printable
from robustmail.text import format_eps

__all__ = ["FORMATS", "export"]

Setting = Callable[[Results], str]
SETTINGS: dict[str, Setting] = {
    "n": lambda r: f"{r.n:,}",
    "eps": lambda r: format_eps(r.eps, r.norm),
    "seed": lambda r: "–" if r.seed is None else str(r.seed),
    "images": lambda r: _fingerprint(r),
}
COLUMNS = ("n", "eps", "seed")  # settings with a column, where they differ
MUST_AGREE = ("n", "eps", "images")  # settings without which rows cannot be compared


def export(folders: Sequence[Path], format: str, width: int | None = None) -> str:
    """Format the results of several evaluations or training runs.

    folders: each with a results.json.
    format: a key of `FORMATS`: table, csv, markdown, latex or json.
    width: of a table, in characters; by default the terminal's.

    Raises RunError: unknown format; a results.json is missing or damaged.
    """
    if format not in FORMATS:
        raise RunError(f"export {format!r}", "no such format", did_you_mean(format, FORMATS))
    results = {str(folder): read_results(folder) for folder in folders}
    if format == "table":
        return _texts(results, partial(as_table, width=width))
    return FORMATS[format](results)


def _csv(results: dict[str, Results]) -> str:
    out = io.StringIO()
    names = [
        "folder", "name", "attack", "accuracy", "low", "high", "correct", "n", "seconds", "eps", "norm", "seed",
        "shard", "complete", "light", "gap", "settings",
    ]  # fmt: skip
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for folder, r in results.items():
        about = _metadata(r) | {"folder": folder, "shard": "{} of {}".format(*r.shard) if r.shard else None}
        for cells in (*map(_csv_row, r.rows), *_csv_class_rows(r)):
            writer.writerow({name: _plain(value) for name, value in {**about, **cells}.items()})
    return out.getvalue()


def _csv_row(row: AttackResult) -> dict[str, object]:
    return asdict(row) | {"attack": row.name, "settings": json.dumps(row.settings) if row.settings else ""}


def _csv_class_rows(r: Results) -> Iterator[dict[str, object]]:
    for kind, worst in r.worst_classes.items():
        one, (worst_class, tail) = asdict(worst.worst), CLASS_METRICS[kind]
        yield one | {"attack": worst_class, "correct": round(worst.worst.accuracy * worst.worst.n)}
        yield {"attack": tail, "accuracy": worst.tail}


def _plain(value: object) -> object:
    """A cell as text and nothing else: no control characters, and no formula for a spreadsheet."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _json(results: dict[str, Results]) -> str:
    rows = [
        {
            "folder": folder,
            "n": r.n,
            **_metadata(r),
            "attacks": [asdict(row) for row in r.rows],
            "worst_classes": {kind: asdict(worst) for kind, worst in r.worst_classes.items()},
        }
        for folder, r in results.items()
    ]
    return json.dumps({"format": 1, "rows": rows, "notes": _notes(results)}, indent=2) + "\n"


FORMATS: dict[str, Callable[[dict[str, Results]], str]] = {
    "table": lambda results: _texts(results, as_table),
    "csv": _csv,
    "markdown": lambda results: _texts(results, as_markdown),
    "latex": lambda results: _texts(results, as_latex),
    "json": _json,
}


def _metadata(r: Results) -> dict[str, object]:
    return {
        "name": r.name,
        "eps": r.eps,
        "norm": r.norm,
        "seed": r.seed,
        "shard": r.shard,
        "complete": r.complete,
        "light": r.light and r.light.colour,
        "gap": r.light and r.light.gap,
    }


def _texts(results: dict[str, Results], form: Callable[[TextTable], str]) -> str:
    """The table of attacks, and the table of worst classes where they are known."""
    tables = [_text_table(results), _class_table(results)]
    return "\n".join(form(table) for table in tables if table.body)


def _class_table(results: dict[str, Results]) -> TextTable:
    having = {folder: r for folder, r in results.items() if r.worst_classes}
    notes = ["Accuracy in % of the worst class, and its mean over the worst 30 % of the classes; robust: worst case"]
    for folder, r in having.items():
        notes += [f"{_row_name(results, folder)}: {note}" for note in class_notes(r)]
    body = [[_row_name(results, folder), *class_cells(r)] for folder, r in having.items()]
    return TextTable(["name", *CLASS_HEADS], body, notes)


def _text_table(results: dict[str, Results]) -> TextTable:
    """A row for each folder; settings that all rows share are left to the notes."""
    several = list(results.values())
    attacks = _attack_names(several)
    columns = [name for name in COLUMNS if len(_distinct(several, name)) > 1]
    has_light = any(r.light for r in several)
    body = []
    for folder, r in results.items():
        by_name = {row.name: row for row in r.rows}
        cells = [
            _row_name(results, folder),
            *(SETTINGS[name](r) for name in columns),
            *(_cell(by_name.get(name)) for name in attacks),
        ]
        body.append(cells + ([r.light.colour if r.light else "–"] if has_light else []))
    head = ["name", *columns, *attacks, *(["light"] if has_light else [])]
    return TextTable(head, body, _notes(results))


def _attack_names(several: Iterable[Results]) -> list[str]:
    """The attacks of all folders, in order; worst cases come last."""
    several = list(several)
    attacks = [row.name for r in several for row in r.attacks]
    sums = [row.name for r in several for row in (r.worst, r.eight_bit) if row]
    return list(dict.fromkeys(attacks)) + [name for name in dict.fromkeys(sums) if name not in attacks]


def _cell(row: AttackResult | None) -> str:
    return f"{100 * row.accuracy:.1f} ±{50 * (row.high - row.low):.1f}" if row else "–"


def _notes(results: dict[str, Results]) -> list[str]:
    """The notes below the numbers: shared settings, settings that differ, caveats, parameters of the attacks."""
    several = list(results.values())
    shared = [f"{name} {_distinct(several, name)[0]}" for name in COLUMNS if len(_distinct(several, name)) == 1]
    notes = ["Accuracy in %, ± half the width of its 95 % Wilson interval" + "".join(f"; {text}" for text in shared)]
    if different := [name for name in MUST_AGREE if len(_distinct(several, name)) > 1]:
        details = "; ".join(f"{name}: {_by_row(results, SETTINGS[name])}" for name in different)
        notes.append(f"Rows that differ in {' or '.join(different)} cannot be compared as they stand ({details})")
    for folder, r in results.items():
        notes += [f"{_row_name(results, folder)}: {caveat}" for caveat in r.caveats]
        flags = [flag.name for flag in r.light.flags] if r.light else []
        if r.light and flags:
            notes.append(f"{_row_name(results, folder)}: the light is {r.light.colour} because of {', '.join(flags)}")
    return [printable(note) for note in notes + _settings(results)]


def _settings(results: dict[str, Results]) -> list[str]:
    """Every attack with its parameters: once where they are the same in all rows."""
    notes = []
    for name in _attack_names(results.values()):
        by_text: dict[str, list[str]] = {}
        for folder, r in results.items():
            for row in r.attacks:
                stages = {k: v for k, v in row.settings.items() if k not in ("seed", "standing", "note")}
                text = "; ".join(v if len(stages) == 1 else f"{stage} {v}" for stage, v in stages.items())
                if row.name == name and text:
                    by_text.setdefault(text, []).append(_row_name(results, folder))
        for text, names in by_text.items():
            rows = f" ({', '.join(names)})" if len(by_text) > 1 else ""
            notes.append(f"{name}{rows}: {text}")
    return notes


def _distinct(several: Iterable[Results], name: str) -> list[str]:
    return list(dict.fromkeys(SETTINGS[name](r) for r in several))


def _by_row(results: dict[str, Results], setting: Setting) -> str:
    return ", ".join(f"{_row_name(results, folder)} {setting(r)}" for folder, r in results.items())


def _row_name(results: dict[str, Results], folder: str) -> str:
    """The name of the results, or their folder where two have the same name."""
    name = results[folder].name
    return name if [r.name for r in results.values()].count(name) == 1 else folder


def _fingerprint(r: Results) -> str:
    return str(r.data.get("fingerprint", "–"))[:8]
