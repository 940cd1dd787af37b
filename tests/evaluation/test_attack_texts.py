"""Attacks as text: lists with commas inside of brackets, names with restarts and knobs; nothing is run from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from robustmail import PGD, evaluate
from robustmail.errors import RecipeError, RobustmailError
from robustmail.evaluation.attack_specs import attack_spec, parse_attacks, passes_per_image
from robustmail.evaluation.attack_texts import parse_name, split_attacks
from robustmail.fields import describe

EPS = 8 / 255


def specs(text: str):
    return parse_attacks(split_attacks(text), EPS, 10, "linf")


def test_commas_inside_of_brackets_and_quotes_belong_to_the_attack(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text("from robustmail import PGD\nattack = PGD(loss='margin')\n")
    found = specs(f'nat,torchattack("Square", eps=8/255, n_queries=20000), pgd50x10 ,{mine}:attack')
    assert [spec.name for spec in found] == ["nat", "Square", "pgd50x10", "PGD"]
    assert found[1].stages["Square"].n_queries == 20000
    assert found[3].stages["PGD"] == PGD(loss="margin")


@pytest.mark.parametrize(
    ("text", "name", "stage", "fields"),
    [
        ("pgd20(eot=20)", "pgd20(eot=20)", "pgd20(eot=20)", {"eot": 20, "steps": 20, "eps": EPS}),
        ('pgd20( loss="pm",eot=2 )', "pgd20(eot=2, loss='pm')", "pgd20(eot=2;loss='pm')", {"loss": "pm", "eot": 2}),
        ("apgd(eot=20)", "apgd(eot=20)", "apgd(eot=20)", {"eot_iter": 20, "steps": 100}),
        ("square(n_queries=20000)", "square(n_queries=20000)", "square(n_queries=20000)", {"n_queries": 20000}),
        ("pgd10(alpha=1/255)", "pgd10(alpha=1/255)", "pgd10(alpha=1/255)", {"alpha": 1 / 255}),
        ("cw(targets=9)", "cw(targets=9)", "cw(targets=9)", {"loss": "margin", "targets": 9}),
        ("pma", "pma", "pma", {"loss": "pm", "steps": 100, "decay": "cosine"}),
        ("md(steps=10)", "md(steps=10)", "md(steps=10)", {"steps": 10}),
    ],
)
def test_a_name_takes_the_knobs_of_its_attack(text, name, stage, fields):
    (spec,) = specs(text)
    assert (spec.name, list(spec.stages)) == (name, [stage])
    assert {field: getattr(spec.stages[stage], field) for field in fields} == fields
    assert attack_spec(spec.name, EPS, 10).settings == spec.settings, "the name alone says all of it"


def test_restarts_are_stages_and_the_first_is_the_attack_without_them():
    (spec,) = specs("pgd50x3")
    assert list(spec.stages) == ["pgd50", "pgd50-start2", "pgd50-start3"]
    assert spec.stages == dict.fromkeys(spec.stages, attack_spec("pgd50", EPS, 10).stages["pgd50"])
    assert spec.settings == {"pgd50": describe(spec.stages["pgd50"]), "restarts": "3, the worst counts"}
    assert passes_per_image("pgd50x3") == 3 * passes_per_image("pgd50")
    assert [spec.name for spec in specs("pmax2(steps=20),cwx4,apgd-tx2")] == ["pmax2(steps=20)", "cwx4", "apgd-tx2"]


def test_restarts_are_never_worse_than_one_start_on_any_image(fitted_model):
    model, part = fitted_model
    found = evaluate(model, part, "nat,pgd1x4,pgd1", eps=24 / 255)
    one, four = found.ledger.standing(["pgd1"]), found.ledger.standing(list(found.ledger.stages))
    assert not (four & ~one).any()
    assert found["pgd1x4"].correct == int(four.sum()) < int(one.sum()) == found["pgd1"].correct
    alone = evaluate(model, part, "pgd1", eps=24 / 255)
    assert torch.equal(alone.ledger.outcome("pgd1"), found.ledger.outcome("pgd1")), "the first start is the same"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "attacks: no name given"),
        ("nat,nat", "nat is named twice"),
        ("pgd20(eot=20", "a bracket is not closed"),
        ("a)b,c", "a bracket is not closed"),
        ("pgd20(loss='pm)", "a quote is not closed"),
        ("pgd20(epss=1)", "pgd20 has no knob 'epss'"),
        ("pgd20(eps=0.1)", "eps is not a knob here. Pass --eps"),
        ("pgd20(steps=5)", "steps is not a knob here. Write pgd5"),
        ("pgd20(eot=0)", "eot must be at least 1"),
        ("pgd20(eot='x')", "eot must be a whole number"),
        ("pgd20(5)", "a knob is NAME=VALUE"),
        ("pgd20(**x)", "a knob is NAME=VALUE"),
        ("aa(eot=20)", "aa has no knobs"),
        ("nat(eot=20)", "nat has no knobs"),
        ("aax2", "has no restarts of its own"),
        ("pgd20x0", "takes 1 to 1000 starts"),
        ("pgd20x100000", "takes 1 to 1000 starts"),
        ("PDG(steps=3)", "no attack 'PDG'. Did you mean 'PGD'"),
        ("npz('images.npz')", "no attack 'npz'"),
        ("AT()", "no attack 'AT'"),
    ],
)  # fmt: skip
def test_what_is_no_attack_is_refused_in_one_line(text, wrong):
    with pytest.raises(RobustmailError, match=wrong.replace("(", r"\(").replace("*", r"\*")) as error:
        specs(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["pgd20(loss=open('x'))", "pgd20(loss=PGD)", "pgd20(eot=__import__('os').getpid())", "pgd20(alpha=[1])"]
)
def test_a_name_from_a_strangers_file_holds_literals_only(text):
    with pytest.raises(RecipeError, match="must be a number or a text in quotes"):
        parse_name(text)


@pytest.mark.parametrize("text", ["PGD(eps=__import__('os'))", "__import__('os').system('touch x')", "(lambda: 1)()"])
def test_no_code_is_run_from_an_attack(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RobustmailError):
        specs(text)
    assert not any(tmp_path.iterdir())


def test_cr_is_refused_in_l2():
    with pytest.raises(RecipeError, match=r"attack 'cr' \(given norm=l2\): is defined in linf only"):
        attack_spec("cr", 0.5, 10, "l2")


@pytest.mark.long
def test_the_verdicts_of_md_cr_and_pma_depend_on_no_other_image(fitted_model):
    model, part = fitted_model
    attacks = ("md(steps=4)", "cr(steps=30, restarts=2)", "pma(alpha=0.1, steps=4)", "pgd3(targets=3)")
    whole, one_by_one = (evaluate(model, part, attacks, eps=20 / 255, batch=batch).ledger for batch in (16, 1))
    assert whole.broken_by == one_by_one.broken_by
    assert whole.examples.keys() == one_by_one.examples.keys()
    assert all(torch.equal(whole.examples[i], one_by_one.examples[i]) for i in whole.examples)
    assert 0 < len(whole.examples) < 16


class Linear(nn.Module):
    """Two classes; the gap of the logits is w . x + b."""

    def __init__(self, w: torch.Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x):
        score = (x.flatten(1) * self.w).sum(1) + self.b
        return torch.stack([score, -score], 1)


def test_an_example_of_another_model_is_judged_by_the_evaluated_one_in_a_row_of_its_own():
    w, v = torch.randn(2, 48)
    x = 0.3 + 0.4 * torch.rand(40, 3, 4, 4)
    model, other = Linear(w, -float((x.flatten(1) @ w).min()) + 0.01), Linear(v, 0.0)
    found = evaluate(model, (x, torch.zeros(40).long()), "nat,pgd10", eps=0.05, transfer=other)
    clean = x.flatten(1) @ w + model.b
    assert [row.name for row in found] == ["nat", "pgd10", "pgd10 from Linear"]
    assert found["pgd10"].correct == int((clean - 0.05 * w.abs().sum() > 0).sum())
    assert found["pgd10 from Linear"].correct == int((clean - 0.05 * (w * v.sign()).sum() > 0).sum())
    assert found["pgd10 from Linear"].settings["note"].startswith("its examples were made on Linear")
    assert list(found.ledger.stages) == ["pgd10", "pgd10 from Linear"]
