"""A model card, read back by huggingface_hub."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from huggingface_hub import ModelCard

from robustmail.errors import RunError
from robustmail.evaluation.results import read_results
from robustmail.report.model_card import model_card
from robustmail.report.paper import Paper, read_paper
from tests.report.test_markdown import tokens

EVIL = "x: [a]\n---\n# head <script>alert(1)</script> | `b` @all 'q' \"r\" #c"


def card(folder, paper: Paper | None = None, **names) -> ModelCard:
    return ModelCard(model_card(read_results(folder), folder, paper or Paper(), **names))


def test_every_row_is_a_result_with_its_interval_and_budget(evaluation):
    folder = evaluation()
    results = json.loads((folder / "results.json").read_text())
    found = card(folder).data.eval_results
    rows = [*results["attacks"], results["worst_case"], results["eight_bit"]]
    assert [result.metric_value for result in found] == [pytest.approx(row["accuracy"], abs=1e-6) for row in rows]
    nat, pgd = found[0], found[1]
    assert (nat.metric_name, pgd.metric_name) == ("accuracy", "robust accuracy (pgd100, eps 8/255 Linf)")
    assert pgd.metric_args["n"] == 40
    assert pgd.metric_args["low"] == pytest.approx(rows[1]["low"], abs=1e-6)
    assert (pgd.metric_args["eps"], pgd.metric_args["norm"]) == (results["spec"]["eps"], "linf")
    assert {result.dataset_name for result in found} == {"digits"}


def test_the_text_has_numbers_light_recipe_and_commands(evaluation, run):
    text = card(evaluation(), repository="me/net", weights="best.safetensors").text
    for part in ("50.0 % of 40 images stand", "Light: **yellow**", "`zero-gradients`", "8/255 Linf",
                 "robust worst class", "is biased low", "robustmail eval hf://me/net/best.safetensors",
                 "robustmail verify evaluation --checkpoint hf://me/net/best.safetensors"):  # fmt: skip
        assert part in text.replace("\\", ""), part
    assert "```python\nR()\n```" in card(run()).text


def test_hostile_names_arrive_as_text_in_metadata_and_body(evaluation):
    there = json.loads((evaluation() / "results.json").read_text())
    flag = {"name": EVIL, "light": "red", "measured": EVIL, "meaning": EVIL}
    folder = evaluation(
        name=EVIL, data=there["data"] | {"name": EVIL, "class_names": [EVIL] * 3},
        spec=there["spec"] | {"model": EVIL}, believable=there["believable"] | {"flags": [flag]},
        provenance=there["provenance"] | {"text": EVIL + "\n```\n# out", "command": EVIL},
        attacks=[there["attacks"][0], there["attacks"][1] | {"name": EVIL}],
    )  # fmt: skip
    found = card(folder)
    assert found.data.model_name == EVIL.replace("\n", " ")
    assert found.data.eval_results[0].dataset_name == EVIL.replace("\n", " ")
    kinds = {token.type for token in tokens(found.text)}
    assert not kinds & {"link_open", "image", "html_block", "em_open", "hr"}
    parsed = tokens(found.text)
    heads = [after.content for token, after in pairwise(parsed) if token.type == "heading_open" and token.tag != "h1"]
    assert heads == ["Accuracy", "Can the number be believed?", "Recipe", "Commands"]
    assert [token.tag for token in parsed if token.type == "heading_open"].count("h1") == 1
    assert {t.content for t in tokens(found.text) if t.type == "html_inline"} <= {"<!-- -->"}


def test_what_the_user_says_of_the_paper_is_in_the_card(evaluation, tmp_path):
    (tmp_path / "paper.toml").write_text('title = "My net"\nauthors = "A. Me"\nvenue = "X 2026"\nlicense = "mit"\n')
    found = card(evaluation(), read_paper(tmp_path / "paper.toml"))
    assert (found.data.license, found.data.model_name) == ("mit", "Me2026My")
    assert "Paper: My net, A. Me" in found.text.replace("\\", "")


@pytest.mark.parametrize(("text", "message"), [
    ("titel = 'x'", "Did you mean 'title'"), ("title = 3", "title is 3, not of type str"), ("x", "cannot be read"),
    ("additional_data = 'no'", "not of type bool"), ("number_forward_passes = true", "not of type int"),
    ("name = '../x'", "Write it as Rice2020Overfitting"),
])  # fmt: skip
def test_a_wrong_paper_file_is_one_line(tmp_path, text, message):
    (tmp_path / "paper.toml").write_text(text)
    with pytest.raises(RunError, match=message):
        read_paper(tmp_path / "paper.toml")
