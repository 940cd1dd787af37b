"""The Python in the documentation: it compiles, its names and keywords exist, and what can be run is run."""

from __future__ import annotations

import ast
import inspect
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import robustmail
from robustmail import Recipe, load_recipe
from tests.docs.conftest import plugins_of, say
from tests.docs.pages import ROOT, Block, blocks

BLOCKS = blocks("python")


def of_page(name: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == ROOT / name]


def tree(block: Block) -> ast.Module:
    """The parsed block; `...` after keyword arguments stands for more of them."""
    return ast.parse(block.text.replace("    ...\n)", "    **rest,\n)"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_imports_exist_and_keywords_are_parameters(block: Block):
    for node in ast.walk(tree(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robustmail"):
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node.func, ast.Attribute) and node.func.attr == "but":
            assert keywords <= set(Recipe.__dataclass_fields__)
        elif isinstance(node.func, ast.Name) and node.func.id in robustmail.__all__:
            parameters = inspect.signature(getattr(robustmail, node.func.id)).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                assert keywords <= set(parameters)


def test_the_recipe_in_training_is_that_of_the_package():
    (block,) = (block for block in of_page("docs/training.md") if "Recipe(" in block.text)
    recipe = load_recipe("mail_trades")
    call = next(node for node in ast.walk(tree(block)) if isinstance(node, ast.Call))
    shown = {keyword.arg for keyword in call.keywords}
    rest = {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__ if name not in shown}
    names = {name: getattr(robustmail, name) for name in robustmail.__all__}
    exec(compile(tree(block), block.id, "exec"), names | {"rest": rest}, made := {})
    assert made["recipe"] == recipe


def test_what_check_says_of_the_readmes_margin_is_quoted(workplace: Path):
    quoted = {block.text for block in blocks("") if block.text.startswith("mine.py: ")}
    assert quoted == {say(workplace, "check", "mine.py")}


def test_the_plugins_of_the_page_are_lawful(tmp_path: Path):
    page = "docs/plugins.md"
    (tmp_path / "mine.py").write_text(plugins_of(page), encoding="utf-8")
    assert "passes all 7 laws" in say(tmp_path, "check", "mine.py")
    names: dict = {}
    for block in of_page(page):
        exec(compile(block.text, block.id, "exec"), names)
    names["test_my_plugins_are_lawful"]()


def test_the_loss_and_the_backward_pass_of_the_page_break_what_plain_attacks_do_not(fitted_model):
    names: dict = {}
    for block in of_page("docs/attacks.md"):
        exec(compile(block.text, block.id, "exec"), names)
    network, images = fitted_model
    plain = torch.nn.Sequential(names["Levels"](), network)
    found = [
        robustmail.evaluate(model, images, "nat,pgd20", eps=32 / 255) for model in (plain, names["defended"](network))
    ]
    assert found[0]["nat"].correct == found[1]["nat"].correct, "no verdict changes"
    assert found[1]["pgd20"].correct < found[0]["pgd20"].correct
    attack = replace(names["attack"], eps=64 / 255, alpha=8 / 255)
    assert robustmail.evaluate(network, images, ["nat", attack], eps=64 / 255).worst.correct < 16


@pytest.mark.long
def test_the_page_about_deploying_runs_from_top_to_bottom(finished: Path, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    names: dict = {}
    for block in of_page("docs/deploying.md"):
        exec(compile(block.text, block.id, "exec"), names)
    assert names["done"].difference < 1e-4 * names["done"].scale
    assert (finished / "quickstart.pt2").is_file()


@pytest.mark.long
def test_the_page_from_python_runs_from_top_to_bottom(finished: Path, monkeypatch, capsys):
    """On a run of one epoch, and training for one."""
    monkeypatch.chdir(finished)
    names: dict = {}
    page = of_page("docs/python.md")
    assert len(page) >= 5
    for block in page:
        exec(compile(block.text.replace("epochs=12", "epochs=1, burn_in=0"), block.id, "exec"), names)
    printed = capsys.readouterr().out
    assert "Evaluation(359 images: " in printed
    assert os.listdir(finished / "evals")
