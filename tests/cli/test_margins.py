"""margins and figure on the command line: what they write, and what bad input gets."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

from robustmail.catalog import catalog_entries
from robustmail.cli.evaluate import eval_
from robustmail.cli.margins import figure, load_margins, margins
from robustmail.models.classifier import build
from robustmail.report import margin_figures
from robustmail.report.margin_figures import PICTURES
from tests.cli.test_bad_input import assert_refused, robustmail  # noqa: F401  a fixture

pytestmark = pytest.mark.long

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
READ = "--data 'digits()' --model small_cnn --normalize none --n 16 --eps 0.1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the seven pictures of a lab, two are drawn: each takes as long as the measurement."""
    drawn = {name: PICTURES[name] for name in ("paths", "rank_correlation")}
    monkeypatch.setattr(margin_figures, "PICTURES", drawn)
    torch.manual_seed(0)
    torch.save(build("small_cnn", 10, 1).net.state_dict(), tmp_path / "net.pth")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "state.pt").write_text("a run's")
    return tmp_path


def test_margins_writes_numbers_pictures_and_where_they_come_from(robustmail, folder: Path):  # noqa: F811
    words = f"margins net.pth {READ} --margins lps,own.py:doubt --against pgd10 --out lab"
    done = robustmail(words)
    assert done.code == 0, done.err
    assert "16 images: 6 attack paths, 2 margins" in done.out
    first = (folder / "lab/margins.json").read_bytes()
    found = json.loads(first)
    assert sorted(found["margins"]) == ["doubt", "lps"]
    assert found["weights"]["sha256"]
    assert "source" in found["settings"]["margin: doubt"]
    assert str(folder) not in first.decode()
    assert "--against pgd10" in json.loads((folder / "lab/provenance.json").read_text())["command"]
    assert (folder / "lab/paths.png").stat().st_size > 1000


def test_all_margins_but_those_with_memory_are_measured_where_none_is_named(robustmail, folder: Path):  # noqa: F811
    done = robustmail(f"margins net.pth {READ} --against pgd2 --steps 2 --out lab")
    assert done.code == 0, done.err
    assert "not measured, for lack of what training remembered: target_confidence" in done.out
    measured = set(catalog_entries("margins")) - {"target_confidence"}
    found = json.loads((folder / "lab/margins.json").read_text())
    assert set(found["margins"]) == set(found["rank_correlation"]["everywhere"]) == measured
    assert (folder / "lab/rank_correlation.png").stat().st_size > 1000


