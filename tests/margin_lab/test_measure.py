"""The lab on a real network: a planted good margin above planted noise, LPS discrete and path-dependent, same bytes."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustmail import PGD, digits, lps, pm_adv
from robustmail.data.dataset import to_float
from robustmail.data.testsets import TestSet
from robustmail.errors import PluginError, RecipeError
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.fields import describe
from robustmail.functional import gap
from robustmail.margin_lab import paper_figures
from robustmail.margin_lab.attack_paths import AttackPath as Walked
from robustmail.margin_lab.attack_paths import second_path
from robustmail.margin_lab.measure import MarginTask, measure_margins, save_lab
from robustmail.margin_lab.paper_figures import FigureInputs, compute_figure
from robustmail.margin_lab.results import Figure, Lab
from robustmail.models.classifier import build
from robustmail.report import figures as drawings
from robustmail.report import margin_figures
from robustmail.report.figures import draw_figure
from robustmail.report.margin_figures import PICTURES, draw_lab
from robustmail.report.margin_tables import lab_table, read_lab
from robustmail.step import Trace
from robustmail.text import plural

pytestmark = pytest.mark.long

STRONG = PGD(eps=0.1, alpha=0.02, steps=5, start="none", loss="margin")


def strong(step):
    """The logit gap under an attack of its own."""
    return gap(step.model(STRONG(step.model, step.x, step.y).x), step.y)


def noise(step):
    return torch.rand(len(step.y))


def constant(step):
    return torch.ones(len(step.y))


def sometimes_nan(step):
    return step.probs_adv.amax(1).where(torch.arange(len(step.y)) != 7, float("nan"))


@pytest.fixture(scope="module")
def task() -> MarginTask:
    """A small network, trained for a few steps against PGD on digits, and 120 images that it has not seen."""
    images = digits()()
    torch.manual_seed(0)
    model, attack = build("small_cnn", 10, 1), PGD(eps=0.1, alpha=0.04, steps=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in torch.randperm(len(images.train.y), generator=torch.Generator().manual_seed(0)).repeat(3).split(128):
        x, y = to_float(images.train.x[batch]), images.train.y[batch]
        found = attack(model, x, y).x
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(found), y).backward()
        optimizer.step()
    data = TestSet("digits", images.test.first(120), 10, given="digits()")
    margins = {"strong": strong, "noise": noise, "lps": lps, "pm_adv": pm_adv, "constant": constant,
               "sometimes_nan": sometimes_nan}  # fmt: skip
    return MarginTask(LoadedModel.of(model.eval(), data), data, margins, 0.1, against=("cw", "pgd20"))


@pytest.fixture(scope="module")
def found(task: MarginTask) -> Lab:
    return list(measure_margins(task))[-1]


def test_the_true_margin_ranks_above_lps_and_lps_above_noise(found: Lab):
    order = [one.margin for one in found.findings]
    assert order.index("strong") < order.index("lps") < order.index("noise")
    assert order.index("pm_adv") < order.index("noise")


def test_lps_is_discrete_and_path_dependent_and_pm_is_neither(found: Lab):
    by = {one.margin: one for one in found.findings}
    assert by["lps"].continuity.verdict == "discrete"
    assert by["lps"].path_dependent
    assert by["pm_adv"].continuity.verdict == "continuous"
    assert by["pm_adv"].spread["path"].rank == 0.0
    assert by["pm_adv"].spread["end"].rank > 0
    assert by["lps"].spread["end"].rank == 0.0


def test_noise_is_called_random_and_a_constant_constant(found: Lab):
    by = {one.margin: one for one in found.findings}
    assert [by[name].random for name in ("noise", "lps", "constant")] == [True, False, False]
    assert by["constant"].continuity.verdict == "constant"
    assert by["constant"].everywhere.auroc.value == 0.5


def test_nan_is_an_honest_row_and_does_not_spoil_the_others(found: Lab):
    row = next(one for one in found.findings if one.margin == "sometimes_nan")
    assert row.wrong == "NaN or infinite on 2 of 120 images"  # the eighth of each batch of a hundred
    assert "sometimes_nan" not in found.margins


def test_areas_and_distances_hang_together(found: Lab):
    assert sum(area.n for area in found.areas) == found.n
    assert [area.broken for area in found.areas[:2]] == [area.n for area in found.areas[:2]]
    assert found.areas[2].broken == found.critical
    distance, area = np.array(found.images["distance"]), np.array(found.images["area"])
    assert (distance[area == "wrong"] == 0).all()
    assert (distance[area != "wrong"] > 0).all()


def test_the_same_task_gives_the_same_bytes_whatever_the_batch_and_reads_back(
    task: MarginTask, found: Lab, tmp_path: Path
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    few = {"lps": lps, "noise": noise, "pm_adv": pm_adv}
    for name, batch in {"a": None, "b": 16}.items():
        again = MarginTask(task.subject, task.data.first(40), few, 0.1, against=("cw",), batch=batch)
        save_lab(list(measure_margins(again))[-1], tmp_path / name)
    assert (tmp_path / "a/margins.json").read_bytes() == (tmp_path / "b/margins.json").read_bytes()
    save_lab(found, tmp_path / "b")
    raw = json.loads((tmp_path / "b/margins.json").read_text())
    assert read_lab(tmp_path / "b") == Lab.of(raw)
    assert [one.margin for one in Lab.of(raw).findings] == [one.margin for one in found.findings]


def test_every_question_has_a_picture_and_the_table_says_what_was_found(found: Lab, tmp_path: Path):
    from rich.console import Console

    made = draw_lab(found, tmp_path)
    assert {path.name for path in made} == {f"{name}.{form}" for name in PICTURES for form in ("png", "svg")}
    first = {path: path.read_bytes() for path in made}
    assert all(path.read_bytes() == first[path] for path in draw_lab(found, tmp_path))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(lab_table(found))
    assert "discrete, path-dependent" in console.export_text()


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every sheet that was drawn on, as matplotlib has it."""
    drawn = []

    def keeping(sheet: Callable) -> Callable:
        @contextmanager
        def kept(*args):
            with sheet(*args) as page:
                yield page
                drawn.append(page)

        return kept

    for module in (margin_figures, drawings):
        monkeypatch.setattr(module, "sheet", keeping(module.sheet))
    return drawn


