"""The paper's tables: the numbers that it prints, the recipes that make them, and how they are shown."""

from __future__ import annotations

import csv
import io
import json

import pytest

from robustmail.train.run import run
from robustmail.trials.fork import own_job, plan_jobs
from robustmail.trials.grid import folders, of_table, recipes
from robustmail.trials.paper import METRICS, SCALES, TABLES, table_at
from tests.trials.conftest import TINY, call

pytestmark = pytest.mark.long

MAIL = {"MAIL-AT": (10.0, -0.5), "MAIL-TRADES": (2.0, 0.0), "MAIL-MART": (2.0, 0.0)}
TINY_TABLE = ("data=digits()", *TINY[:2], "epochs=2", *TINY[5:6], "evaluate=nat", "test_size=20")


def test_the_papers_numbers_are_complete_and_in_their_ranges():
    for table in TABLES.values():
        for line in table.lines:
            assert len(line.paper) == len(table.columns)
            assert all(30 < mean < 91 and 0 < std < 1 for mean, std in line.paper)
    nat = [line.paper[0][0] for line in TABLES[2].lines]
    assert nat == [84.86, 84.00, 82.28, 87.97, 85.17, 83.22, 84.52, 81.84]
    aa = {line.name: line.paper[-1][0] for line in TABLES[3].lines}
    assert max(aa, key=aa.get) == "MAIL-TRADES"
    assert [line.paper[-1][0] for line in TABLES[1].lines] == [36.32, 44.25, 44.1, 46.0, 46.7, 47.2, 44.4, 49.52, 50.6]


@pytest.mark.parametrize("number", TABLES)
def test_at_the_papers_scale_the_rows_are_the_papers_recipes(number):
    model = "cifar_wrn32_10" if number == 3 else "cifar_resnet18"
    for cell, recipe in recipes(of_table(TABLES[number], SCALES["paper"], (0,))).items():
        assert (recipe.model, recipe.epochs, recipe.batch, recipe.test_size) == (model, 100, 128, None)
        assert recipe.burn_in == (74 if recipe.weighter else 0)
        assert recipe.margin is None or "PM_nat" not in cell.row or recipe.margin.__name__ == "pm_nat"
        for name, (slope, bias) in MAIL.items():
            if cell.row.startswith(name):
                assert (recipe.weighter.slope, recipe.weighter.bias) == (slope, bias)
        assert {METRICS[column] for column in TABLES[number].columns} <= set(recipe.evaluate)


def test_the_small_scale_keeps_methods_and_proportions_and_shares_burn_ins(tmp_path):
    grid = dict.fromkeys(cell for n in (1, 2) for cell in of_table(TABLES[n], SCALES["mini"], (0, 1, 2)))
    assert len(grid) == 14 * 3  # 17 lines in two tables, of which three are in both
    found = recipes(grid)
    for recipe in found.values():
        assert (recipe.epochs, recipe.optimizer.lr.change_points()) == (12, (0, 9, 11))
        assert recipe.burn_in == (9 if recipe.weighter else 0)
        assert recipe.at(recipe.epochs - 1).attack.steps == 10
        assert recipe.budget == 8 / 255
    jobs = plan_jobs(found, folders(grid, tmp_path), tmp_path)
    trunks = {job.cell.row: (job.until, job.cells) for job in jobs if job.until}
    assert trunks == {"GAIRAT": (9, 4), "GAIR-MART": (9, 3), "GAIR-TRADES": (9, 4)}


def test_the_middle_scale_has_the_columns_that_it_measures_and_rows_that_the_paper_lacks(tmp_path):
    scale = SCALES["midi"]
    table = table_at(2, scale)
    assert table.columns == ("NAT", "PGD", "CW", "AA")
    assert [mean for mean, _ in table.lines[0].paper] == [84.86, 48.91, 51.61, 44.90]
    assert [line.name for line in table.lines if not line.paper] == ["VIR-AT", "WEAT", "ARoW"]
    found = recipes(of_table(table, scale, (0,)))
    for recipe in found.values():
        assert (recipe.epochs, recipe.optimizer.lr.change_points()) == (20, (0, 15, 18))
        assert recipe.burn_in in (15, 0)
        assert recipe.evaluate == tuple(scale.metrics.values())
        assert recipe.select == "last", "the best epoch may lie before the first weight"
        assert recipe.at(recipe.epochs - 1).attack.steps == 10
    jobs = plan_jobs(found, folders(found, tmp_path), tmp_path)
    assert {job.cell.row: (job.until, job.cells) for job in jobs if job.until} == {"AT": (15, 3), "TRADES": (15, 2)}
    text = " ".join(call(tmp_path, "table", "2", "--scale", "midi").stdout.split())
    assert "Column AA: apgd-t here" in text
    assert "MISSING: 33 of 33 runs" in text
    lines = call(tmp_path, "table", "2", "--scale", "midi", "--format", "csv").stdout.splitlines()
    assert len(lines) == 1 + 11 * 4
    assert lines[-1] == "ARoW,ARoW,AA,apgd-t,1000,0,,,,,,,,,missing"


