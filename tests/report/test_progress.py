"""Long work says how far it is and how long it will take; short work says nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from robustmail.records import AttackProgress
from robustmail.report import dashboard, progress
from robustmail.report.dashboard import PlainLines
from robustmail.runtime.progress import listening
from robustmail.runtime.progress import progress as say


def test_a_line_comes_after_5_seconds_and_then_ever_more_rarely(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 4.0, 6.0, 9.0, 13.0, 19.0, 27.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    text = io.StringIO()
    with listening(progress.Lines(Console(file=text, width=80))):
        for done in range(0, 1792, 256):
            say("images compared", done, 2000)
    assert text.getvalue().splitlines() == [
        "images compared: 512 of 2,000, about 17 s left",
        "images compared: 1,024 of 2,000, about 12 s left",
        "images compared: 1,536 of 2,000, about 8 s left",
    ]
    say("nobody listens", 1, 2)


def test_work_that_is_done_within_5_seconds_says_nothing(capsys: pytest.CaptureFixture[str]):
    with progress.shown_progress(plain=True):
        for done in range(5):
            say("images", done, 4)
    assert capsys.readouterr() == ("", "")


def test_a_plain_line_about_an_attack_has_the_time_left(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 0.0, 0.0, 60.0, 60.0, 60.0])
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: next(now))
    text = io.StringIO()
    with PlainLines(Console(file=text, width=80)) as show:
        show(AttackProgress("aa", "fab-t", 100, 400, 90))
        show(AttackProgress("aa", "fab-t", 200, 400, 170))
    assert text.getvalue().splitlines() == [
        "aa (fab-t): 100 of 400 tried, 90 stand",
        "aa (fab-t): 200 of 400 tried, 170 stand, about 2 min left",
    ]
