"""The notebooks run from top to bottom, in this process, and what their last lines show is HTML."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.docs.test_commands import check_meaning, parsed
from tests.docs.test_pages import LINK, anchors

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; returns the value of its last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


@pytest.mark.long
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run_cell(cell, names) for cell in cells(path, "code")]
    sys.modules.pop("net", None)
    cards = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(cards) >= 2
    assert all(card.startswith("<div><strong>") for card in cards)
    CLAIMS[path.stem](names, capsys.readouterr().out)


def of_training(names: dict[str, Any], printed: str) -> None:
    result = names["result"]
    assert "epoch 2: natural " in printed
    assert result["nat"].accuracy > 0.7
    assert 0.3 < result.worst.accuracy < result["nat"].accuracy


def of_the_margin(names: dict[str, Any], printed: str) -> None:
    """What the text says of the two margins holds."""
    auroc = {found.margin: found.everywhere.auroc.value for found in names["lab"].findings}
    assert auroc["signed_sureness"] > 0.9
    assert abs(auroc["signed_sureness"] - auroc["pm_adv"]) < 0.05
    assert "signed_sureness" in printed


def of_the_checkpoint(names: dict[str, Any], printed: str) -> None:
    assert names["loaded"].spec["normalize"] == "half"
    assert names["result"]["nat"].accuracy > 0.85 > 0.5 > names["result"].worst.accuracy


CLAIMS = {"train-and-attack": of_training, "write-a-margin": of_the_margin, "evaluate-a-checkpoint": of_the_checkpoint}


def test_every_notebook_is_listed_and_has_claims():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {path.stem for path in NOTEBOOKS} == CLAIMS.keys()
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in index] == []


@each_notebook
def test_a_notebook_is_kept_without_outputs(path: Path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [cell for cell in content["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])


@each_notebook
def test_links_and_commands_of_a_notebook_exist(path: Path):
    text = "\n".join(cells(path, "markdown"))
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve()
        assert to.is_file(), target
        assert not anchor or anchor in anchors(to), target
    for command in re.findall(r"`robustmail ([a-z]+ [^`]+)`", text):
        check_meaning(*parsed(command.split()))
