"""How growth is fitted; that each work can be done at a small size; that a grid does no more than in proportion."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from robustmail.bench.growing_work import CURVES, grid
from robustmail.bench.growth import _curve, _measure, fit
from robustmail.records import GrowthPoint
from robustmail.report.growth import growth_table, save_growth
from robustmail.trials import fork, study


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found_with_no_width(exponent: float):
    found = fit([1, 2, 4, 8], [3.0 * size**exponent for size in (1, 2, 4, 8)])
    assert found is not None
    assert (found.exponent, found.low, found.high) == pytest.approx((exponent,) * 3)


def test_the_last_decade_decides_and_not_what_a_fixed_cost_hides():
    sizes = (10, 18, 32, 56, 100, 180, 320, 560, 1000)
    squares = _curve("work", "size", [GrowthPoint(n, 1.0 + 1e-5 * n**2, n / 10) for n in sizes])
    assert squares.seconds is not None
    assert squares.seconds.exponent < 1
    assert squares.is_steep
    lines = _curve("work", "size", [GrowthPoint(n, 1e-3 * n, n**2 / 1000) for n in sizes])
    assert lines.is_steep, "its memory is"
    assert not _curve("work", "size", [GrowthPoint(n, 1.0 + n, 1.0) for n in sizes]).is_steep


@pytest.mark.parametrize("number", [0, 2, 8, 9])
def test_work_is_measured_at_its_smallest_size(number: int):
    smallest = 2 if CURVES[number].what == "grid" else CURVES[number].sizes[0]
    (point,) = _measure(number, [smallest])
    assert (point.size, point.seconds > 0, point.megabytes >= 0) == (smallest, True, True)


@pytest.mark.long
def test_it_is_written_and_drawn(tmp_path):
    curves = [_curve("work", "size", [GrowthPoint(n, float(n), n) for n in (1, 3, 10)]),
              _curve("training step", "processes", [GrowthPoint(1, 1.0, 0.0)])]  # fmt: skip
    numbers, picture = save_growth(curves, {"commit": "abc"}, tmp_path / "new")
    content = json.loads(numbers.read_text())
    assert [len(curve["points"]) for curve in content["curves"]] == [3, 1]
    assert content["provenance"] == {"commit": "abc"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(growth_table(curves).rows) == 2


def calls_of_a_grid(seeds: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How often a grid reads the results of a finished run, and works out what an epoch of a cell depends on."""
    found: list[dict[str, float]] = []
    same, read_accuracies = Mock(wraps=fork.shared_prefix), study.read_accuracies

    def read(folder: Path) -> dict[str, float] | None:
        if (accuracies := read_accuracies(folder)) is not None:
            found.append(accuracies)
        return accuracies

    with monkeypatch.context() as patch:
        patch.setattr(study, "time", SimpleNamespace(monotonic=count(1).__next__))  # saving takes a second
        patch.setattr(study, "read_accuracies", read)
        patch.setattr(fork, "shared_prefix", same)
        grid(seeds)()
    return len(found), same.call_count


def test_a_grid_of_three_times_the_runs_reads_and_compares_three_times_as_much(monkeypatch):
    (few_reads, few_compared), (reads, compared) = (calls_of_a_grid(seeds, monkeypatch) for seeds in (3, 9))
    assert compared == 3 * few_compared
    assert reads == 3 * few_reads == 9
