"""The recipe of a run from its recipe.json: the same recipe, and nothing in the file is run or opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustmail import Recipe, load_recipe
from robustmail.config.recorded import recorded_recipe, resolve_recipe
from robustmail.errors import RecipeError
from robustmail.fields import flatten

MINE = """
from pathlib import Path
from robustmail import load_recipe

Path("executed").touch()


def doubt(step):
    return step.probs_adv.amax(1)


recipe = load_recipe("quickstart").but(margin=doubt)
"""


def written(folder: Path, recipe: Recipe, **changes: str) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps({**flatten(recipe), **changes}))
    return path


@pytest.mark.parametrize(
    "name", ["quickstart", "mail_trades", "mail_at:code", "self_adaptive", "at", "mail_mart", "gairat_awp", "vir_at"]
)
def test_a_recorded_recipe_is_the_recipe(tmp_path: Path, name: str):
    recipe = load_recipe(name)
    assert recorded_recipe(written(tmp_path, recipe)) == recipe


def test_overrides_change_a_recorded_recipe(tmp_path: Path):
    path = written(tmp_path, load_recipe("quickstart"))
    recipe = resolve_recipe(str(path), ["seed=3", "weighter.slope=7", "margin=pm_nat"])
    assert recipe == resolve_recipe("quickstart", ["seed=3", "weighter.slope=7", "margin=pm_nat"])


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"margin": "doubt (source 0123abcd)"}, "needs code: doubt"),
        ({"margin": "mine.py:doubt"}, "(margin)"),
        ({"margin": "doubt"}, "doubt is not robustmail's own"),
        ({"margin": "__import__('os')"}, "is not robustmail's own"),
        ({"model": "'mine.py:net'"}, "could be a path"),
        ({"model": "'hf-hub:somebody/net'"}, "could be a path"),
        ({"data": "npz", "data.train": "'/etc/passwd'"}, "which a file may not say"),
        ({"init": "'weights.pt'"}, "may not say what to open"),
        ({"teacher": "'/etc/passwd'"}, "could be a path"),
        ({"evaluate": "('nat', 'mine.py:attack')"}, "could be a path"),
        ({"evaluate": "('nat', 'attack(eps=0.1)(mine)')"}, "(evaluate)"),
        ({"epochs": "(lambda: 3)()"}, "(epochs)"),
        ({"epochs": "9" * 5000}, "(epochs)"),
        ({"no_field": "3"}, "a recipe has no 'no_field'"),
        ({"weighter.slope": "4/2"}, "another version wrote it"),
    ],
)
def test_a_file_names_no_code_and_no_file(tmp_path: Path, monkeypatch, changes: dict[str, str], refused: str):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    recipe = load_recipe("quickstart")
    own = {key: value for key, value in flatten(recipe).items() if key.partition(".")[0] != next(iter(changes))}
    kept = own if "." not in next(iter(changes)) else flatten(recipe)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**kept, **changes}))
    with pytest.raises(RecipeError) as error:
        recorded_recipe(path)
    assert refused in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_what_the_file_may_not_say_the_user_says(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    recipe = load_recipe("mine.py")
    path = written(tmp_path, recipe)
    with pytest.raises(RecipeError, match=r"Say it yourself: robustmail run .*recipe\.json margin=\.\.\."):
        recorded_recipe(path)
    assert recorded_recipe(path, ["margin=mine.py:doubt"]) == recipe


@pytest.mark.parametrize("text", ["", "[]", '{"epochs": 3}', '{"epochs": "3", "epochs": "4"}', '{"epochs": "3"}'])
def test_what_is_no_recorded_recipe_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        recorded_recipe(tmp_path / "recipe.json")