def test_every_axis_is_labelled_and_every_bar_lies_inside_it(found: Lab, sheets: list, tmp_path: Path):
    draw_lab(found, tmp_path)
    axes = [axis for page in sheets for axis in page.axes if axis.axison]
    assert len(axes) == 5 + 1 + 2 + 2 + 1 + 1  # five margins could be measured
    for axis in axes:
        assert axis.get_xlabel()
        assert axis.get_ylabel() or not axis.yaxis.get_tick_params()["labelleft"]
        (left, right), (low, high) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
        for bar in axis.patches:
            if hasattr(bar, "get_width"):
                assert left <= bar.get_x() <= bar.get_x() + bar.get_width() <= right
                assert low <= bar.get_y() <= bar.get_y() + bar.get_height() <= high


def test_where_nothing_is_critical_the_picture_says_so_and_has_no_key_for_it(
    found: Lab, sheets: list, tmp_path: Path
):  # fmt: skip
    titles, keys = [], []
    for critical in (np.zeros(found.n, bool), np.arange(found.n) < 1):
        images = {**found.images, "critical": critical.tolist()}
        draw_lab(dataclasses.replace(found, images=images, critical=int(critical.sum())), tmp_path)
        page = sheets[list(margin_figures.PICTURES).index("hidden") - len(margin_figures.PICTURES)]
        titles.append(page.axes[0].get_title())
        keys.append([text.get_text() for text in page.legends[0].get_texts()])
    assert titles[0].startswith("No critical image among 120")
    assert titles[1].startswith("1 critical image of 120")
    assert ["a critical image" in some for some in keys] == [False, True]