def test_what_two_tables_share_is_trained_once_whichever_is_made_first(tmp_path):
    grids = {n: of_table(TABLES[n], SCALES["mini"], (0,)) for n in (1, 2)}
    every = dict.fromkeys(grids[1] + grids[2])
    jobs = plan_jobs(recipes(every), folders(every, tmp_path), tmp_path)
    first, second = ({job.folder: job.cells for job in own_job(jobs, grids[n]) if job.until} for n in (1, 2))
    assert {folder.parent.name: cells for folder, cells in first.items()} == {
        "GAIRAT-9": 3, "GAIR-MART-9": 3, "GAIR-TRADES-9": 3,
    }  # fmt: skip
    assert {folder.parent.name: cells for folder, cells in second.items()} == {"GAIRAT-9": 3, "GAIR-TRADES-9": 2}
    assert set(second) < set(first)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two rows of Table 1 at two seeds, tiny, out of nine: the rest is missing."""
    folder = tmp_path_factory.mktemp("table")
    rows = [cell for cell in of_table(TABLES[1], SCALES["mini"], (0, 1), TINY_TABLE) if cell.row.startswith("MAIL-AT")]
    for cell in rows:
        place = folder / "tables" / "mini" / "runs" / cell.row.replace(" ", "-") / str(cell.seed)
        for _ in run(cell.load(), place, cell.name):
            pass
    return folder


WORDS = ("table", "1", "--scale", "mini", "--seeds", "0:2", *TINY_TABLE)


def test_a_table_shows_what_is_there_and_does_not_invent_the_rest(made):
    done = call(made, *WORDS, "--format", "csv")
    assert (done.returncode, done.stderr) == (0, "")
    cells = {(row["method"], row["metric"]): row for row in csv.DictReader(io.StringIO(done.stdout))}
    assert len(cells) == 9 * 3
    there = cells["AT, PM_adv", "NAT"]
    runs = [made / "tables" / "mini" / "runs" / "MAIL-AT" / str(seed) / "results.json" for seed in (0, 1)]
    values = [100 * json.loads(run.read_text())["attacks"][0]["accuracy"] for run in runs]
    assert float(there["mean"]) == pytest.approx(sum(values) / 2, abs=1e-3)
    assert float(there["difference"]) == pytest.approx(sum(values) / 2 - 83.15, abs=1e-3)
    assert (there["n"], there["seeds"], there["paper_mean"], there["paper_std"]) == ("2", "0 1", "83.15", "0.46")
    assert there["images"] == "20"
    for absent in (cells["AT, PM_adv", "AA"], cells["MART, LPS", "NAT"]):
        assert (absent["n"], absent["mean"], absent["difference"], absent["verdict"]) == ("0", "", "", "missing")


@pytest.mark.parametrize("form", ["table", "markdown", "latex"])
def test_a_table_says_what_it_is_and_how_it_is_made_again(made, form):
    text = " ".join(call(made, *WORDS, "--format", form).stdout.split())
    for said in (
        "the first 20 test images", "seeds 0, 1", "MISSING: 14 of 18 runs",
        "12 epochs, but with data=digits()", "not whether the paper can be reproduced",
        "robustmail table 1 --scale mini --seeds 0:2 --out tables/mini --run", "0 of 2", "2 of 2", "44.1",
    ):  # fmt: skip
        assert said in text


def test_a_table_is_printed_without_training_or_writing(made):
    before = sorted(made.rglob("*"))
    assert call(made, *WORDS).returncode == 0
    assert sorted(made.rglob("*")) == before


def test_a_table_that_is_run_makes_what_is_missing_and_prints_nothing_else_into_a_file(tmp_path):
    few = ("epochs=1", "optimizer.lr=0.02", "evaluate=nat")
    done = call(
        tmp_path, "table", "2", "--scale", "mini", "--seeds", "1", "--run", "--format", "csv", *TINY_TABLE, *few
    )
    assert done.returncode == 0, done.stderr
    found = {(row["method"], row["metric"]): row["n"] for row in csv.DictReader(io.StringIO(done.stdout))}
    assert len(found) == 8 * 5
    assert all(n == ("1" if metric == "NAT" else "0") for (_, metric), n in found.items())
    assert "MAIL-TRADES, seed 1: done" in done.stderr
    summary = json.loads((tmp_path / "tables" / "mini" / "table-2.json").read_text())
    assert summary["complete"]
    assert summary["provenance"]["command"].startswith(
        "robustmail table 2 --scale mini --seeds 1 --out tables/mini --run"
    )
