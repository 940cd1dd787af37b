"""The texts of a grid: seeds, settings, cells; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustmail.cli.trials import _warn_of_one_seed
from robustmail.errors import RecipeError, RobustmailError
from robustmail.trials.grid import Cell, cells, folders, recipes, seeds, variants


@pytest.mark.parametrize(
    ("text", "found"), [("0:5", (0, 1, 2, 3, 4)), ("3:4", (3,)), ("7", (7,)), ("1,2, 9", (1, 2, 9)), ("2,0", (2, 0))]
)
def test_seeds_are_a_slice_or_a_list(text, found):
    assert seeds(text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5:0", "names no seed. Write 0:5."), ("3:3", "names no seed"), ("", "is no list of seeds. Write 0:5"),
        ("a", "is no list"), ("-1", "is no list"), ("0:", "is no list"), ("0:5:2", "is no list"),
        ("1,,2", "is no list"),
        ("1,2,1", "1 is named twice"), ("0:2000000000", "names 2,000,000,000 seeds. Name at most 10,000."),
    ],
)  # fmt: skip
def test_wrong_seeds_are_refused(text, said):
    with pytest.raises(RecipeError, match=f"--seeds {text}: ") as error:
        seeds(text)
    assert said in str(error.value)


def test_a_setting_is_one_override_for_each_value():
    assert variants("weighter=Sigmoid(slope=2, bias=0), Tanh()") == [
        "weighter=Sigmoid(slope=2, bias=0)",
        "weighter=Tanh()",
    ]


@pytest.mark.parametrize("text", ["margin", "margin=", "margin=a,", "=3,"])
def test_a_setting_without_values_is_refused(text):
    with pytest.raises(RecipeError, match="is no path with values"):
        [variants(text), recipes(cells(["quickstart"], [text], [], [0]))]


def test_a_grid_is_the_product_of_recipes_settings_and_seeds():
    grid = cells(["at", "mail_at"], ["batch=64,128", "optimizer.lr=0.1,0.2"], ["epochs=80"], [3, 4])
    assert len(grid) == 2 * 2 * 2 * 2
    assert grid[0] == Cell("at batch=64 optimizer.lr=0.1", "at", ("epochs=80", "batch=64", "optimizer.lr=0.1"), 3)
    made = recipes(grid)[grid[-1]]
    assert (made.batch, made.optimizer.lr, made.epochs, made.seed) == (128, 0.2, 80, 4)


def test_recipes_of_cells_are_the_ones_that_another_process_loads():
    for one, recipe in recipes(cells(["at", "mail_at"], ["batch=64,128"], [], [3])).items():
        assert one.load() == recipe


@pytest.mark.parametrize(
    ("names", "overs", "said"),
    [
        (["at", "at"], [], "is there twice"), (["at"], ["batch=64,64"], "is there twice"),
        (["at", "at:recipe"], [], "are the same recipe"), (["at"], ["eps=8/255,16/510"], "are the same recipe"),
        (["at"], ["seed=1,2"], "sets the seed. Seeds go into --seeds."),
        (["at"], ["bacth=64,128"], "the recipe has no 'bacth'. Did you mean 'batch'?"),
        (["att"], [], "no such file, nor a built-in recipe. Did you mean 'at'?"),
        (["mail_at"], ["margin=pm_adv,pm_naat"], "Did you mean 'pm_nat'?"),
    ],
)  # fmt: skip
def test_cells_that_are_there_twice_or_cannot_be_made_are_refused(names, overs, said):
    with pytest.raises(RobustmailError) as error:
        recipes(cells(names, overs, [], [0, 1]))
    assert said in str(error.value)


def test_folders_are_plain_and_never_shared():
    grid = [Cell(row, "at", (), 2) for row in ("at x=f(1, 2)", "at x=f[1; 2]", "at/../..", "ä")]
    places = list(folders(grid, Path("out")).values())
    assert len(set(places)) == 4
    assert all(place.parent.parent == Path("out/runs") and ".." not in place.parts for place in places)


def test_a_folder_hangs_on_its_row_alone_and_its_name_is_never_too_long():
    rows = ["at x=a/b.py:m", "at x=a-b.py:m", "at y", f"at weighter=Sigmoid(slope=0.{300 * '1'})"]
    there, back = (folders([Cell(row, "at", (), 0) for row in order], Path("out")) for order in (rows, rows[::-1]))
    assert there == back
    assert there[Cell("at y", "at", (), 0)] == Path("out/runs/at-y/0")
    assert max(len(part) for place in there.values() for part in place.parts) < 120


def test_a_setting_that_is_there_twice_is_refused():
    with pytest.raises(RecipeError, match=r"--over epochs: is there twice\. Write epochs=VALUE,VALUE once"):
        cells(["at"], ["epochs=2", "epochs=3"], [], [0])


@pytest.mark.parametrize(
    ("text", "said"),
    [("5", "robustmail: one seed, 5; 5 seeds are 0:5\n"), ("0", ""), ("5:6", ""), ("1,7", ""), ("0:5", "")],
)
def test_one_seed_that_may_have_been_meant_as_a_number_of_them_is_noted(capsys, text, said):
    _warn_of_one_seed(text)
    assert capsys.readouterr().err == said
