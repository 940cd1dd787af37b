"""Hand-made records, shown live, as plain lines, in a log, and as curves."""

from __future__ import annotations

import csv
import io
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from robustmail import digits, load_recipe
from robustmail.config.overrides import apply_overrides
from robustmail.records import (
    AttackProgress,
    AttackResult,
    EpochFinished,
    Forecast,
    Record,
    RunFinished,
    RunStarted,
    StepFinished,
    WeightStats,
)
from robustmail.report import dashboard
from robustmail.report.dashboard import Dashboard, LogFile, PlainLines, choose_run_view
from robustmail.report.figures import draw_curves
from robustmail.report.log_lines import log_line
from robustmail.text import duration

HISTOGRAM = (0,) * 3 + (10,) + (0,) * 8 + (5,) + (0,) * 5
SIZES = pytest.mark.parametrize("width", [80, 140])
TERMINAL = pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def begun(**changes: Any) -> RunStarted:
    facts = {
        "name": "mail_trades", "formula": load_recipe("mail_trades").formula, "model": "cifar_resnet18",
        "parameters": 11_173_962, "data": "cifar10('a/rather/long/path/to/the/folder/where/all/the/data/sets/live')",
        "sizes": (49_000, 1_000, 10_000), "device": "cuda (NVIDIA Something Rather Long)", "epochs": 100,
        "steps": 383, "burn_in": 74,
    }  # fmt: skip
    return RunStarted(**facts | changes)


def step(epoch: int = 80, number: int = 17, **changes: Any) -> StepFinished:
    stats = WeightStats(ess=0.731, top=0.125, right=0.8123, wrong=1.14278)
    facts = {
        "epoch": epoch, "step": number, "images": 128, "lr": 0.001, "loss": 1.23456, "weighted": 0.7, "plain": 0.53,
        "adv": 0.4321, "nat": 0.877, "margin": "pm_adv", "histogram": HISTOGRAM, "span": (-1.0, 1.0),
        "weights": stats, "seconds": 0.5,
    }  # fmt: skip
    return StepFinished(**facts | changes)


def epoch_done(epoch: int = 80, best: bool = True, **changes: Any) -> EpochFinished:
    row = {
        "epoch": epoch, "lr": 0.001, "weights": "on", "train_loss": 1.5, "train_weighted": 0.9, "train_plain": 0.6,
        "train_nat": 0.81, "train_adv": 0.52, "train_ess": 0.7, "train_top": 0.1, "train_right": 0.8,
        "train_wrong": 1.3, "val_nat": 0.83, "val_rob": 0.494,
    }  # fmt: skip
    return EpochFinished(row | changes, best)


NAT = AttackResult("nat", 8431, 10_000, 0.8431, 0.8358, 0.8501, 3.21)
AA = AttackResult("aa", 4512, 10_000, 0.4512, 0.4415, 0.461, 12_345.6, {"apgd-ce": "APGD(...)"})
FINISHED = RunFinished("runs/mail_trades/1", (NAT, AA), "best.safetensors", 91)
WHOLE_RUN = [
    begun(), step(0, 1, weights=None), Forecast(40_000.0, 9_000.0, 0.512, True), step(0, 2, weights=None, nat=None),
    epoch_done(0, weights="off", train_nat=""), *(epoch_done(i) for i in range(70, 80)), step(), epoch_done(),
    AttackProgress("pgd100", "pgd100", 250, 8431, 7000), NAT, AttackProgress("aa", "apgd-ce", 250, 8431, 4800),
    AttackProgress("aa", "apgd-t", 4512, 4512, 4512), AA, FINISHED,
]  # fmt: skip


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def console(width: int = 80, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, height=60, color_system="256" if terminal else None
    )


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def shown(records: Iterable[Record], width: int = 80, terminal: bool = False) -> str:
    """What the live view shows of some records; on a pipe only its last frame."""
    to = console(width, terminal)
    with Dashboard(to) as show:
        for record in records:
            show(record)
    return ESCAPE.sub("", written(to))


