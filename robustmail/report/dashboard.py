"""Show records: live views on a terminal, plain lines elsewhere, and a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from robustmail.records import (
    AttackProgress,
    AttackResult,
    CellFinished,
    CellStarted,
    EpochFinished,
    Forecast,
    MemoryExceeded,
    ProgressUpdate,
    Record,
    RunFinished,
    RunStarted,
    StepFinished,
    WaitingForFolder,
)  # fmt: skip
from robustmail.report.log_lines import log_line
from robustmail.report.progress import Lines, time_left
from robustmail.report.tables import run_table
from robustmail.runtime.files import append
from robustmail.text import percent

__all__ = [
    "TrialsProgress",
    "Dashboard",
    "LogFile",
    "PlainLines",
    "EvaluationProgress",
    "choose_run_view",
    "choose_evaluation_view",
]

BLOCKS = " ▁▂▃▄▅▆▇█"
NEGATIVE, POSITIVE = "dark_orange3", "deep_sky_blue3"  # distinct for colour-blind readers
PLAIN_INTERVAL = 10.0  # seconds between lines about steps and attacks in progress
NameColumn = partial(TextColumn, markup=False)  # brackets in a name are brackets


def choose_run_view(console: Console, plain: bool) -> Dashboard | PlainLines:
    """Choose how to show a run: a live view on a terminal with colours, plain lines elsewhere."""
    live = console.is_terminal and not (plain or console.no_color or console.is_dumb_terminal)
    return Dashboard(console) if live else PlainLines(console)


def choose_evaluation_view(console: Console, plain: bool) -> EvaluationProgress | PlainLines:
    """Choose how to show an evaluation: progress bars on a terminal, plain lines elsewhere."""
    live = console.is_terminal and not (plain or console.is_dumb_terminal)
    return EvaluationProgress(console) if live else PlainLines(console)


def _progress_columns() -> list[ProgressColumn]:
    """Name, bar, how many of how many, a note, and the time left."""
    return [
        NameColumn("{task.description}"),
        BarColumn(None),
        TextColumn("{task.completed} / {task.total}"),
        NameColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]


class EvaluationProgress:
    """Shows a progress bar for the current stage, and above it a line for each finished attack."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(*_progress_columns(), console=console, expand=True, transient=True)

    def __enter__(self) -> EvaluationProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, record: Record) -> None:
        if isinstance(record, AttackProgress):
            name = record.attack if record.attack == record.stage else f"{record.attack}: {record.stage}"
            self._advance(name, record.done, record.n, f"{record.standing} stand")
        elif isinstance(record, ProgressUpdate):
            self._advance(record.what, record.done, record.n, "")
        else:
            self._bars.console.print(log_line(record), markup=False, highlight=False)

    def progress(self, what: str, done: int, n: int) -> None:
        """Show the progress of work that yields no records (a `runtime.progress.Listener`)."""
        self._advance(what, done, n, "")

    def _advance(self, name: str, done: int, n: int, note: str) -> None:
        bars = {task.description: task.id for task in self._bars.tasks}
        for task in self._bars.tasks:
            self._bars.update(task.id, visible=task.description == name)
        if name not in bars:
            bars[name] = self._bars.add_task(name, total=n, note="")
        self._bars.update(bars[name], completed=done, note=note)


class TrialsProgress:
    """Shows a grid of runs: a bar for the grid, one for the current run, and a line for each finished run.

    Without a terminal it shows no bars, but a line for each epoch and attack.
    """

    def __init__(self, console: Console, plain: bool) -> None:
        self._console, self._live = console, console.is_terminal and not (plain or console.is_dumb_terminal)
        self._bars = Progress(
            *_progress_columns(), console=console, expand=True, transient=True, disable=not self._live
        )
        self._total_bar = self._bars.add_task("runs", total=None, note="")
        self._current_bar = self._bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> TrialsProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, record: Record) -> None:
        match record:
            case CellStarted():
                self._bars.update(self._total_bar, total=record.of, note=record.name)
            case CellFinished():
                self._bars.update(self._total_bar, total=record.of, completed=record.done)
            case RunStarted():
                self._bars.reset(
                    self._current_bar, total=record.epochs * record.steps, description="training", visible=True
                )
                self._steps = record.steps
            case StepFinished():
                self._bars.update(self._current_bar, completed=record.epoch * self._steps + record.step)
            case AttackProgress():
                self._bars.update(self._current_bar, description=record.attack, total=record.n, completed=record.done)
        printed = (
            (CellFinished, MemoryExceeded, WaitingForFolder)
            if self._live
            else (CellStarted, CellFinished, MemoryExceeded, EpochFinished, AttackResult, WaitingForFolder)
        )
        if isinstance(record, printed):
            self._console.print(log_line(record), markup=False, highlight=False, soft_wrap=True)


