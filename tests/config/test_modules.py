"""Files that are loaded twice, edited, of one name, or beside others: each is one module, and none gets another's."""

from __future__ import annotations

import pickle
import sys

import pytest

from robustmail.config.loader import find_plugin, load_plugins, load_recipe
from robustmail.config.modules import load_source
from robustmail.errors import RecipeError

RECIPE = """\
from dataclasses import dataclass
from robustmail import load_recipe
import {beside}


@dataclass(frozen=True)
class Flat:
    height: float = {beside}.HEIGHT

    def __call__(self, margin):
        return margin * 0 + self.height


recipe = load_recipe("quickstart").but(weighter=Flat(), burn_in=0)
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    yield write
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


def test_equal_plugins_of_one_file_are_equal_however_it_is_named(write, monkeypatch):
    path = write("mine.py", RECIPE.format(beside="heights_a"))
    write("heights_a.py", "HEIGHT = 1.0")
    monkeypatch.chdir(path.parent)
    first, second = load_recipe(str(path)), load_recipe("mine.py")
    assert first.weighter == second.weighter
    assert first == second
    assert find_plugin("mine.py:Flat")() == first.weighter
    assert type(load_plugins("mine.py:Flat")["Flat"]) is type(first.weighter)
    assert pickle.loads(pickle.dumps(first.weighter)) == first.weighter


def test_two_files_of_one_stem_are_two_modules(write):
    first, second = (load_source(write(f"{folder}/mine.py", "class Mine: ...")) for folder in ("one", "two"))
    assert first.__name__ != second.__name__
    assert sys.modules[first.__name__] is first
    assert sys.modules[second.__name__] is second


def test_an_edited_file_is_read_anew_and_so_is_one_that_it_imports(write):
    path = write("mine.py", RECIPE.format(beside="heights_b"))
    write("heights_b.py", "HEIGHT = 1.0")
    first = load_recipe(str(path))
    write("heights_b.py", "HEIGHT = 22.0  # edited")
    second = load_recipe(str(path))
    assert (first.weighter.height, second.weighter.height) == (1.0, 22.0)
    write("mine.py", path.read_text(encoding="utf-8") + "recipe = recipe.but(seed=7)\n")
    assert load_recipe(str(path)).seed == 7
    write("mine.py", "recipe = 1 / 0")
    with pytest.raises(RecipeError, match=r"mine.py:1: ZeroDivisionError"):
        load_recipe(str(path))


def test_two_recipes_with_different_neighbours_of_one_name_do_not_get_each_others(write):
    one, two = (write(f"{folder}/mine.py", RECIPE.format(beside="heights_c")) for folder in ("one", "two"))
    write("one/heights_c.py", "HEIGHT = 1.0")
    with pytest.raises(RecipeError, match="No module named 'heights_c'"):
        load_recipe(str(two))
    assert load_recipe(str(one)).weighter.height == 1.0
    with pytest.raises(RecipeError, match="No module named 'heights_c'"):  # though it was imported by the other
        load_recipe(str(two))
    write("two/heights_c.py", "HEIGHT = 2.0")
    with pytest.raises(RecipeError, match=r"two/mine.py: imports heights_c from beside it, .* is .*one/heights_c.py"):
        load_recipe(str(two))
    assert load_recipe(str(one)).weighter.height == 1.0
    assert sys.modules["heights_c"].HEIGHT == 1.0


def test_files_in_one_folder_share_what_lies_beside_them(write):
    write("heights_d.py", "HEIGHT = 1.0\n\n\nclass Held: ...")
    one, two = (load_source(write(f"{name}.py", "from heights_d import Held")) for name in ("one", "two"))
    assert one.Held is two.Held
    write("heights_d.py", "HEIGHT = 1.0\n\n\nclass Held:\n    edited = True")
    one, two = (load_source(write(f"{name}.py", "from heights_d import Held")) for name in ("one", "two"))
    assert one.Held is two.Held
    assert one.Held.edited


@pytest.mark.parametrize(("cookie", "encoding"), [("", "utf-8"), ("", "utf-8-sig"), ("# coding: latin-1\n", "latin-1")])
def test_a_file_is_read_in_its_own_encoding(cookie, encoding, tmp_path):
    (tmp_path / "mine.py").write_bytes(f"{cookie}name = 'é'\n".encode(encoding))
    assert load_source(tmp_path / "mine.py").name == "é"
