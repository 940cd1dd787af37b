"""The bench gives everybody the same work and a turn in each repeat; how fast they are is not a matter for tests."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch

from robustmail import build
from robustmail.bench.training import _library_attack, _plain_pgd, _rows, bench
from robustmail.errors import RunError
from robustmail.models.precision import flops
from robustmail.records import PLAIN
from robustmail.report.bench import bench_table, save_bench


@pytest.fixture(scope="module")
def report():
    turns = []
    made = bench("cifar_resnet18_w8", batch=4, repeats=2, steps=1, targeted_steps=1, progress=turns.append)
    assert len(turns) == 3 * len(made.rows)
    return made


def test_every_task_has_the_plain_loop_and_ratios_are_taken_within_a_repeat(report):
    tasks = dict.fromkeys(row.task for row in report.rows)
    assert list(tasks) == ["MAIL-AT step", "MAIL-TRADES step", "PGD-1", "APGD-T, 1 steps"]
    for task in tasks:
        rows = {row.who: row for row in report.rows if row.task == task}
        assert rows[PLAIN].ratio == rows[PLAIN].low == rows[PLAIN].high == 1
        for row in rows.values():
            ratios = [a / b for a, b in zip(rows[PLAIN].seconds, row.seconds, strict=True)]
            assert (row.low, row.ratio, row.high) == (min(ratios), median(ratios), max(ratios))


def test_useful_work_is_counted_from_the_model(report):
    row = next(row for row in report.rows if row.task == "MAIL-AT step" and row.who == "robustmail")
    work = flops(build("cifar_resnet18_w8", 10, 3), torch.rand(1, 3, 32, 32))
    assert report.settings["forward_flops"] == work
    assert row.gflops == pytest.approx((2 * 1 + 3) * work * 4 / median(row.seconds) / 1e9)
    assert row.share == pytest.approx(row.gflops / max(report.machine.values()))


@pytest.mark.long
def test_it_is_written_and_drawn(report, tmp_path):
    numbers, picture = save_bench(report, tmp_path / "new")
    content = json.loads(numbers.read_text())
    assert len(content["rows"]) == len(report.rows) == len(bench_table(report).rows) - 4, "and a line for each task"
    assert set(content["provenance"]) >= {"versions", "commit", "hardware"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        save_bench(report, tmp_path / "file")


def test_the_plain_loop_is_torchattacks_pgd_but_for_its_start(small, batch):
    torch.manual_seed(0)
    x, y = batch
    ours = _plain_pgd(small.eval(), x, y, 3)
    assert (ours - x).abs().max() <= 8 / 255 + 1e-6
    theirs = _library_attack("PGD")(small, x, y, 3)
    loss = torch.nn.functional.cross_entropy
    assert loss(small(ours), y).item() == pytest.approx(loss(small(theirs), y).item(), rel=0.1)


def test_a_task_without_the_plain_loop_is_a_mistake():
    from robustmail.bench.training import Contender

    with pytest.raises(ValueError, match="unpack"):
        _rows({Contender("task", "alone", lambda: None, 1): [1.0]}, 1, 1, 1.0)
