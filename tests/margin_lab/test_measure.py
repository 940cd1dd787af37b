"""The margin lab on a trained network: ranking of known margins, same bytes for every batch, pictures and figures."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn

from robustmail import PGD, digits, loss_adv, lps, p_adv, pm_adv, target_confidence
from robustmail.data.dataset import to_float
from robustmail.data.testsets import TestSet
from robustmail.errors import PluginError, RecipeError
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.fields import describe
from robustmail.functional import gap
from robustmail.margin_lab import paper_figures
from robustmail.margin_lab.attack_paths import AttackPath, second_path
from robustmail.margin_lab.measure import MarginTask, measure_margins, save_lab
from robustmail.margin_lab.paper_figures import FigureInputs, compute_figure
from robustmail.margin_lab.results import Figure, LabResults
from robustmail.models.classifier import build
from robustmail.report import figures, margin_figures
from robustmail.report.figures import draw_figure
from robustmail.report.margin_figures import PICTURES, draw_lab
from robustmail.report.margin_tables import lab_table, read_lab
from robustmail.step import Trace

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
    """A small network, trained for a few steps against PGD on digits, and 60 images that it has not seen."""
    images = digits()()
    torch.manual_seed(0)
    model, attack = build("small_cnn", 10, 1), PGD(eps=0.1, alpha=0.04, steps=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in torch.randperm(len(images.train.y), generator=torch.Generator().manual_seed(0)).repeat(3).split(128):
        x, y = to_float(images.train.x[batch]), images.train.y[batch]
        x_adv = attack(model, x, y).x
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x_adv), y).backward()
        optimizer.step()
    data = TestSet("digits", images.test.first(60), 10, given="digits()")
    margins = {"strong": strong, "noise": noise, "lps": lps, "pm_adv": pm_adv, "constant": constant,
               "sometimes_nan": sometimes_nan, "p_adv": p_adv, "loss_adv": loss_adv}  # fmt: skip
    return MarginTask(LoadedModel.of(model.eval(), data), data, margins, 0.1, against=("cw", "pgd20"))


@pytest.fixture(scope="module")
def lab(task: MarginTask) -> LabResults:
    return list(measure_margins(task))[-1]


class Drawn(NamedTuple):
    """The pictures of the lab: their files, and matplotlib's figure of each."""

    folder: Path
    files: list[Path]
    pages: dict[str, Any]


@contextmanager
def pages_recorded() -> Iterator[list]:
    """Every matplotlib figure that is drawn meanwhile."""
    pages: list = []

    def recording(saved_figure: Callable) -> Callable:
        @contextmanager
        def record(*args):
            with saved_figure(*args) as page:
                yield page
                pages.append(page)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for module in (margin_figures, figures):
            patch.setattr(module, "saved_figure", recording(module.saved_figure))
        yield pages


