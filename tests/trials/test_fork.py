"""Cells share exactly the epochs in which they train alike, and forking changes no bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustmail.config.loader import load_recipe
from robustmail.config.overrides import apply_overrides
from robustmail.recipe import Recipe
from robustmail.runtime.signals import Signals
from robustmail.train.run import run
from robustmail.trials.execute import Outcome as Done
from robustmail.trials.execute import missing, ordered, run_here, run_job
from robustmail.trials.fork import Job, plan_jobs, shared_prefix, started
from robustmail.trials.grid import Cell, cells, folders, recipes
from tests.trials.conftest import TINY, hashes

pytestmark = pytest.mark.long

OUT = Path("grid")


def planned(*grid: Cell, out: Path = OUT) -> list[Job]:
    return plan_jobs(recipes(grid), folders(grid, out), out)


def cell(row: str, *changes: str, recipe: str = "quickstart", seed: int = 1) -> Cell:
    return Cell(row, recipe, (*TINY, *changes), seed)


def shared(*grid: Cell) -> list[tuple[str, int, int, int]]:
    """(first row, first epoch, end, cells) of every trunk."""
    return [(job.cell.row, job.begin, job.until, job.cells) for job in planned(*grid) if job.until is not None]


def test_cells_that_differ_in_margin_and_weight_share_their_burn_in():
    grid = [
        cell("a"),
        cell("b", "margin=pm_nat"),
        cell("c", "weighter.slope=9"),
        cell("d", "margin=None", "weighter=None"),
    ]
    assert shared(*grid) == [("a", 0, 2, 4)]


def test_a_plain_method_shares_the_burn_in_of_its_reweighted_kin_across_recipes():
    mini = ("attack=PGD(eps=8/255, alpha=2/255, steps=10)",)
    grid = [Cell("AT", "at", mini, 1), Cell("MAIL-AT", "mail_at", mini, 1), Cell("GAIRAT", "gairat", (), 1)]
    assert shared(*grid) == [("AT", 0, 74, 3)]


DIFFER_AT_ONCE = [
    "seed", "objective.beta=6", "attack.steps=3", "batch=256", "model=cifar_resnet18_w8", "validate=pgd3", "ema=0.9",
    "optimizer.momentum=0.8", "attack_mode=train", "data.of.pad=2", "eps=0.2", "perturbation=AWP(gamma=0.01)",
    "optimizer.lr=Stairs({0: 0.04, 2: 0.01})", "normalize=((0.5,), (0.5,))", "optimizer.lr=Cosine(high=0.05, epochs=3)",
    "augment=CutMix", "augment=()", "label_smoothing=0.1", "swa=1", "keep_every=1", "validate=pgd2,cw",
]  # fmt: skip


@pytest.mark.parametrize("change", DIFFER_AT_ONCE)
def test_whatever_training_or_its_files_depend_on_is_not_shared(change):
    other = cell("b", seed=2) if change == "seed" else cell("b", change)
    assert shared(cell("a"), other) == []


@pytest.mark.parametrize("change", ["evaluate=nat,pgd2", "test_size=20", "select=last"])
def test_what_happens_after_training_is_no_reason_to_train_twice(change):
    assert shared(cell("a"), cell("b", change)) == [("a", 0, 3, 2)]


def test_cells_that_keep_other_sets_of_weights_share_no_files():
    ema = cell("a", "ema=0.9")
    assert shared(ema, cell("b", "ema=0.9", "select=best-live")) == []
    assert shared(ema, cell("b", "ema=0.9", "select=last-ema")) == [("a", 0, 3, 2)]


def test_a_schedule_decides_by_its_values_and_not_by_its_name():
    """During the first epoch both attacks are the same; the budget that picks the best epoch must be, too."""
    steps = "attack.steps=Stairs({0: 2, 1: %d})"
    assert shared(cell("a", steps % 3), cell("b", steps % 4)) == [("a", 0, 1, 2)]
    eps = "attack.eps=Stairs({0: 0.05, 1: %s})"
    assert shared(cell("a", eps % 0.1), cell("b", eps % 0.2)) == []


def test_trunks_fork_from_trunks():
    steps = "attack.steps=Stairs({0: 2, 1: 3})"
    grid = [cell("a"), cell("b", "margin=pm_nat"), cell("c", steps), cell("d", steps, "margin=pm_nat")]
    jobs = planned(*grid)
    assert shared(*grid) == [("a", 0, 1, 4), ("a", 1, 2, 2), ("c", 1, 2, 2)]
    before: set[Path | None] = {None}
    for job in jobs:
        assert job.trunk in before, "a trunk comes before what goes on from it"
        before.add(job.folder)
    assert len({job.folder for job in jobs}) == len(jobs) == 7


def test_a_run_that_ends_earlier_leaves_the_trunk_there():
    assert shared(cell("a"), cell("b", "epochs=1")) == [("a", 0, 1, 2)]


def test_plugins_that_cannot_be_compared_are_not_shared(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport torch\nfrom robustmail import PGD\n\n\n"
        "@dataclass(frozen=True)\nclass tilted:\n    eps: float\n    by: object\n\n"
        "    def __call__(self, model, x, y):\n        return x\n\n\n"
        "attack, equal = tilted(0.1, torch.zeros(3)), tilted(0.1, torch.zeros(3))\n"
    )
    attack, equal = (f"attack={tmp_path}/mine.py:{name}" for name in ("attack", "equal"))
    assert shared(cell("a", attack), cell("b", equal, "margin=pm_nat")) == []
    assert shared(cell("a", attack), cell("b", attack, "margin=pm_nat")) == [("a", 0, 2, 2)]  # a file is one module


def test_epochs_and_burn_in_alone_are_not_what_an_epoch_depends_on():
    recipe = apply_overrides(load_recipe("quickstart"), TINY)
    assert shared_prefix(recipe, 0) == shared_prefix(recipe.but(burn_in=1, epochs=9), 0)
    assert shared_prefix(recipe, 1) != shared_prefix(recipe.but(burn_in=1), 1)


def carry_out(jobs: list[Job], found: dict[Cell, Recipe]) -> list[str]:
    """Do what is missing in this process; the names of what was done."""

    def perform(job: Job) -> Done:
        for _ in run_job(job, Signals()):
            pass
        return Done()

    return [event[0].name for event in ordered(missing(jobs, found), run_here(perform)) if isinstance(event, tuple)]


KINDS = {
    "margins": ["margin=pm_adv", "margin=pm_nat"],
    "ema": ["ema=0.9", "ema=0.9 margin=pm_nat"],
    "memory": ["objective=SelfAdaptive(start=1)", "objective=SelfAdaptive(start=1) margin=target_confidence"],
    "margins, one with memory": ["margin=target_confidence", "margin=pm_nat"],
    "swa, with kept epochs": [
        "swa=0 select=best-swa keep_every=1", "swa=0 select=best-swa keep_every=1 margin=pm_nat",
    ],
    "AWP with a warm-up": [
        "perturbation=AWP(gamma=Stairs({0:0.0,1:0.01}))",
        "perturbation=AWP(gamma=Stairs({0:0.0,1:0.01})) margin=pm_nat",
    ],
    "AWP that begins at different times": [
        "perturbation=AWP(gamma=Stairs({0:0.0,1:0.01}))", "perturbation=AWP(gamma=Stairs({0:0.0,2:0.01}))",
    ],
    "nested": ["margin=pm_nat", "attack.steps=Stairs({0:2,1:3})", "attack.steps=Stairs({0:2,1:3}) margin=pm_nat"],
}  # fmt: skip


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_a_forked_run_is_the_unforked_one_to_the_bit(tmp_path, rows):
    grid = [cell(row, *row.split()) for row in rows]
    found = recipes(grid)
    places = folders(grid, tmp_path)
    jobs = plan_jobs(found, places, tmp_path)
    assert any(job.until for job in jobs), "nothing is shared, so nothing was tested"
    carry_out(jobs, found)
    for one in grid:
        alone = tmp_path / "alone" / str(one.row)
        for _ in run(found[one], alone, "alone"):
            pass
        assert hashes(places[one]) == hashes(alone)
        assert (places[one] / "recipe.json").read_text() == (alone / "recipe.json").read_text()
    assert carry_out(jobs, found) == [], "a finished grid has nothing to do"


def test_a_fork_that_was_killed_before_its_state_is_made_again(tmp_path):
    grid = cells(["quickstart"], ["margin=pm_adv,pm_nat"], TINY, [1])
    found, places = recipes(grid), folders(grid, tmp_path)
    jobs = plan_jobs(found, places, tmp_path)
    carry_out(jobs[:1], found)
    cut = places[grid[1]]
    cut.mkdir(parents=True)
    for name in ("lock", "recipe.json", "best.safetensors"):
        (cut / name).touch()
    assert not started(cut)
    carry_out(jobs, found)
    for _ in run(found[grid[1]], tmp_path / "alone", "alone"):
        pass
    assert hashes(cut) == hashes(tmp_path / "alone")
