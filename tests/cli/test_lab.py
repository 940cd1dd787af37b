"""margins and figure on the command line: what they write, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from robustmail.models.classifier import build
from tests.cli.test_bad_input import assert_refused, robustmail  # noqa: F401  a fixture

OWN = """
import torch

class Knobs:
    def __init__(self, k): self.k = k
    def __call__(self, step): return step.probs_adv[:, 0]

def doubt(step): return step.probs_adv.amax(1)
def matrix(step): return step.probs_adv
def typo(step): return step.probs_advv
number = 3
"""
READ = "--data 'digits()' --model small_cnn --normalize none --n 30 --eps 0.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build("small_cnn", 10, 1).net.state_dict(), tmp_path / "net.pth")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_margins_writes_numbers_pictures_and_where_they_come_from(robustmail, folder: Path):  # noqa: F811
    words = f"margins net.pth {READ} --margins lps,own.py:doubt --against pgd10 --out lab"
    done = robustmail(words)
    assert done.code == 0, done.err
    assert "30 images: 6 attack paths, 2 margins" in done.out
    first = (folder / "lab/margins.json").read_bytes()
    found = json.loads(first)
    assert sorted(found["margins"]) == ["doubt", "lps"]
    assert found["weights"]["sha256"]
    assert "source" in found["settings"]["margin: doubt"]
    assert str(folder) not in first.decode()
    assert "--against pgd10" in json.loads((folder / "lab/provenance.json").read_text())["command"]
    assert (folder / "lab/paths.png").stat().st_size > 1000


def test_figure_draws_several_models_and_writes_the_numbers(robustmail, folder: Path):  # noqa: F811
    done = robustmail(f"figure 1c net.pth net.pth {READ} --out f")
    assert done.code == 0, done.err
    assert len(json.loads((folder / "f/figure-1c.json").read_text())["values"]["rows"]) == 4
    assert (folder / "f/figure-1c.svg").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("margins net.pth --margins pm_ad", "no such plugin among the margins. Did you mean 'pm_adv'?"),
        ("margins net.pth --margins lps,lps", "--margins: lps is named twice"),
        ("margins net.pth --margins own.py:doubbt", "has no 'doubbt'. Did you mean 'doubt'?"),
        ("margins net.pth --margins own.py:number", "is no function of a step"),
        ("margins net.pth --margins own.py:Knobs", "missing 1 required positional argument"),
        ("margins net.pth --margins own.py:matrix", "Return one number per example"),
        ("margins net.pth --margins own.py:typo", "Did you mean 'probs_adv'?"),
        ("margins net.pth --against pgd0", "no such attack"),
        ("figure 3 net.pth", "the paper has it not, or it shows no data"),
        ("figure 2 net.pth net.pth", "shows one model, not 2"),
        ("figure 1a net.pth --norm l2", "needs LM-PGD"),
        ("margins net.pth --out .", "holds things of another kind"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(robustmail, words: str, says: str, folder: Path):  # noqa: F811
    before = {path.name for path in folder.iterdir()}
    done = robustmail(f"{words} {READ}")
    assert_refused(done, says)
    assert {path.name for path in folder.iterdir()} <= before | {"figures"}
