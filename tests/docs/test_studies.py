"""The study that is a script counts what it says it counts."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest

from robustmail.evaluation.evaluator import image_batch
from tests.docs.pages import ROOT

pytestmark = pytest.mark.long


@pytest.fixture
def study() -> SimpleNamespace:
    found = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "studies" / "lm_pgd.py")))
    found.compare.__globals__["STEPS"] = 3
    return found


def test_nobody_breaks_an_image_in_a_ball_without_extent_and_more_passes_break_no_fewer(
    study, robust_cnn, digit_images, capsys
):
    x, y = image_batch(robust_cnn, digit_images.part, slice(12))
    right = int((robust_cnn(x).argmax(1) == y).sum())
    point, ball = (study.compare(robust_cnn, x, y, eps) for eps in (0.0, 0.15))
    assert point["right"] == point["stand_under_pgd_50"] == ball["right"] == right > 0
    assert not any(count for row in point["rows"].values() for count in row.values())
    assert len(ball["rows"]) == 2 + len(study.READINGS)
    for row in ball["rows"].values():
        assert row.get("more_100", 0) <= row["more_500"]
        assert row.get("fewer_100", 0) >= row.get("fewer_500", 0)
    assert capsys.readouterr().out.count("momentum") == 2 * len(study.READINGS)
