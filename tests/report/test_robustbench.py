"""What RobustBench asks of a new model, against its own schema and names."""

from __future__ import annotations

import json

import pytest

from robustmail.errors import RunError
from robustmail.evaluation.results import read_results
from robustmail.report import robustbench
from robustmail.report.paper import Paper
from robustmail.report.robustbench import check_model_info, external_text, issue_text, leaderboard_of, model_info
from tests.report.conftest import EPS, row
from tests.report.test_markdown import tokens

N = 10_000
PAPER = Paper(title="Overfitting in deep learning", authors="Leslie Rice, Eric Wong", venue="ICML 2020",
              link="https://arxiv.org/abs/2002.11569", additional_data=False, license="MIT",
              checkpoint="https://x.example/w")  # fmt: skip
SCHEMA = {
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "footnote",
}  # fmt: skip
"""ModelInfo in robustbench/utils.py of RobustBench, of which the rest is for corruptions"""


@pytest.fixture
def entry(evaluation):
    """The results of a network of CIFAR-10 as RobustBench counts them; `changes` as in `evaluation`."""

    def made(
        eps: float = EPS,
        norm: str = "linf",
        data: str = "cifar10()",
        n: int = N,
        aa: str = "aa",
        model: str = "cifar_wrn34_10",
        **changes,
    ):
        spec = {"checkpoint": "w", "model": model, "data": "cifar10", "data_given": data, "attacks": [],
                "eps": eps, "norm": norm, "n": n, "seed": 0}  # fmt: skip
        attacks = [row("nat", 8534, N), row("pgd100", 5600, N), row(aa, 5342, N)]
        folder = evaluation(spec=spec, n=40, attacks=attacks, worst_case=row("worst case", 5340, N), **changes)
        content = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(content | {"n": n}))
        return read_results(folder), folder

    return made


def test_an_entry_of_model_info_has_the_fields_and_forms_of_the_schema(entry):
    board = leaderboard_of(*entry())
    info = model_info(entry()[0], board, PAPER)
    assert set(info) == SCHEMA - {"footnote"}
    assert info == {
        "link": PAPER.link, "name": PAPER.title, "authors": PAPER.authors, "additional_data": False,
        "number_forward_passes": 1, "dataset": "cifar10", "venue": "ICML 2020", "architecture": "WideResNet-34-10",
        "eps": "8/255", "clean_acc": "85.34", "reported": "53.42", "autoattack_acc": "53.42",
    }  # fmt: skip
    assert (board.threat_model, robustbench.entry_name(entry()[0], PAPER)) == ("Linf", "Rice2020Overfitting")


def test_in_l2_and_on_cifar100_the_names_are_robustbenchs(entry):
    l2 = leaderboard_of(*entry(eps=0.5, norm="l2"))
    assert (l2.dataset, l2.threat_model, l2.eps_text) == ("cifar10", "L2", "0.5")
    assert leaderboard_of(*entry(data="cifar100(root='data')")).dataset == "cifar100"


def test_what_nobody_said_is_null_and_never_made_up(entry):
    info = model_info(entry()[0], leaderboard_of(*entry()), Paper())
    assert [name for name, value in info.items() if value is None] == [
        "link", "name", "authors", "additional_data", "venue",
    ]  # fmt: skip
    assert "**Paper Title**: FILL IN" in issue_text(entry()[0], leaderboard_of(*entry()), Paper(), info)