def test_all_stands_beside_margins_of_a_file_and_a_margin_with_memory_may_be_named(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    loaded, left_out = load_margins("lps,all,own.py:doubt")
    assert set(loaded) | set(left_out) == {*catalog_entries("margins"), "doubt"}
    assert left_out == ["target_confidence"]
    assert "target_confidence" in load_margins("all,target_confidence")[0], "to be refused with its reason"


def test_figure_draws_several_models_and_writes_the_numbers(robustmail, folder: Path):  # noqa: F811
    done = robustmail(f"figure 1c net.pth net.pth {READ} --out f")
    assert done.code == 0, done.err
    assert len(json.loads((folder / "f/figure-1c.json").read_text())["values"]["rows"]) == 4
    assert (folder / "f/figure-1c.svg").is_file()


def test_another_lab_is_not_overwritten_but_with_fresh(robustmail, folder: Path):  # noqa: F811
    words = f"margins net.pth {READ} --margins lps --against pgd2 --out lab"
    assert robustmail(words).code == 0
    assert robustmail(words).code == 0, "the same again"
    before = (folder / "lab/margins.json").read_bytes()
    other = words.replace("--against pgd2", "--against pgd2,cw").replace("--eps 0.1", "--eps 0.2")
    assert_refused(robustmail(other), "lab: holds another lab (against: pgd2 there, pgd2, cw here; eps: 0.1 there, 0.2")
    assert (folder / "lab/margins.json").read_bytes() == before
    assert robustmail(f"{other} --fresh").code == 0
    assert json.loads((folder / "lab/margins.json").read_text())["spec"]["eps"] == 0.2


def test_every_figure_keeps_its_own_provenance_and_a_replaced_one_is_told(robustmail, folder: Path):  # noqa: F811
    for which in ("2", "4"):
        assert "replaced" not in robustmail(f"figure {which} net.pth {READ} --out f").out
        kept = json.loads((folder / f"f/provenance-{which}.json").read_text())
        assert f"figure {which} net.pth" in kept["command"]
    assert "replaced" not in robustmail(f"figure 4 net.pth {READ} --out f").out
    fewer = READ.replace("--n 16", "--n 12")
    assert "f held another figure 4, which is replaced" in robustmail(f"figure 4 net.pth {fewer} --out f").out


def test_the_weights_of_runs_do_not_share_a_folder(robustmail, folder: Path):  # noqa: F811
    short = "run quickstart epochs=1 burn_in=0 optimizer.lr=0.05 evaluate=nat test_size=10 --plain"
    assert robustmail(short).code == 0
    for file in ("best.safetensors", "last.safetensors", ""):
        assert robustmail(f"figure 4 runs/quickstart/0/{file} --n 10").code == 0
    assert [path.name for path in (folder / "figures").iterdir()] == ["quickstart-0"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("margins net.pth --margins pm_ad", "no such plugin among the margins. Did you mean 'pm_adv'?"),
        ("margins net.pth --margins target_confidence", "remembers what it saw in training"),
        ("margins net.pth --margins lps,lps", "--margins: lps is named twice"),
        ("margins net.pth --margins own.py:doubbt", "has no 'doubbt'. Did you mean 'doubt'?"),
        ("margins net.pth --margins own.py:number", "not a callable. Name a function that takes a Step"),
        ("margins net.pth --margins own.py:Knobs", "missing 1 required positional argument"),
        ("margins net.pth --margins own.py:matrix", "Return one number per example"),
        ("margins net.pth --margins own.py:typo", "Did you mean 'probs_adv'?"),
        ("margins net.pth --against pgd0", "no such attack"),
        ("figure 3 net.pth", "not available: the paper has no such figure"),
        ("figure 2 net.pth net.pth", "shows one model, not 2"),
        ("figure 1a net.pth --norm l2", "figure 1a: needs LM-PGD"),
        ("figure 1b net.pth --norm l2", "figure 1b: needs LM-PGD"),
        ("margins nofile.pth", "nofile.pth: no such file"),
        ("margins net.pth --against ''", "--against: no name given. Write pgd100,cw."),
        ("margins net.pth --margins own.py", "Write own.py:margin."),
        ("margins net.pth --out trained", "trained: is no lab's: it holds state.pt, a run's"),
        ("figure 4 net.pth --out trained", "trained: is no figure's: it holds state.pt, a run's"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(robustmail, words: str, says: str, folder: Path):  # noqa: F811
    before = {path.name for path in folder.iterdir()}
    done = robustmail(f"{words} {READ}")
    assert_refused(done, says)
    assert {path.name for path in folder.iterdir()} <= before | {"figures"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("margins nofile.safetensors", "nofile.safetensors: no such file"),
        ("figure 4 nett.pth", "nett.pth: no such file. Did you mean 'net.pth'?"),
        ("margins net.pth --data 'digits()' --model small_cnn --normalize none --eps 0", "eps=0: must be above 0"),
        ("figure 4 net.pth --data 'digits()' --model small_cnn --normalize none --eps 0", "eps=0: must be above 0"),
    ],
)
def test_a_missing_file_and_a_budget_of_nothing_are_told_before_all_else(
    robustmail, words: str, says: str, folder: Path  # noqa: F811
):  # fmt: skip
    assert_refused(robustmail(words), says)
    assert not (folder / "lab").exists()
    assert not (folder / "figures").exists()


@pytest.mark.parametrize("verb", [eval_, margins, figure], ids=["eval", "margins", "figure"])
def test_a_verb_that_refuses_a_doubtful_reading_has_the_option_that_the_error_names(verb):
    assert "accept_reading" in inspect.signature(verb).parameters
