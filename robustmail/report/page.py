"""report.html: an evaluation or a training run as one page without external files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from robustmail.evaluation.class_accuracies import ClassAccuracy
from robustmail.evaluation.results import (
    LIGHTS,
    Check,
    Ledger,
    Results,
    Verdict,
    read_ledger,
    read_results,
    undamaged,
)
from robustmail.markup import Html, table, tag
from robustmail.report import svg
from robustmail.report.classes import class_notes, class_rows, class_title
from robustmail.report.example_images import Example, data_uri, magnification, png, read_examples
from robustmail.report.tables import BELIEVING
from robustmail.runtime.files import atomic_write_text
from robustmail.runtime.untrusted import read_bytes, verify_command
from robustmail.text import duration, format_eps, percent

__all__ = ["write_page"]

MAX_CLASSES = 20  # rows of the table of classes; results.json has all
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no requests, no scripts
SIGNS = {"green": "✓", "yellow": "!", "red": "✗", "grey": "?"}


def write_page(folder: Path) -> Path:
    """Write report.html into the folder of an evaluation or run; returns its path.

    Raises RunError: results.json, ledger.csv or examples.safetensors is damaged, or there is no results.json.
    """
    results, ledger = read_results(folder), read_ledger(folder)
    page = undamaged(folder / "results.json", lambda: _page(results, ledger, folder))
    path = folder / "report.html"
    atomic_write_text(path, f"<!DOCTYPE html>\n{page}\n")
    return path


def _page(results: Results, ledger: Ledger | None, folder: Path) -> Html:
    sections = [
        _light(results), _attacks(results),
        tag("div", _curve(results), _broken_by(ledger), class_="pair"),
        tag("div", _margins(results), _outcomes(ledger), class_="pair"), _weights(results),
        _classes(results), _examples(results, ledger, folder), _training(folder), _settings(results),
        _provenance(results, folder),
    ]  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{results.name}: {results.claim}"),
        tag("style", Html(files("robustmail.report").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    return tag("html", head, tag("body", _header(results), tag("main", *sections)), lang="en")


def _header(r: Results) -> Html:
    model, data = (r.raw.get("spec") or {}).get("model"), r.data.get("name")
    about = ", ".join(filter(None, (model and str(model), data and f"on {data}", r.setting)))
    number = None
    if row := r.quoted:
        interval = f"95 % interval {percent(row.low)} to {percent(row.high)}; {row.correct:,} of {row.n:,}."
        number = tag(
            "div",
            tag("strong", percent(row.accuracy)),
            tag(
                "p",
                r.claim.removeprefix(f"{percent(row.accuracy)} ") + ".",
                tag("br"),
                tag("span", interval, class_="quiet"),
            ),
            class_="number",
        )
    caveats = tag("ul", *(tag("li", text) for text in r.caveats), class_="caveats quiet") if r.caveats else None
    return tag("header", tag("h1", r.name), tag("p", about, class_="quiet"), number, caveats)


def _light(r: Results) -> Html | None:
    if (light := r.light) is None:
        return None
    gap = None
    if light.gap is not None:
        gap = tag("p", f"From the best PGD number to the strongest attack: {light.gap:.1f} points.", class_="quiet")
    passed = None
    if light.examined:
        checks = tag("ul", *map(_check, light.examined), class_="flags")
        passed = tag("details", tag("summary", f"checks that found no problem: {len(light.examined)}"), checks)
    return _section(
        "Can the number be believed?",
        tag(
            "div",
            tag("p", tag("b", f"{SIGNS[light.colour]} {light.colour}"), f": {LIGHTS[light.colour]}."),
            gap,
            tag("ul", *map(_check, light.flags), class_="flags") if light.flags else None,
            passed,
            class_=f"light {light.colour}",
        ),
    )


def _check(check: Check) -> Html:
    light = check.light if check.light in LIGHTS else "grey"
    name = tag("b", check.name, title=f"{BELIEVING}, section {check.name}")  # no link: the page may lie anywhere
    text = "; ".join(filter(None, (check.measured, check.meaning))).rstrip(".")
    return tag("li", tag("b", f"{SIGNS[light]} "), name, f" ({check.light}): {text}.", class_=f"flag {light}")


def _attacks(r: Results) -> Html | None:
    if not r.rows:
        return None
    rows: list[list[object]] = [
        [
            row.name, percent(row.accuracy),
            tag("div", svg.whisker(row.low, row.accuracy, row.high), class_="worst" if row is r.quoted else None),
            f"{percent(row.low)} – {percent(row.high)}", f"{row.correct:,} / {row.n:,}", duration(row.seconds),
        ]
        for row in r.rows
    ]  # fmt: skip
    heads = ["attack", "accuracy", "-graph", "95 % interval", "correct / n", "time"]
    return _section(
        "Attacks", table("Images still classified correctly; the line runs from 0 to 100 %.", heads, rows, "wide")
    )


MAX_EPS_RATIO = 6.0
"""A point of the curve at more than so many times the evaluated eps is mentioned, not drawn."""


def _curve(r: Results) -> Html | None:
    curve = r.raw.get("curve")
    if not curve or not curve.get("points"):
        return None
    points = [svg.Point(*(float(p[key]) for key in ("eps", "accuracy", "low", "high"))) for p in curve["points"]]
    quoted = None
    if r.quoted:
        quoted = svg.Point(r.eps, r.quoted.accuracy, r.quoted.low, r.quoted.high)
    caption = f"Line: {curve.get('attack', 'an attack')} on {curve.get('n', '?')} images, with its 95 % interval."
    far = [p for p in points if r.eps and p.eps > MAX_EPS_RATIO * r.eps]  # they would compress the rest
    points = [p for p in points if p not in far]
    caption += "".join(f" At eps {format_eps(p.eps, r.norm)} {percent(p.accuracy)} stand." for p in far)
    if quoted and r.quoted:
        caption += f" Dot: {r.quoted.name} on {r.quoted.n:,} images, at the eps that was evaluated."
    figure = tag("figure", svg.curve(points, quoted, r.norm), tag("figcaption", caption))
    return _section("Accuracy by eps", figure)


def _broken_by(ledger: Ledger | None) -> Html | None:
    if not ledger or not ledger.verdicts:
        return None
    broken_by = Counter(v.broken_by for v in ledger.verdicts if v.fate == "broken")
    outcomes = Counter(v.fate for v in ledger.verdicts)
    counts = [("wrong without attack", outcomes["wrong"], "wrong")]
    counts += [(name, broken_by[name], "broken") for name in dict.fromkeys((*ledger.stages, *broken_by))]
    counts += [("stands", outcomes["stands"], "stands")]
    n = len(ledger.verdicts)
    rows: list[list[object]] = [
        [name, svg.bar_chart(count / n, kind), f"{count:,}", percent(count / n)] for name, count, kind in counts
    ]
    caption = "Every image once: by the first attack that broke it, in the order of the attacks."
    return _section("What broke the images", table(caption, ["first broken by", "-graph", "images", "share"], rows))


def _classes(r: Results) -> Html | None:
    if not r.classes:
        return None
    pairs = sorted(zip(r.classes["natural"], r.classes["robust"], strict=True), key=lambda pair: pair[1].accuracy)
    rows: list[list[object]] = [
        [
            class_title(r, natural.number), svg.bullet(natural.accuracy, robust.accuracy), percent(natural.accuracy),
            _interval(natural), percent(robust.accuracy), _interval(robust), f"{robust.n:,}",
        ]
        for natural, robust in pairs[:MAX_CLASSES]
    ]  # fmt: skip
    caption = "The least robust classes first, with 95 % Wilson intervals"
    more = f"; {MAX_CLASSES} of {len(pairs)}, the others are in results.json."
    caption += more if len(pairs) > MAX_CLASSES else "."
    heads = ["class", "-graph", "natural", "interval", "robust", "interval", "n"]
    keys = _keys(natural="natural accuracy", robust="robust accuracy")
    worst = [list[object](cells) for cells in class_rows(r)]
    notes = " ".join(f"{note}." for note in class_notes(r))
    worst_table = table(notes, ["", "accuracy", "95 % interval", "of"], worst) if worst else None
    return _section("By class", keys, table(caption, heads, rows), worst_table)


def _interval(c: ClassAccuracy) -> str:
    return f"{percent(c.low)} – {percent(c.high)}"


def _margins(r: Results) -> Html | None:
    caption = "Quantiles of the margin on the clean image: p(true) − max p(other)."
    return _quantiles("By margin", "clean margin", caption, r.raw.get("margins") or ())


def _weights(r: Results) -> Html | None:
    caption = "Quantiles of the weight that the run's method would give to the image, of the first test images."
    return _quantiles("By weight", "weight", caption, r.raw.get("by_weight") or ())


def _quantiles(title: str, name: str, caption: str, quantiles: Iterable[dict[str, Any]]) -> Html | None:
    rows: list[list[object]] = []
    for row in quantiles:
        values, natural, robust = f"{row['low']:.2f} to {row['high']:.2f}", row["natural"], row["robust"]
        shares = svg.bullet(natural, robust), percent(natural), percent(robust)
        rows.append([values.replace("-", "−"), *shares, f"{row['n']:,}"])
    if not rows:
        return None
    keys = _keys(natural="natural accuracy", robust="robust accuracy")
    return _section(title, keys, table(caption, [name, "-graph", "natural", "robust", "n"], rows))


def _outcomes(ledger: Ledger | None) -> Html | None:
    if not ledger or not ledger.verdicts:
        return None
    names = ("stands", "broken", "wrong")
    groups = {name: [v.margin for v in ledger.verdicts if v.fate == name] for name in names}
    keys = _keys(stands="stands", broken="broken by an attack", wrong="wrong without attack")
    return _section("Margins and outcomes", tag("figure", keys, svg.histogram(groups)))


def _examples(r: Results, ledger: Ledger | None, folder: Path) -> Html | None:
    examples, total = read_examples(folder)
    if not examples:
        return None
    verdicts = {v.index: v for v in ledger.verdicts} if ledger else {}
    scale = magnification(examples)
    figures = [_example(r, example, verdicts.get(example.index), scale) for example in examples]
    which = (
        f"{len(examples)} of {total:,} broken images, evenly spread over the set" if total > len(examples) else "All"
    )
    caption = (
        f"{which}. From left to right: the original, the perturbation {scale} times larger around grey, "
        "the attacked image."
    )
    return _section("Broken images", tag("p", caption, class_="quiet"), tag("div", *figures, class_="examples"))


def _example(r: Results, example: Example, verdict: Verdict | None, scale: int) -> Html:
    distance = format_eps(example.distance(r.norm), r.norm)
    true = predicted = "?"
    attack = "an attack"
    if verdict:
        true, attack = class_title(r, verdict.label), verdict.broken_by
        predicted = "?" if verdict.broken_as is None else class_title(r, verdict.broken_as)
    images = (
        tag("img", src=png(example.original), alt=f"image {example.index}, {true}"),
        tag("img", src=png(example.perturbation(scale), exact=True), alt=f"its perturbation, {scale} times larger"),
        tag("img", src=png(example.broken), alt=f"the attacked image, classified as {predicted}"),
    )
    caption = tag(
        "figcaption", tag("b", f"{true} → {predicted}"), tag("br"), f"image {example.index}, {attack}, {distance}"
    )
    return tag("figure", tag("div", *images, class_="trio"), caption)


def _training(folder: Path) -> Html | None:
    path = folder / "curves.png"
    if not path.exists():
        return None
    alt = "Accuracies, losses and weights by epoch; the numbers are in metrics.csv."
    return _section("Training", tag("img", src=data_uri(read_bytes(path)), alt=alt, class_="picture"))


def _settings(r: Results) -> Html | None:
    settings_of = [(row.name, row.settings) for row in r.rows if row.settings]
    if not settings_of:
        return None
    lists = [tag("div", tag("h3", name), _facts(settings)) for name, settings in settings_of]
    return _section("Settings", tag("details", tag("summary", "Every attack with all parameters"), *lists))


def _provenance(r: Results, folder: Path) -> Html:
    facts = {k: v for k, v in (r.raw.get("spec") or {}).items() if k not in ("eps", "norm")}
    data = {k: v for k, v in r.data.items() if k != "class_names"}
    facts |= {"budget": format_eps(r.eps, r.norm), "weights": r.raw.get("weights")} | r.provenance
    facts |= {"data": data or facts.get("data"), "recipe": None, "text": None}
    recipe = r.provenance.get("recipe")
    recipe_details = tag("details", tag("summary", "The recipe with every default"), _facts(recipe)) if recipe else None
    command = tag("p", tag("code", verify_command(folder, r.raw.get("spec") or {})), class_="command")
    verify = (tag("p", "Classify the stored examples again, without attacking:"), command)
    return _section("Where it comes from", *verify, _facts(facts), recipe_details)


def _facts(facts: dict[str, Any]) -> Html:
    pairs = ((name, _as_text(value)) for name, value in facts.items() if value not in (None, "", {}, []))
    return tag("dl", *(part for name, text in pairs for part in (tag("dt", name), tag("dd", tag("code", text)))))


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_text(part)}" for name, part in value.items() if part not in (None, "", {}, []))
    return ", ".join(map(_as_text, value)) if isinstance(value, list) else str(value)


def _section(title: str, *inside: object) -> Html:
    return tag("section", tag("h2", title), *inside)


def _keys(**names: str) -> Html:
    keys: Iterator[Html] = (tag("span", tag("i", class_=f"key fill {kind}"), name) for kind, name in names.items())
    return tag("div", *keys, class_="keys")