RED = {"name": "randomised-output", "light": "red", "measured": "", "meaning": ""}
REFUSED = {
    "eps": ({"eps": 0.031}, "eps is 0.031 Linf, not 8/255"),
    "norm": ({"eps": 0.5, "norm": "l2", "data": "cifar100()"}, "cifar100 has no leaderboard for l2"),
    "data": ({"data": "npz('cifar10.npz')"}, "the data are digits"),
    "a subset": ({"data": "subset(of=cifar10(), train=9)"}, "the data are digits"),
    "images": ({"n": 1000}, "1,000 of 10,000 images"),
    "shard": ({"shard": [1, 2]}, "10,000 of 10,000 images"),
    "unfinished": ({"complete": False}, "it is not finished"),
    "attack": ({"aa": "apgd"}, "the standard aa were not both run"),
    "random": ({"believable": {"light": "red", "flags": [RED]}}, "its output is random"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_robustbench_does_not_count_is_refused_with_the_reason(entry, changes, reason):
    with pytest.raises(RunError, match="not a leaderboard number") as error:
        leaderboard_of(*entry(**changes))
    assert reason in str(error.value)


def test_a_replaced_part_of_aa_is_not_the_standard_one(entry):
    results, folder = entry()
    results.attacks[2].settings["note"] = "two classes have no targets"
    with pytest.raises(RunError, match="aa is not the standard one: two classes"):
        leaderboard_of(results, folder)


@pytest.mark.parametrize(("change", "message"), [
    ({"external": "3"}, "no field of RobustBench's"), ({"eps": 0.03}, "not of type str"),
    ({"eps": "4/255"}, "is no leaderboard"), ({"clean_acc": "101.00"}, "is no percentage"),
    ({"clean_acc": None}, "not of type str"), ({"number_forward_passes": True}, "is not a number"),
    ({"additional_data": "no"}, "not of type bool"), ({"dataset": "CIFAR-10"}, "is no leaderboard"),
])  # fmt: skip
def test_an_entry_outside_of_the_schema_is_refused(entry, change, message):
    info = model_info(entry()[0], leaderboard_of(*entry()), PAPER)
    with pytest.raises(RunError, match=message):
        check_model_info(info | change)
    with pytest.raises(RunError, match="lacks link"):
        check_model_info({name: value for name, value in info.items() if name != "link"})


def test_the_issues_have_the_headings_of_their_templates(entry):
    results, folder = entry()
    board = leaderboard_of(results, folder)
    text = issue_text(results, board, PAPER, model_info(results, board, PAPER)).replace("\\", "")
    headings = ("# Paper Information", "# Leaderboard Claim(s)", "## Model 1", "# Model Zoo:")
    fields = ("Paper Title", "Paper URL", "Paper authors", "Architecture", "Threat Model", "eps", "Clean accuracy",
              "Robust accuracy", "Additional data", "Evaluation method", "Checkpoint and code")  # fmt: skip
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")] == list(headings)
    assert [line[4:].partition("**")[0] for line in lines if line.startswith("- **")] == list(fields)
    assert "[New Model] Rice2020Overfitting" in lines[0]
    assert "- **Additional data**: false" in text
    assert "53.40 % stand under all of pgd100, aa" in text
    curved = issue_text(results, board, PAPER, model_info(results, board, PAPER), in_curve=True)
    assert ("at a smaller eps" in text, "at a smaller eps" in curved) == (False, True)
    external = external_text(results, board, PAPER, "x.pt", "00ff")
    assert "- **Robust accuracy**: 53.40" in external


def test_hostile_words_are_text_in_an_issue(entry):
    evil = Paper(title="<script>x</script> [a](http://x)", authors="@all, **b**", venue="\x1b[31m # x")
    results, folder = entry(name="<img src=x>", model="<script>")
    assert model_info(results, leaderboard_of(results, folder), PAPER)["architecture"] is None
    board = leaderboard_of(results, folder)
    info = model_info(results, board, evil)
    for text in issue_text(results, board, evil, info), external_text(results, board, evil, "`x`", "0"):
        assert not {token.type for token in tokens(text)} & {"link_open", "image", "strong"}
        html = {token.content.strip() for token in tokens(text) if token.type in ("html_inline", "html_block")}
        assert {part for part in html if not part.startswith("<!--")} == set()
        assert "\x1b" not in text
        assert "@all" not in text
