"""An evaluation's table in a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from robustmail.errors import RunError
from robustmail.report.tables import evaluation_table

WIDTHS = pytest.mark.parametrize("width", [80, 140])


def shown(folder: Path, width: int = 140, **console) -> str:
    to = Console(file=io.StringIO(), width=width, **console)
    to.print(evaluation_table(json.loads((folder / "results.json").read_text()), folder))
    return to.file.getvalue()


def words(text: str) -> str:
    return " ".join(re.sub(r"[│┃]", " ", text).split())


@WIDTHS
def test_no_line_is_wider_than_the_terminal(evaluation, width):
    lines = shown(evaluation(), width).splitlines()
    assert max(map(cell_len, lines)) <= width


@WIDTHS
def test_the_worst_case_stands_below_a_rule_and_the_sentence_to_quote_below_the_table(evaluation, width):
    text = shown(evaluation(), width)
    starts = [line.split()[:1] for line in text.splitlines()]
    last_attack, worst = starts.index(["aa"]), starts.index(["worst"])
    assert starts[last_attack + 1 : worst] == [[]]
    assert "50.0 % of 40 images stand under pgd100 and aa at eps 8/255 Linf." in words(text)


def test_sixty_columns_are_enough_for_every_name_and_number(evaluation):
    text = shown(evaluation(), 60)
    assert max(map(len, text.splitlines())) <= 60
    starts = [line.split()[:1] for line in text.splitlines()]
    assert all([name] in starts for name in ("nat", "pgd100", "aa", "worst"))
    assert "…" not in text


@WIDTHS
def test_a_flag_says_what_was_measured_and_where_it_is_explained_also_without_colours(evaluation, width):
    text = words(shown(evaluation(), width))
    assert "light: yellow, read the flags before you quote this number; 1.5 points from the best PGD" in text
    assert "! zero-gradients (yellow): 6 % of the gradients are zero; so -> docs/believing.md#zero-gradients" in text


def test_colours_add_nothing_but_colour(evaluation):
    folder = evaluation()
    coloured = shown(folder, force_terminal=True, color_system="256")
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == shown(folder)


def test_what_was_replaced_is_said_under_the_table(evaluation):
    attacks = json.loads((evaluation() / "results.json").read_text())["attacks"]
    attacks[-1]["settings"]["note"] = "two classes have no targets"
    assert "aa: two classes have no targets" in words(shown(evaluation(attacks=attacks)))


def test_without_aa_the_number_is_an_upper_bound_and_nothing_is_called_autoattack(evaluation):
    attacks = json.loads((evaluation() / "results.json").read_text())["attacks"][:2]
    text = words(shown(evaluation(attacks=attacks)))
    assert "An upper bound: aa was not among the attacks." in text
    assert "autoattack" not in text.lower()


def test_a_name_is_neither_markup_nor_a_message_to_the_terminal(evaluation):
    text = shown(evaluation(name="[bold]x[/] \x1b[31m"), force_terminal=True, color_system=None)
    assert "[bold]x[/] �[31m" in text
    assert "\x1b" not in text


def test_an_unfinished_shard_says_so(evaluation):
    text = words(shown(evaluation(complete=False, shard=[1, 4], worst_case=None, eight_bit=None, believable=None)))
    assert "The evaluation is not finished" in text
    assert "shard 1 of 4" in text


def test_a_training_run_is_a_table_too(run):
    text = words(shown(run()))
    assert "quick/3: 359 images, eps 0.1 L2, seed 3" in text
    assert "55.7 % of 359 images stand under pgd20 at eps 0.1 L2." in text


def test_what_is_no_results_json_is_refused():
    with pytest.raises(RunError, match=r"results\.json: is damaged"):
        evaluation_table({"attacks": 3})