def test_no_old_picture_stays_where_there_is_nothing_to_draw(task: MarginTask, found: Lab, tmp_path: Path):
    made = draw_lab(found, tmp_path)
    unmeasured = tuple(dataclasses.replace(one, wrong="NaN") for one in found.findings)
    assert draw_lab(dataclasses.replace(found, findings=unmeasured), tmp_path) == []
    some = list(compute_figure("4", FigureInputs([task.subject], task.data.first(30), 0.1)))[-1]
    made += draw_figure(some, tmp_path)
    assert draw_figure(dataclasses.replace(some, drawable=False), tmp_path) == []
    assert not any(path.exists() for path in made)


@pytest.mark.parametrize("which", ["1a", "1b", "1c", "2", "4"])
def test_a_figure_names_every_attack_that_ran_for_it(which: str, task: MarginTask, monkeypatch: pytest.MonkeyPatch):
    ran = set()

    def told(does: Callable, texts: Callable) -> Callable:
        def telling(*args, **knobs):
            ran.update(texts(args))
            return does(*args, **knobs)

        return telling

    def watch(name: str, texts: Callable) -> None:
        monkeypatch.setattr(paper_figures, name, told(getattr(paper_figures, name), texts))

    watch("run_paths", lambda args: [describe(args[2].attack)])
    watch("run_attack", lambda args: args[3].settings.values())
    watch("evaluate_attack", lambda args: args[2].settings.values())
    drawn = list(compute_figure(which, FigureInputs([task.subject], task.data.first(12), 0.1)))[-1]
    assert set(drawn.settings.values()) == ran
    if which == "1a":
        assert "steps=50" in drawn.settings["PGD-50"]
        assert drawn.settings["LM-PGD-50"].startswith("LMPGD")


def test_the_lab_and_figure_1b_mean_the_same_by_critical(task: MarginTask):
    against = dataclasses.replace(task, margins={"lps": lps}, data=task.data.first(60), against=("cw",))
    drawn = list(compute_figure("1b", FigureInputs([task.subject], against.data, 0.1)))[-1]
    measured = list(measure_margins(against))[-1]
    mine, theirs = np.array(drawn.values["critical"]), np.array(measured.images["critical"])
    assert not (mine & ~theirs).any()  # the lab has more paths to break images with
    assert (np.array(measured.images["area"])[mine] == "safe").all()


def test_a_budget_of_nothing_is_refused(task: MarginTask):
    with pytest.raises(RecipeError, match="eps=0: must be above 0"):
        dataclasses.replace(task, eps=0.0)
    with pytest.raises(RecipeError, match="eps=0: must be above 0"):
        FigureInputs([task.subject], task.data, 0.0)


def test_a_single_thing_is_singular():
    assert [plural(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]


@pytest.mark.parametrize("which", ["1a", "1b", "1c", "2", "4"])
def test_every_figure_of_the_paper_is_drawn_or_says_why_not(which: str, task: MarginTask, tmp_path: Path):
    drawn = list(compute_figure(which, FigureInputs([task.subject], task.data.first(60), 0.1)))[-1]
    assert isinstance(drawn, Figure)
    made = draw_figure(drawn, tmp_path)
    assert len(made) == 2 * drawn.drawable
    assert drawn.drawable or which == "1a"  # of which there may be none among 60 images
    json.dumps(drawn.values, allow_nan=False)


def test_a_margin_that_breaks_its_contract_is_refused_before_any_attack(task: MarginTask):
    def matrix(step):
        return step.probs_adv

    with pytest.raises(PluginError, match="Return one number per example"):
        next(measure_margins(MarginTask(task.subject, task.data, {"matrix": matrix}, 0.1)))


def test_a_graft_takes_the_other_trace_only_where_both_ends_share_a_fate():
    one, two = (Trace(torch.full((3, 2), v), torch.full((3, 2), float(v))) for v in (True, False))
    x = torch.zeros(2, 1, 2, 2)
    mixed = second_path(Walked(x, one, torch.tensor([True, False])), Walked(x, two, torch.tensor([True, True])))
    assert mixed.correct.tolist() == [[False, True]] * 3
    assert mixed.p_true.tolist() == [[0.0, 1.0]] * 3
