"""What notebooks show of a value: tables with its numbers; names from a stranger's file are text, never markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import torch

from robustmail import load_recipe
from robustmail.evaluation.evaluator import Evaluation, accuracy_row
from robustmail.evaluation.ledger import BROKE, STOOD, Ledger
from robustmail.evaluation.results import Results
from robustmail.margin_lab.results import (
    Continuity,
    Cost,
    Estimate,
    Findings,
    Hidden,
    LabResults,
    Spread,
    Truth,
)  # fmt: skip
from robustmail.trials.study import Study
from robustmail.trials.summary import rows

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"
TAGS = {"div", "strong", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "br", "details", "summary"}


class Seen(HTMLParser):
    """The tags and attributes of a card, and its text."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(value._repr_html_())  # type: ignore[attr-defined]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"scope", "class"}

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def text_of(value: object, *, has_evil: bool = True) -> str:
    """The text of a card that is tables and sentences alone, EVIL among them as it is."""
    seen = Seen(value)
    assert seen.tags <= TAGS
    assert (EVIL in seen.text) == has_evil
    return re.sub(r"\s+", " ", seen.text)


def ledger() -> Ledger:
    """Twelve images: 0 is wrong, 1 to 4 are broken, the others stand."""
    label = torch.zeros(12, dtype=torch.int64)
    made = Ledger(torch.arange(12), label, torch.eye(12, dtype=torch.int64)[0], torch.full((12,), 0.25))
    tried = torch.arange(1, 12)
    broken = tried < 5
    made.enter(EVIL, tried, broken, broken.long(), torch.full((11,), 0.1), None)
    assert set(made.outcome(EVIL)[1:].tolist()) == {STOOD, BROKE}
    return made


def test_an_evaluation_shows_every_attack_and_the_worst_case():
    shown = text_of(Evaluation((accuracy_row("nat", 11, 12), accuracy_row(EVIL, 7, 12)), ledger()))
    assert "Evaluation of 12 images" in shown
    assert "nat 91.7 % 64.6 % – 98.5 % 11 / 12" in shown
    assert "worst case 58.3 %" in shown


def test_a_ledger_shows_what_each_attack_did_and_the_first_images():
    shown = text_of(ledger())
    assert "Ledger of 12 images: 7 stand, 1 are wrong as they are" in shown
    assert f"{EVIL} 7 4 4 " in shown
    assert "0 0 1 +0.250 natural 1 0 0 +0.250 <script>" in shown
    assert "9 0 0 +0.250 – ... and 2 more" in shown


def test_a_recipe_shows_its_loss_and_folds_defaults_away():
    shown = text_of(load_recipe("quickstart").but(init=EVIL))
    assert "loss = mean( w * 5 KL(nat || adv) + CE(nat) ) w = u / mean(u)" in shown
    chosen, folded = shown.split("fields have their defaults")
    assert "burn_in 10" in chosen
    assert "precision 'auto'" in folded


def test_results_of_a_strangers_folder_are_text():
    raw = {
        "complete": False, "name": EVIL, "n": 2, "spec": {"eps": 0.1, "norm": "linf"},
        "attacks": [{"name": EVIL, "correct": 1, "n": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9, "seconds": 1.0,
                     "settings": {"note": EVIL}}],
        "believable": {"light": "red", "flags": [{"name": EVIL, "measured": EVIL}]},
    }  # fmt: skip
    shown = text_of(Results.of(raw))
    assert "not finished" in shown
    assert "Light: red, do not quote this number" in shown


def test_a_lab_shows_its_margins_and_why_one_was_not_measured():
    sure = Estimate(0.9, 0.8, 0.95)
    truth = Truth(12, sure, sure, Estimate(None))
    found = Findings(
        EVIL, Cost(1, 2), continuity=Continuity(12, 0.0, 0.1, "continuous"), spread={"path": Spread(0.1, 0.05)},
        everywhere=truth, right=truth, behind=Estimate(0.0, 0.0, 0.0), hidden=Hidden(1, 1, 1, sure),
    )  # fmt: skip
    failed = Findings("lps", Cost(0, 0), "NaN for every image")
    findings, spec = (found, replace(found, margin="b"), failed), {"eps": 8 / 255, "norm": "linf"}
    lab = LabResults(EVIL, 12, spec, {}, (), 3, 0, findings, Cost(1, 1), {}, {}, {}, {}, {})
    shown = text_of(lab)
    assert "12 images, eps 8/255 Linf" in shown
    assert f"{EVIL} continuous 5.0 % 0.900 (0.800 – 0.950) – 1 of 3 1 + 2" in shown
    assert "b continuous 5.0 % 0.900 (0.800 – 0.950) = –" in shown
    assert "lps NaN for every image – – – – 0 + 0" in shown


def test_a_grid_shows_means_verdicts_and_failures():
    accuracies = {("a", 0): {"nat": 0.5}, ("a", 1): {"nat": 0.6}, (EVIL, 0): {"nat": 0.1}}
    study = SimpleNamespace(file=Path("trials.json"), seeds=[0, 1])
    study.rows = lambda: rows(["a", EVIL], [0, 1], accuracies, {(EVIL, 1): "boom"})
    study._repr_html_ = lambda: Study._repr_html_(study)
    shown = text_of(study)
    assert "a 2 of 2 55.0 ± 7.1" in shown
    assert f"{EVIL} 1 of 2 10.0" in shown
    assert f"{EVIL}, seed 1: FAILED: boom" in shown