@pytest.fixture(scope="module")
def drawn(lab: LabResults, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Drawn once: it takes seconds."""
    folder = tmp_path_factory.mktemp("drawn")
    with pages_recorded() as pages:
        files = draw_lab(lab, folder)
    return Drawn(folder, files, dict(zip(PICTURES, pages, strict=True)))


def test_the_true_margin_ranks_above_lps_and_lps_above_noise(lab: LabResults):
    order = [findings.margin for findings in lab.findings]
    assert order.index("strong") < order.index("lps") < order.index("noise")
    assert order.index("pm_adv") < order.index("noise")


def test_lps_is_discrete_and_path_dependent_and_pm_is_neither(lab: LabResults):
    by = {findings.margin: findings for findings in lab.findings}
    assert by["lps"].continuity.verdict == "discrete"
    assert by["lps"].path_dependent
    assert by["pm_adv"].continuity.verdict == "continuous"
    assert by["pm_adv"].spread["path"].rank == 0.0
    assert by["pm_adv"].spread["end"].rank > 0
    assert by["lps"].spread["end"].rank == 0.0


def test_noise_is_called_random_and_a_constant_constant(lab: LabResults):
    by = {findings.margin: findings for findings in lab.findings}
    assert [by[name].random for name in ("noise", "lps", "constant")] == [True, False, False]
    assert by["constant"].continuity.verdict == "constant"
    assert by["constant"].everywhere.auroc.value == 0.5


def test_a_margin_with_nan_is_reported_and_does_not_spoil_the_others(lab: LabResults):
    row = next(findings for findings in lab.findings if findings.margin == "sometimes_nan")
    assert row.wrong == "NaN or infinite on 1 of 60 images"
    assert "sometimes_nan" not in lab.margins


def test_the_rank_correlations_are_those_of_the_values_in_the_file(lab: LabResults):
    correct = np.array(lab.images["area"]) != "wrong"
    for images, chosen in ("everywhere", slice(None)), ("right", correct):
        rows = lab.rank_correlation[images]
        assert list(rows) == [findings.margin for findings in lab.findings if not findings.wrong]
        assert all(list(row) == list(rows) for row in rows.values())
        lps, pm_adv = (np.array(lab.margins[name])[chosen] for name in ("lps", "pm_adv"))
        assert rows["lps"]["pm_adv"].value == pytest.approx(spearmanr(lps, pm_adv).statistic, rel=1e-12)
        assert rows["lps"]["constant"].value is None


def test_the_table_names_margins_that_rank_alike_once(lab: LabResults):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(lab_table(lab))
    lines = [line for line in console.export_text().splitlines() if line.startswith("Nearly the order of")]
    words = [set(re.findall(r"\w+", line)) for line in lines]
    assert [{"p_adv", "loss_adv"} <= names for names in words].count(True) == 1, "each is a function of the other"
    assert all(sum(name in names for names in words) <= 1 for name in ("pm_adv", "p_adv", "loss_adv", "strong"))
    assert not any("noise" in line or "constant" in line for line in lines)


def test_a_heat_map_has_a_number_in_every_cell_and_the_truth_beside_the_margins(lab: LabResults, drawn: Drawn):
    page = drawn.pages["rank_correlation"]
    for axis, images in zip(page.axes, ("everywhere", "right"), strict=True):
        names = [label.get_text() for label in axis.get_xticklabels()]
        assert names == [*lab.rank_correlation[images], "(stands)", "(distance)"]
        cells = [text.get_text() for text in axis.texts]
        assert len(cells) == 7 * 9
        truths = [getattr(findings, images) for findings in lab.findings if not findings.wrong]
        known = [truth.distance.value for truth in truths]
        assert cells[7 * 7 + 1 :: 2] == ["–" if value is None else f"{value:.2f}" for value in known]


def test_a_margin_with_memory_is_refused(task: MarginTask):
    with pytest.raises(
        PluginError, match=r"margin target_confidence: remembers what it saw in training.* Leave it out"
    ):
        dataclasses.replace(task, margins={"lps": lps, "target_confidence": target_confidence()})


def test_areas_and_distances_are_consistent(lab: LabResults):
    assert sum(area.n for area in lab.areas) == lab.n
    assert [area.broken for area in lab.areas[:2]] == [area.n for area in lab.areas[:2]]
    assert lab.areas[2].broken == lab.critical
    distance, area = np.array(lab.images["distance"]), np.array(lab.images["area"])
    assert (distance[area == "wrong"] == 0).all()
    assert (distance[area != "wrong"] > 0).all()


def test_the_same_task_gives_the_same_bytes_whatever_the_batch_and_reads_back(
    task: MarginTask, lab: LabResults, tmp_path: Path
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    few = {"lps": lps, "noise": noise, "pm_adv": pm_adv}
    for name, batch in {"a": None, "b": 10}.items():
        again = MarginTask(task.subject, task.data.first(24), few, 0.1, against=("cw",), steps=4, batch=batch)
        save_lab(list(measure_margins(again))[-1], tmp_path / name)
    assert (tmp_path / "a/margins.json").read_bytes() == (tmp_path / "b/margins.json").read_bytes()
    save_lab(lab, tmp_path / "b")
    raw = json.loads((tmp_path / "b/margins.json").read_text())
    assert read_lab(tmp_path / "b") == LabResults.of(raw)
    assert [findings.margin for findings in LabResults.of(raw).findings] == [
        findings.margin for findings in lab.findings
    ]


def test_every_question_has_a_picture_and_the_table_names_the_verdicts(lab: LabResults, drawn: Drawn, tmp_path: Path):
    assert {path.name for path in drawn.files} == {f"{name}.{form}" for name in PICTURES for form in ("png", "svg")}
    again = draw_lab(lab, tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn.files]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(lab_table(lab))
    assert "discrete, path-dependent" in console.export_text()


def test_every_axis_is_labelled_and_every_bar_lies_inside_it(drawn: Drawn):
    axes = [axis for page in drawn.pages.values() for axis in page.axes if axis.axison]
    assert len(axes) == 7 + 1 + 2 + 2 + 2 + 1 + 1  # seven margins could be measured
    for axis in axes:
        assert axis.get_xlabel()
        assert axis.get_ylabel() or not axis.yaxis.get_tick_params()["labelleft"]
        (left, right), (low, high) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
        for bar in axis.patches:
            if hasattr(bar, "get_width"):
                assert left <= bar.get_x() <= bar.get_x() + bar.get_width() <= right
                assert low <= bar.get_y() <= bar.get_y() + bar.get_height() <= high


def test_where_nothing_is_critical_the_title_says_so_and_the_legend_has_no_entry_for_it(
    lab: LabResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(margin_figures, "PICTURES", {"hidden": PICTURES["hidden"]})
    titles, keys = [], []
    for critical in (np.zeros(lab.n, bool), np.arange(lab.n) < 1):
        images = {**lab.images, "critical": critical.tolist()}
        with pages_recorded() as pages:
            draw_lab(dataclasses.replace(lab, images=images, critical=int(critical.sum())), tmp_path)
        (page,) = pages
        titles.append(page.axes[0].get_title())
        keys.append([text.get_text() for text in page.legends[0].get_texts()])
    assert titles[0].startswith("No critical image among 60")
    assert titles[1].startswith("1 critical image of 60")
    assert ["a critical image" in labels for labels in keys] == [False, True]


def test_no_old_picture_stays_where_there_is_nothing_to_draw(
    task: MarginTask, lab: LabResults, drawn: Drawn, tmp_path: Path
):
    files = [Path(shutil.copy(path, tmp_path)) for path in drawn.files]
    unmeasured = tuple(dataclasses.replace(findings, wrong="NaN") for findings in lab.findings)
    assert draw_lab(dataclasses.replace(lab, findings=unmeasured), tmp_path) == []
    figure = list(compute_figure("4", FigureInputs([task.subject], task.data.first(12), 0.1)))[-1]
    files += draw_figure(figure, tmp_path)
    assert draw_figure(dataclasses.replace(figure, drawable=False), tmp_path) == []
    assert not any(path.exists() for path in files)


@pytest.mark.parametrize("which", ["1a", "1b", "1c", "2", "4"])
def test_a_figure_names_every_attack_that_ran_for_it(which: str, task: MarginTask, monkeypatch: pytest.MonkeyPatch):
    ran = set()

    def record_calls(name: str, settings: Callable) -> None:
        function = getattr(paper_figures, name)

        def recording(*args, **kwargs):
            ran.update(settings(args))
            return function(*args, **kwargs)

        monkeypatch.setattr(paper_figures, name, recording)

    record_calls("run_path", lambda args: [describe(args[2].attack)])
    record_calls("run_attack", lambda args: args[3].settings.values())
    record_calls("evaluate_attacks", lambda args: [text for spec in args[2] for text in spec.settings.values()])
    figure = list(compute_figure(which, FigureInputs([task.subject], task.data.first(12), 0.1)))[-1]
    assert set(figure.settings.values()) == ran
    if which == "1a":
        assert "steps=50" in figure.settings["PGD-50"]
        assert figure.settings["LM-PGD-50"].startswith("LMPGD")


def test_the_lab_and_figure_1b_mean_the_same_by_critical(task: MarginTask):
    against = dataclasses.replace(task, margins={"lps": lps}, against=("cw",))
    figure = list(compute_figure("1b", FigureInputs([task.subject], against.data, 0.1)))[-1]
    measured = list(measure_margins(against))[-1]
    in_figure, in_lab = np.array(figure.values["critical"]), np.array(measured.images["critical"])
    assert not (in_figure & ~in_lab).any()  # the lab has more paths to break images with
    assert (np.array(measured.images["area"])[in_figure] == "safe").all()


def test_an_eps_of_zero_is_refused(task: MarginTask):
    with pytest.raises(RecipeError, match="eps=0: must be above 0"):
        dataclasses.replace(task, eps=0.0)
    with pytest.raises(RecipeError, match="eps=0: must be above 0"):
        FigureInputs([task.subject], task.data, 0.0)


@pytest.mark.parametrize("which", ["1a", "1b", "1c", "2", "4"])
def test_every_figure_of_the_paper_is_drawn_or_says_why_not(which: str, task: MarginTask, tmp_path: Path):
    figure = list(compute_figure(which, FigureInputs([task.subject], task.data.first(24), 0.1)))[-1]
    assert isinstance(figure, Figure)
    files = draw_figure(figure, tmp_path)
    assert len(files) == 2 * figure.drawable
    assert figure.drawable or which == "1a"  # of which there may be none among 24 images
    json.dumps(figure.values, allow_nan=False)


def test_a_margin_that_breaks_its_contract_is_refused_before_any_attack(task: MarginTask):
    def matrix(step):
        return step.probs_adv

    with pytest.raises(PluginError, match="Return one number per example"):
        next(measure_margins(MarginTask(task.subject, task.data, {"matrix": matrix}, 0.1)))


def test_the_second_path_has_the_other_trace_only_where_both_outcomes_are_equal():
    one, two = (Trace(torch.full((3, 2), v), torch.full((3, 2), float(v))) for v in (True, False))
    x = torch.zeros(2, 1, 2, 2)
    mixed = second_path(AttackPath(x, one, torch.tensor([True, False])), AttackPath(x, two, torch.tensor([True, True])))
    assert mixed.correct.tolist() == [[False, True]] * 3
    assert mixed.p_true.tolist() == [[0.0, 1.0]] * 3