class PlainLines:
    """Prints a line for each epoch and attack, and one every ten seconds in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._print = _Throttled(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
        self._stage, self._began, self._first = "", 0.0, 0
        self.progress = Lines(Console(stderr=True))

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, record: Record) -> None:
        self._print(record, self._time_left(record))
        if isinstance(record, RunFinished):
            self._console.print(run_table(record))

    def _time_left(self, record: Record) -> str:
        """How long the stage of an attack, or other work, will still take."""
        if not isinstance(record, (AttackProgress, ProgressUpdate)):
            return ""
        now, stage = time.monotonic(), record.stage if isinstance(record, AttackProgress) else record.what
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, record.done
        return time_left(record.done - self._first, record.n - record.done, now - self._began)


class LogFile:
    """Appends plain lines with the time to a file, once the run's folder exists."""

    def __init__(self, path: Path) -> None:
        self._write = _Throttled(self._append)
        self._path = path

    def __call__(self, record: Record) -> None:
        if self._path.parent.is_dir() and not (isinstance(record, RunFinished) and record.before):
            self._write(record)

    def _append(self, text: str) -> None:
        timestamp = time.strftime("%Y-%m-%d %H:%M:%S")
        append(self._path, "".join(f"{timestamp}  {part}\n" for part in text.splitlines()))


