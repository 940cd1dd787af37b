"""What RobustBench asks of a new model: its entry in model_info as JSON, and the texts of its two issues.

Source: github.com/RobustBench/robustbench, `ModelInfo` in utils.py, enums.py, model_info/ and .github/ISSUE_TEMPLATE.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmail.errors import RunError
from robustmail.evaluation.class_accuracies import KINDS
from robustmail.evaluation.results import Results
from robustmail.records import AttackResult
from robustmail.report.markdown import code, escaped
from robustmail.report.paper import Paper
from robustmail.text import format_eps, percent

__all__ = ["FIELDS", "Leaderboard", "check_model_info", "entry_name", "external_text", "issue_text", "leaderboard_of",
           "model_info"]  # fmt: skip

IMAGES = 10_000
FIELDS: dict[str, tuple[type, ...]] = {
    "link": (str,), "name": (str,), "authors": (str,), "additional_data": (bool,), "number_forward_passes": (int,),
    "dataset": (str,), "venue": (str,), "architecture": (str,), "eps": (str,), "clean_acc": (str,), "reported": (str,),
    "autoattack_acc": (str,), "footnote": (str,),
}  # fmt: skip
"""of an entry of model_info for l-inf and l2; null where somebody has to fill it in"""
MEASURED = ("number_forward_passes", "dataset", "eps", "clean_acc", "reported", "autoattack_acc")
FINGERPRINTS = {"dc6410222d7817fd": "cifar10"}
"""of the test images and labels in their own order, from whatever file"""
UNFIT = {
    "randomised-output": "its output is random",
    "zero-gradients": "its gradients are zero or not finite",
}
"""red checks of the light that RobustBench excludes"""


@dataclass(frozen=True)
class Leaderboard:
    """A leaderboard: data set and threat model in RobustBench's words, and its eps."""

    dataset: str
    threat_model: str
    eps: float
    eps_text: str


LEADERBOARDS = (
    Leaderboard("cifar10", "Linf", 8 / 255, "8/255"),
    Leaderboard("cifar10", "L2", 0.5, "0.5"),
    Leaderboard("cifar100", "Linf", 8 / 255, "8/255"),
)
COUNTS = "RobustBench counts all 10,000 test images of cifar10 (Linf 8/255, L2 0.5) or cifar100 (Linf 8/255) under aa."


def leaderboard_of(r: Results, folder: Path) -> Leaderboard:
    """The leaderboard on which an evaluation counts. Raises RunError, with all reasons: it counts on none."""
    dataset, threat_model = _dataset(r), {"linf": "Linf", "l2": "L2"}.get(r.norm)
    of_data = [board for board in LEADERBOARDS if board.dataset == dataset]
    board = next((board for board in of_data if board.threat_model == threat_model), None)
    wrong = []
    if not of_data:
        wrong.append(f"the data are {r.data.get('name')}")
    elif board is None:
        wrong.append(f"{dataset} has no leaderboard for {r.norm}")
    elif abs(r.eps - board.eps) > 1e-7:
        wrong.append(f"eps is {format_eps(r.eps, r.norm)}, not {board.eps_text}")
    if r.n != IMAGES or r.shard:
        wrong.append(f"{r.n:,} of {IMAGES:,} images")
    if not r.complete:
        wrong.append("it is not finished")
    if (aa := _row(r, "aa")) is None or _row(r, "nat") is None:
        wrong.append("nat and the standard aa were not both run")
    elif "note" in aa.settings:
        wrong.append(f"aa is not the standard one: {aa.settings['note']}")
    flags = r.light.flags if r.light else ()
    wrong += [UNFIT[flag.name] for flag in flags if flag.light == "red" and flag.name in UNFIT]
    if wrong or board is None:
        raise RunError(str(folder), f"not a leaderboard number: {'; '.join(wrong)}", COUNTS)
    return board