@SIZES
@TERMINAL
def test_no_line_of_a_whole_run_is_wider_than_the_console(width: int, terminal: bool) -> None:
    records = WHOLE_RUN if terminal else WHOLE_RUN[:-1]  # rich ends the last frame on a pipe without a new line
    lines = re.split(r"[\r\n]", shown(records, width, terminal))
    assert max(map(cell_len, lines)) <= width
    assert any(cell_len(text) == width for text in lines)  # it does use the room


@SIZES
def test_the_header_says_what_is_trained_on_what(width: int) -> None:
    text = shown([begun(), Forecast(40_000.0, 9_000.0, 0.512, True)], width)
    flat = " ".join(text.replace("│", " ").split())
    for fragment in (
        "mail_trades", "loss = mean( w * 5 KL(nat || adv) + CE(nat) )", "cifar_resnet18 (11,173,962 parameters)",
        "49,000 images to train on, 1,000 to validate, 10,000 to test", "100 epochs of 383 steps",
        "forecast: 11 h 7 min of training left (0.51 s a step)",
        "that is long on a CPU",
    ):  # fmt: skip
        assert fragment in flat


@SIZES
def test_the_header_says_where_a_run_goes_on_and_what_there_is_to_note(width: int) -> None:
    text = " ".join(shown([begun(epoch=3, step=7, note="begun with 4 threads")], width).replace("│", " ").split())
    assert "going on at epoch 4, step 8" in text
    assert "begun with 4 threads" in text


@SIZES
def test_a_step_shows_losses_accuracies_and_how_far_the_run_is(width: int) -> None:
    text = shown([begun(), step(nat=0.877), step(number=18, nat=None)], width)
    for fragment in ("1.2346", "0.7000", "0.5300", "87.7 %", "43.2 %", "0.001", "81/100", "18/383", "256 images/s"):
        assert fragment in text


@SIZES
def test_the_burn_in_is_marked_until_the_weights_are_on(width: int) -> None:
    off, on = (
        shown([begun(), step(epoch, weights=weights)], width) for epoch, weights in ((73, None), (80, step().weights))
    )
    assert "BURN-IN until epoch 74: every example has weight one" in off
    assert "effective sample size" not in off
    assert "BURN-IN" not in on
    assert "effective sample size 73.1 % of the batch" in on
    assert "heaviest 3 % of the examples carry 12.5 % of the weighted loss" in on
    assert "mean weight 0.81 where still right, 1.14 where fooled" in on


def test_a_recipe_without_weights_has_no_burn_in() -> None:
    text = shown([begun(burn_in=0), step(0, weights=None)])
    assert "every example has weight one" in text
    assert "BURN-IN" not in text


def test_a_batch_that_was_all_fooled_has_no_mean_weight_of_the_right_ones() -> None:
    text = shown([begun(), step(weights=WeightStats(1.0, 0.03, None, 1.0))])
    assert "mean weight – where still right, 1.00 where fooled" in text


