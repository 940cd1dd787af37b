"""A model card as the Hugging Face hub reads it: metadata in YAML, and a text with numbers, light, recipe, command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustmail.evaluation.results import LIGHTS, Results
from robustmail.records import AttackResult
from robustmail.report.classes import class_notes, class_rows
from robustmail.report.markdown import block, code, escaped, table
from robustmail.report.paper import Paper
from robustmail.runtime.untrusted import printable, quoted, verify_command
from robustmail.text import format_eps, percent

__all__ = ["model_card"]


def model_card(r: Results, folder: Path, paper: Paper, repository: str = "", weights: str = "") -> str:
    """The text of README.md in a repository of the hub.

    folder: of the results. paper: what the user says of the model. repository: OWNER/NAME, if the card is for one.
    weights: name of the file of weights in it.
    """
    title = paper.identifier or r.name
    parts = [_metadata(r, paper, title), f"# {escaped(title)}", "", escaped(f"{r.claim}."), ""]
    parts += [f"- {escaped(caveat)}" for caveat in r.caveats]
    parts += ["", *_about(r, paper), "", "## Accuracy", "", _numbers(r), ""]
    parts += [f"Interval: 95 %, Wilson. {' '.join(f'{escaped(note)}.' for note in class_notes(r))}", ""]
    parts += [*_light(r), *_training(r), *_commands(r, folder, repository, weights)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _metadata(r: Results, paper: Paper, title: str) -> str:
    """The front matter, written by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    data = printable(str(r.data.get("name") or "unknown"))
    identifier = re.sub(r"[^\w.-]+", "-", data.lower()).strip("-.") or "unknown"
    measured = [
        EvalResult(
            task_type="image-classification", dataset_type=identifier, dataset_name=data, dataset_split="test",
            metric_type="accuracy", metric_name=_metric(r, row), metric_value=round(row.accuracy, 6),
            metric_args=_arguments(r, row),
        )
        for row in r.rows
    ]  # fmt: skip
    card = ModelCardData(
        license=paper.license, tags=["adversarial-robustness", "robustmail"], pipeline_tag="image-classification",
        model_name=printable(title), eval_results=measured or None,
    )  # fmt: skip
    return f"---\n{card.to_yaml()}\n---\n"


def _metric(r: Results, row: AttackResult) -> str:
    if row.name == "nat":
        return "accuracy"
    return printable(f"robust accuracy ({row.name}, eps {format_eps(r.eps, r.norm)})")


def _arguments(r: Results, row: AttackResult) -> dict[str, Any]:
    known = {"correct": row.correct, "n": row.n, "low": round(row.low, 6), "high": round(row.high, 6)}
    return known if row.name == "nat" else known | {"eps": r.eps, "norm": printable(r.norm)}


def _about(r: Results, paper: Paper) -> Iterator[str]:
    model, facts = (r.raw.get("spec") or {}).get("model"), [r.setting]
    yield f"- Network: {code(str(model))}" if model else ""
    yield f"- Data: {code(str(r.data.get('name')))}, {escaped(', '.join(facts))}"
    if paper.title:
        yield f"- Paper: {escaped(paper.title)}" + (f", {escaped(paper.authors)}" if paper.authors else "")
    if paper.link:
        yield f"- Link: {code(paper.link)}"


def _numbers(r: Results) -> str:
    rows = [
        [code(row.name), percent(row.accuracy), f"{percent(row.low)} – {percent(row.high)}", f"{row.correct} / {row.n}"]
        for row in r.rows
    ]
    rows += [[code(name), *map(escaped, cells)] for name, *cells in class_rows(r)]
    return table(["attack", "accuracy", "95 % interval", "correct / n"], rows)


def _light(r: Results) -> list[str]:
    if (light := r.light) is None:
        return ["## Can the number be believed?", "", "No sanity check was made.", ""]
    lines = ["## Can the number be believed?", "", f"Light: **{light.colour}**, {LIGHTS[light.colour]}.", ""]
    for flag in light.flags:
        text = "; ".join(filter(None, (flag.measured, flag.meaning))).rstrip(".")
        lines.append(f"- {code(flag.name)} ({escaped(flag.light)}): {escaped(text)}.")
    return [*lines, ""]


def _training(r: Results) -> list[str]:
    text = r.provenance.get("text")
    return ["## Recipe", "", block(str(text), "python"), ""] if text else []


def _commands(r: Results, folder: Path, repository: str, weights: str) -> list[str]:
    spec = r.raw.get("spec") or {}
    lines = ["## Commands", ""]
    if command := r.provenance.get("command"):
        lines += ["These numbers were made by", "", block(str(command), "sh"), ""]
    check = verify_command(folder, spec)
    if repository and weights:
        check = quoted("robustmail", "verify", "evaluation", "--checkpoint", f"hf://{repository}/{weights}")
        again = quoted("robustmail", "eval", f"hf://{repository}/{weights}")
        lines += ["To evaluate the weights:", "", block(again, "sh"), ""]
        lines += ["To judge the stored examples in `evaluation` again, after `hf download`:"]
    else:
        lines += ["To judge the stored examples again:"]
    return [*lines, "", block(check, "sh"), ""]
