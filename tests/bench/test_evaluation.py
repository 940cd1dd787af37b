"""What `bench --evaluation` keeps and shows while it runs; its stages are compared in tests/attacks/test_loops.py."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from robustmail.bench import evaluation
from robustmail.cli.main import app
from robustmail.records import EvaluationBenchRow
from robustmail.report.bench import evaluation_table

ROWS = [
    EvaluationBenchRow("cifar_resnet18_w16", stage, 100, ours, 2.0, 9, 9)
    for stage, ours in (("pgd20", 9.0), ("apgd-ce", 0.5), ("apgd-t", 1.5))
]


def test_a_bench_that_is_stopped_keeps_and_has_shown_the_stages_that_it_measured(tmp_path, monkeypatch):
    def stopped(*arguments, **settings):
        yield from ROWS[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "bench_evaluation", stopped)
    result = CliRunner().invoke(app, ["bench", "--evaluation", "--out", str(tmp_path / "here")])
    kept = json.loads((tmp_path / "here/bench-evaluation.json").read_text())
    assert [row["stage"] for row in kept["rows"]] == ["pgd20", "apgd-ce"]
    assert "cifar_resnet18_w16, apgd-ce: 0.50 s, reference 2.00 s, ratio 0.25" in result.output


def test_the_sum_of_autoattack_has_its_own_stages_only_and_the_table_fits_eighty_columns():
    console = Console(width=80)
    with console.capture() as shown:
        console.print(evaluation_table(ROWS))
    text = shown.get()
    assert "…" not in text
    (total,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["aa"])
    assert [float(word) for word in total[1:]] == pytest.approx([2.0, 4.0, 0.5])