@pytest.mark.parametrize(("width", "wide"), [(80, 2), (140, 3)])
def test_the_histogram_has_a_bar_for_each_bin_as_high_as_its_share(width: int, wide: int) -> None:
    lines = shown([begun(), step()], width).splitlines()
    top = next(i for i, text in enumerate(lines) if "margin: pm_adv" in text)
    rows = [text[width // 2 + 2 : -2] for text in lines[top + 1 : top + 7]]
    for row, (third, twelfth) in zip(rows, ["█ ", "█ ", "█▄", "██", "██"], strict=False):
        expected = [" "] * 3 + [third] + [" "] * 8 + [twelfth] + [" "] * 5
        assert row[: 18 * wide] == "".join(mark * wide for mark in expected)
    assert rows[5].split() == ["-1", "0", "1"]
    assert rows[5].index("0") == 9 * wide - 1  # zero is the edge in the middle


def test_margins_below_zero_have_another_colour_than_those_above() -> None:
    to = console(terminal=True)
    with Dashboard(to) as show:
        show(begun())
        show(step())
    bars = [found for found in re.findall(r"\x1b\[([0-9;]*)m([^\x1b]*)", written(to)) if "█" in found[1]]
    assert len({style for style, _ in bars}) == 2


@SIZES
def test_the_last_epochs_are_listed_and_the_best_is_marked(width: int) -> None:
    epochs = [epoch_done(i, best=i == 79) for i in range(74, 81)]
    text = shown([begun(), step(), *epochs, epoch_done(81, best=False, train_nat="")], width)
    rows = [row.split() for row in text.splitlines() if "49.4 %" in row]
    assert [row[0] for row in rows] == ["78", "79", "80", "81", "82"]
    assert [row[0] for row in rows if row[-1] == "best"] == ["80"]
    assert "–" in rows[-1]


@SIZES
@TERMINAL
def test_the_results_have_accuracy_interval_and_n_for_every_attack(width: int, terminal: bool) -> None:
    text = shown(WHOLE_RUN, width, terminal)
    assert "test set, best.safetensors of epoch 92" in text
    rows = {row[0]: " ".join(row) for line in text.splitlines() if (row := line.split())[:1] in (["nat"], ["aa"])}
    assert "84.3 % 83.6 % – 85.0 % 8431 / 10000 3.2" in rows["nat"]
    assert "45.1 % 44.1 % – 46.1 % 4512 / 10000 12345.6" in rows["aa"]
    assert "runs/mail_trades/1: finished" in text


def test_an_evaluation_shows_how_many_stand_under_which_stage() -> None:
    text = shown([begun(epoch=100), NAT, AttackProgress("aa", "apgd-t", 500, 4700, 4611)])
    assert "aa: apgd-t" in text
    assert "4611 of 4700 stand" in text
    assert "nat: 84.3 % [83.6 %, 85.0 %], 8431 of 10000, 3.2 s" in text


@pytest.mark.parametrize("view", [Dashboard, PlainLines])
def test_a_run_that_had_been_finished_before_shows_its_results_again(view: type[Dashboard | PlainLines]) -> None:
    to = console(terminal=False)
    with view(to) as show:
        show(RunFinished("runs/x/1", (NAT,), "last.safetensors", 0, before=True))
    assert "runs/x/1: had been finished before; --fresh begins anew" in written(to)
    assert "8431 / 10000" in written(to)


def test_a_view_that_is_left_gives_the_terminal_back() -> None:
    to = console(terminal=True)
    with Dashboard(to) as show:
        show(begun())
    assert written(to).rindex("\x1b[?25h") > written(to).rindex("\x1b[?25l")  # the cursor is back


def plain(records: Iterable[Record], to: Console) -> str:
    with PlainLines(to) as show:
        for record in records:
            show(record)
    return written(to)


@SIZES
def test_plain_lines_have_no_escape_codes_and_are_not_broken(width: int) -> None:
    text = plain(WHOLE_RUN, console(width, terminal=False))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "epoch 81 done: loss 1.5000, validation natural 83.0 %, robust 49.4 %, best so far\n" in text
    assert f"cifar_resnet18 (11,173,962 parameters) on {begun().data}, {begun().device}\n" in text  # one long line
    assert "8431 / 10000" in text


def test_plain_lines_on_a_terminal_have_no_escape_codes_either() -> None:
    assert "\x1b" not in plain(WHOLE_RUN, console(terminal=True))


@pytest.mark.parametrize(("every", "lines"), [(0.0, 5), (1e9, 1)], ids=["often", "seldom"])
def test_plain_lines_of_steps_come_once_in_a_while(monkeypatch: pytest.MonkeyPatch, every: float, lines: int) -> None:
    monkeypatch.setattr(dashboard, "PLAIN_INTERVAL", every)
    text = plain([begun(), *(step(number=i) for i in range(5)), epoch_done()], console(terminal=False))
    assert text.count("epoch 81 step") == lines
    assert text.count("epoch 81 done") == 1


def test_the_log_has_the_time_of_day_before_every_line_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    for records in ([begun(), epoch_done(0)], [begun(epoch=1), FINISHED]):
        log = LogFile(path)
        for record in records:
            log(record)
    text = path.read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in text.splitlines())
    said = [line[21:].split(":")[0] for line in text.splitlines()]
    begins = ["mail_trades", "loss = mean( w * 5 KL(nat || adv) + CE(nat) )"]
    assert [word for word in said if word.startswith(("mail", "loss", "epoch", "runs"))] == [
        *begins, "epoch 1 done", *begins, "runs/mail_trades/1",
    ]  # fmt: skip
    assert text.count("going on at epoch 2, step 1") == 1


def test_nothing_is_logged_before_there_is_a_folder_or_after_a_run_is_finished(tmp_path: Path) -> None:
    LogFile(tmp_path / "no" / "log.txt")(begun())
    LogFile(tmp_path / "log.txt")(RunFinished("runs/x/1", (NAT,), "last.safetensors", 0, before=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("terminal", "plainly", "environment", "view"),
    [
        pytest.param(True, False, {}, Dashboard, id="terminal"),
        pytest.param(False, False, {}, PlainLines, id="pipe"),
        pytest.param(True, True, {}, PlainLines, id="--plain"),
        pytest.param(True, False, {"NO_COLOR": "1"}, PlainLines, id="NO_COLOR"),
        pytest.param(True, False, {"TERM": "dumb"}, PlainLines, id="dumb terminal"),
    ],
)
def test_the_live_view_is_for_terminals_with_colours(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, plainly: bool, environment: dict[str, str], view: type
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert type(choose_run_view(console(terminal=terminal), plainly)) is view


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"), (360_000, "100 h 0 min")],
)
def test_durations_are_said_in_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_long_forecast_on_a_cpu_offers_overrides_that_work() -> None:
    said = log_line(Forecast(40_000.0, 9_000.0, 0.5, on_cpu=True))
    offered = [shlex.split(text)[0] for text in re.findall(r"\w+=(?:'[^']*'|[\w,]+)", said)]
    assert len(offered) == 6
    changed = apply_overrides(load_recipe("at"), offered)
    assert (changed.model, changed.epochs, changed.evaluate) == ("small_cnn", 10, ("nat", "pgd20"))
    assert changed.data == digits()
    assert "To shorten it" not in log_line(Forecast(40_000.0, 9_000.0, 0.5, on_cpu=False))
    assert "To shorten it" not in log_line(Forecast(4_000.0, 900.0, 0.5, on_cpu=True))


def metrics(folder: Path, *rows: dict[str, Any]) -> Path:
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, epoch_done().row)
        writer.writeheader()
        writer.writerows(rows)
    return folder


WITHOUT = {"weights": "off", "train_ess": "", "train_top": "", "train_right": "", "train_wrong": ""}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([epoch_done(i, val_rob=i / 10).row for i in range(4)], id="weights"),
        pytest.param([epoch_done(i, **WITHOUT if i < 2 else {}).row for i in range(4)], id="burn-in, then weights"),
        pytest.param([epoch_done(i, **WITHOUT).row for i in range(4)], id="no weights"),
        pytest.param([epoch_done(0, **WITHOUT, train_nat="").row], id="one epoch, natural images not looked at"),
    ],
)
def test_the_curves_are_a_picture_made_of_the_metrics_alone(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = draw_curves(metrics(tmp_path, *rows), "mail_trades")
    assert path == tmp_path / "curves.png"
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1500, 510))
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


@pytest.mark.parametrize("content", ["", ",".join(epoch_done().row) + "\n"], ids=["empty", "header alone"])
def test_without_an_epoch_there_are_no_curves(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    assert draw_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()


def test_weights_that_are_not_normalised_say_by_how_much_the_loss_is_smaller():
    small = step(weights=WeightStats(ess=0.5, top=0.1, right=0.1, wrong=0.5))
    assert "not normalised: mean weight 0.327" in shown([begun(), small])
    assert ", mean weight 0.327, " in log_line(small)
    assert "mean weight" not in log_line(step())