def entry_name(r: Results, paper: Paper) -> str:
    """The model's name in RobustBench, or its own where the paper does not give one."""
    return paper.identifier or re.sub(r"[^\w.-]+", "_", r.name).strip("._-") or "model"


def model_info(r: Results, board: Leaderboard, paper: Paper) -> dict[str, Any]:
    """The entry of model_info; null where the user has to say something. Raises RunError as `check_model_info`."""
    aa = _accuracy(r, "aa")
    info = {
        "link": paper.link, "name": paper.title, "authors": paper.authors, "additional_data": paper.additional_data,
        "number_forward_passes": paper.number_forward_passes, "dataset": board.dataset, "venue": paper.venue,
        "architecture": paper.architecture or _architecture(r), "eps": board.eps_text,
        "clean_acc": _accuracy(r, "nat"), "reported": aa if paper.reported is None else f"{paper.reported:.2f}",
        "autoattack_acc": aa, **({"footnote": paper.footnote} if paper.footnote else {}),
    }  # fmt: skip
    check_model_info(info)
    return info


def check_model_info(info: dict[str, Any]) -> None:
    """Refuse an entry that RobustBench's schema does not allow (raises RunError)."""
    for name, value in info.items():
        if name not in FIELDS:
            raise RunError(f"model_info {name!r}", "is no field of RobustBench's")
        if not (isinstance(value, FIELDS[name]) or (value is None and name not in MEASURED)):
            raise RunError(f"model_info {name}={value!r}", f"is not of type {FIELDS[name][0].__name__}")
        if isinstance(value, bool) and bool not in FIELDS[name]:
            raise RunError(f"model_info {name}={value!r}", "is not a number")
    if missing := [name for name in FIELDS if name not in info and name != "footnote"]:
        raise RunError("model_info", f"lacks {', '.join(missing)}")
    for name in ("clean_acc", "reported", "autoattack_acc"):
        if not re.fullmatch(r"\d{1,3}(\.\d{1,2})?", info[name]) or float(info[name]) > 100:
            raise RunError(f"model_info {name}={info[name]!r}", "is no percentage such as 53.42")
    if (info["dataset"], info["eps"]) not in {(board.dataset, board.eps_text) for board in LEADERBOARDS}:
        raise RunError(f"model_info dataset={info['dataset']!r}, eps={info['eps']!r}", "is no leaderboard")
    if info["number_forward_passes"] < 1:
        raise RunError("model_info number_forward_passes", "is less than 1")


def issue_text(r: Results, board: Leaderboard, paper: Paper, info: dict[str, Any], in_curve: bool = False) -> str:
    """The text of the issue "New Model(s)"; its first line has the title. in_curve: see `_method`."""
    rows = [
        ("Architecture", info["architecture"]), ("Threat Model", board.threat_model), ("eps", board.eps_text),
        ("Clean accuracy", info["clean_acc"]), ("Robust accuracy", info["autoattack_acc"]),
        ("Additional data", None if info["additional_data"] is None else json.dumps(info["additional_data"])),
    ]  # fmt: skip
    claims = [*map(_line, *zip(*rows, strict=True)), f"- **Evaluation method**: {_method(r, in_curve)}"]
    return "\n".join([
        f"<!-- Title: [New Model] {entry_name(r, paper)} -->", "",
        "# Paper Information", "",
        _line("Paper Title", paper.title), _line("Paper URL", paper.link), _line("Paper authors", paper.authors), "",
        "# Leaderboard Claim(s)", "", "## Model 1", "", *claims, _line("Checkpoint and code", paper.checkpoint), "",
        "# Model Zoo:", "",
        "- [ ] The model shall be in the Model Zoo.",
        "- [ ] Its architecture is in RobustBench's `architectures` or in `timm`; else its code is linked above.",
        f"- [ ] It is released under the MIT license, or under: {_given(paper.license)}",
    ]) + "\n"  # fmt: skip