class _Throttled:
    """Passes on the line of every record, but of steps and attacks in progress only one in PLAIN_INTERVAL."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._next = write, 0.0

    def __call__(self, record: Record, note: str = "") -> None:
        if isinstance(record, (StepFinished, AttackProgress, ProgressUpdate)):
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + PLAIN_INTERVAL
        self._write(log_line(record) + note)


class Dashboard:
    """Shows a run: progress bars, losses, accuracies, histogram of margins, weights; four frames a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (NameColumn("{task.description:<7}"), BarColumn(None), NameColumn("{task.fields[note]}"))
        self._bars = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console, expand=True)
        self._run: RunStarted | None = None
        self._forecast: Forecast | None = None
        self._step: StepFinished | None = None
        self._nat: float | None = None
        self._speeds: deque[float] = deque(maxlen=20)
        self._epochs: deque[EpochFinished] = deque(maxlen=5)
        self._attacks: list[str] = []
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._live.stop()

    def __call__(self, record: Record) -> None:
        match record:
            case RunStarted():
                self._begin(record)
            case Forecast():
                self._forecast = record
            case StepFinished():
                self._advance(record)
            case MemoryExceeded():
                self._live.console.print(log_line(record), markup=False, highlight=False)
            case EpochFinished():
                self._epochs.append(record)
            case AttackProgress():
                self._forecast = None
                self._attack(record)
            case AttackResult():
                self._attacks.append(log_line(record))
            case RunFinished():
                self._live.stop()
                self._console.print(log_line(record), markup=False, highlight=False)
                self._console.print(run_table(record))

    def _begin(self, record: RunStarted) -> None:
        self._run = record
        done = record.epoch * record.steps + record.step
        self._total_bar = self._bars.add_task("run", total=record.epochs * record.steps, completed=done, note="")
        self._current_bar = self._bars.add_task("epoch", total=record.steps, completed=record.step, note="")
        self._live.start()

    def _advance(self, record: StepFinished) -> None:
        assert self._run is not None
        self._step = record
        self._nat = record.nat if record.nat is not None else self._nat
        self._speeds.append(record.images / record.seconds)
        epoch, steps = record.epoch, self._run.steps
        speed = sum(self._speeds) / len(self._speeds)
        self._bars.update(
            self._total_bar, completed=epoch * steps + record.step, note=f"{epoch + 1}/{self._run.epochs}"
        )
        self._bars.update(self._current_bar, completed=record.step, note=f"{record.step}/{steps} {speed:.0f} images/s")

    def _attack(self, record: AttackProgress) -> None:
        name = record.attack if record.attack == record.stage else f"{record.attack}: {record.stage}"
        for task in self._bars.tasks:
            self._bars.update(task.id, visible=task.description == name)
        bars = {task.description: task.id for task in self._bars.tasks}
        if name not in bars:
            bars[name] = self._bars.add_task(name, total=record.n, note="")
        note = f"{record.standing} of {record.n} stand"
        self._bars.update(bars[name], completed=record.done, note=note)

    def _render(self) -> RenderableType:
        if self._run is None:
            return Text("")
        parts: list[RenderableType] = [self._header(), self._bars]
        if self._step is not None and not self._attacks:
            panels = Table.grid(expand=True)
            panels.add_column(ratio=1)
            panels.add_column(ratio=1)
            panels.add_row(self._training(self._step), self._margins(self._step))
            parts += [panels, self._weights(self._step)]
        if self._epochs:
            parts.append(self._history())
            parts += [Text(f"note: {self._epochs[-1].note}")] if self._epochs[-1].note else []
        return Group(*parts, *(Text(text) for text in self._attacks))

    def _header(self) -> RenderableType:
        run = self._run
        assert run is not None
        line = log_line(run).removeprefix(f"{run.name}: ")
        start = line.index(run.formula)
        text = Text(line)
        text.stylize("bold", start, start + len(run.formula))
        if self._forecast is not None:
            text.append(f"\n{log_line(self._forecast)}", style="italic")
        return Panel(text, title=Text(run.name), title_align="left")

    def _training(self, step: StepFinished) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        nat = "–" if self._nat is None else percent(self._nat)
        for name, value in (
            ("loss", f"{step.loss:.4f}"),
            ("  weighted part", f"{step.weighted:.4f}"), ("  plain part", f"{step.plain:.4f}"),
            ("natural accuracy", nat), ("adversarial accuracy", percent(step.adv)), ("learning rate", f"{step.lr:g}"),
        ):  # fmt: skip
            table.add_row(name, Text(value, justify="right"))
        return Panel(table, title="this step", title_align="left", height=8)

    def _margins(self, step: StepFinished) -> RenderableType:
        low, high = step.span
        bar_width, height = 3 if self._console.width >= 120 else 2, 5
        width = bar_width * len(step.histogram)
        top = max(step.histogram) or 1
        centres = [low + (high - low) * (i + 0.5) / len(step.histogram) for i in range(len(step.histogram))]
        text = Text()
        for row in range(height - 1, -1, -1):
            for count, centre in zip(step.histogram, centres, strict=True):
                eighths = min(8, max(0, round(count / top * height * 8) - row * 8))
                text.append(BLOCKS[eighths] * bar_width, style=NEGATIVE if centre < 0 else POSITIVE)
            text.append("\n")
        scale = f"{low:g}".ljust(width // 2 - 1) + f"{(low + high) / 2:g}"
        text.append(scale.ljust(width - len(f"{high:g}")) + f"{high:g}", style="dim")
        return Panel(text, title=Text(f"margin: {step.margin}"), title_align="left", height=8)

    def _weights(self, step: StepFinished) -> RenderableType:
        run = self._run
        assert run is not None
        if step.weights is None:
            is_burn_in = step.epoch < run.burn_in
            text = Text(f"BURN-IN until epoch {run.burn_in}: " * is_burn_in + "every example has weight one")
            text.stylize("reverse" if is_burn_in else "")
            return Panel(text, title="weights", title_align="left")
        stats = step.weights
        means = {name: "–" if w is None else f"{w:.2f}" for name, w in (("right", stats.right), ("wrong", stats.wrong))}
        text = Text(f"effective sample size {percent(stats.ess)} of the batch")
        text.append(f"\nheaviest 3 % of the examples carry {percent(stats.top)} of the weighted loss")
        text.append(f"\nmean weight {means['right']} where still right, {means['wrong']} where fooled")
        if abs(step.mean_weight - 1) > 0.005:
            text.append(f"\nnot normalised: mean weight {step.mean_weight:.3g}, and about so many times the loss")
        return Panel(text, title="weights", title_align="left")

    def _history(self) -> RenderableType:
        table = Table(box=None, expand=True, header_style="dim")
        for name in ("epoch", "lr", "loss", "train nat", "train adv", "val nat", "val robust", ""):
            table.add_column(name, justify="right")
        for epoch in self._epochs:
            row = epoch.row
            nat = percent(row["train_nat"]) if row["train_nat"] != "" else "–"
            table.add_row(
                str(row["epoch"] + 1), f"{row['lr']:g}", f"{row['train_loss']:.4f}", nat, percent(row["train_adv"]),
                percent(row["val_nat"]), percent(row["val_rob"]), "best" if epoch.best else "",
            )  # fmt: skip
        return table