def external_text(
    r: Results, board: Leaderboard, paper: Paper, tensor: str, sha256: str, in_curve: bool = False
) -> str:
    """The text of the issue "New external evaluation(s)"; tensor: name of the file of adversarial images. in_curve: see
    `_method`."""
    worst = r.worst
    assert worst is not None
    return "\n".join([
        f"<!-- Title: [New evaluation] {entry_name(r, paper)} -->", "",
        "## Target model", "",
        f"- **Model identifier(s)**: {code(entry_name(r, paper))}",
        f"- **Leaderboard(s)**: {board.dataset}, {board.threat_model}, eps {board.eps_text}", "",
        "## New evaluation", "",
        f"- **Link to adversarial images**: {_given(None)} (upload {code(tensor)}: [{r.n}, 3, 32, 32], float32, in the "
        f"order of the test set, clean images where nothing was found; sha256 {code(sha256)})",
        f"- **Robust accuracy**: {100 * worst.accuracy:.2f}",
        _line("Author(s)", paper.authors),
        f"- **Description of the method used**: {_method(r, in_curve)}",
    ]) + "\n"  # fmt: skip


def _line(name: str, value: str | None) -> str:
    return f"- **{name}**: {_given(value)}"


def _given(value: str | None) -> str:
    return "FILL IN" if not value else escaped(value)


def _method(r: Results, in_curve: bool) -> str:
    """What was run. in_curve: the evaluation is one of several eps, and took over what a smaller one had broken."""
    aa, attacks = _row(r, "aa"), [row.name for row in r.attacks if row.name != "nat"]
    assert aa is not None
    parts = [
        f"standard AutoAttack by robustmail {r.provenance.get('versions', {}).get('robustmail', '')}".strip()
        + f" on all {r.n:,} test images: {percent(aa.accuracy)}, 95 % interval {percent(aa.low)} to {percent(aa.high)}"
    ]
    if r.worst and len(attacks) > 1:
        parts.append(f"{100 * r.worst.accuracy:.2f} % stand under all of {', '.join(attacks)}")
    if in_curve:
        parts.append("images that the same attacks broke at a smaller eps were not attacked again and count as broken")
    if r.light:
        flags = ", ".join(flag.name for flag in r.light.flags)
        parts.append(f"sanity checks: {r.light.colour}" + (f" because of {flags}" if flags else ""))
    if worst := r.worst_classes.get(KINDS[1]):
        parts.append(f"worst class {percent(worst.worst.accuracy)} of {worst.worst.n:,} images")
    return escaped("; ".join(parts))


def _dataset(r: Results) -> str | None:
    if (known := FINGERPRINTS.get(str(r.data.get("fingerprint")))) is not None:
        return known
    given = re.fullmatch(r"(cifar100?)(\(.*\))?", str((r.raw.get("spec") or {}).get("data_given")))
    return given[1] if given else None


def _architecture(r: Results) -> str | None:
    """The network in RobustBench's words, as WideResNet-28-10; another name as it is. None for what is no name, as the
    leaderboard's page does not escape it."""
    name = str((r.raw.get("spec") or {}).get("model"))
    for pattern, words in ((r"cifar_wrn(\d+)_(\d+).*", r"WideResNet-\1-\2"),
                           (r"cifar_preact_resnet(\d+).*", r"PreActResNet-\1"),
                           (r"cifar_resnet(\d+).*", r"ResNet-\1")):  # fmt: skip
        if re.fullmatch(pattern, name):
            return re.sub(pattern, words, name)
    return name if re.fullmatch(r"[\w. +-]{1,60}", name) else None


def _row(r: Results, name: str) -> AttackResult | None:
    return next((row for row in r.attacks if row.name == name), None)


def _accuracy(r: Results, name: str) -> str:
    row = _row(r, name)
    assert row is not None
    return f"{100 * row.accuracy:.2f}"
