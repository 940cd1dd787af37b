"""Records as plain lines, for pipes, log files and terminals without colours."""

from __future__ import annotations

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
)
from robustmail.text import duration, percent, plural

__all__ = ["log_line"]

LONG_RUN = 3 * 3600.0  # seconds; a longer run on a CPU gets a warning


def log_line(record: Record) -> str:
    """Format a record as one line or a few."""
    match record:
        case RunStarted():
            return _run_started(record)
        case Forecast():
            return _forecast(record)
        case StepFinished():
            nat = "" if record.nat is None else f", natural {percent(record.nat)}"
            weights = f", ESS {percent(record.weights.ess)}" if record.weights else ""
            weights += f", mean weight {record.mean_weight:.3g}" if abs(record.mean_weight - 1) > 0.005 else ""
            speed = record.images / record.seconds
            return (
                f"epoch {record.epoch + 1} step {record.step}: loss {record.loss:.4f}, "
                f"adversarial {percent(record.adv)}{nat}{weights}, {speed:.0f} images/s"
            )
        case MemoryExceeded():
            images = plural(record.images, "image")
            return (
                f"epoch {record.epoch + 1} step {record.step + 1}: out of memory with {images} at once, "
                f"tried again with accumulate={record.accumulate}\nnote: {record.note}"
            )
        case EpochFinished():
            row = record.row
            return (
                f"epoch {row['epoch'] + 1} done: loss {row['train_loss']:.4f}, validation natural "
                f"{percent(row['val_nat'])}, robust {percent(row['val_rob'])}{', best so far' if record.best else ''}"
                + (f"\nnote: {record.note}" if record.note else "")
            )
        case AttackProgress():
            return f"{record.attack} ({record.stage}): {record.done} of {record.n} tried, {record.standing} stand"
        case ProgressUpdate():
            return f"{record.what}: {record.done} of {record.n}"
        case AttackResult():
            interval = f"[{percent(record.low)}, {percent(record.high)}]"
            return (
                f"{record.name}: {percent(record.accuracy)} {interval}, "
                f"{record.correct} of {record.n}, {record.seconds:.1f} s"
            )
        case RunFinished():
            state = " had been finished before; --fresh begins anew" if record.before else " finished"
            line = f"{record.folder}:{state}" + (f"\nnote: {record.note}" if record.note else "")
            if record.epoch >= record.burn_in:
                return line
            burn_in = plural(record.burn_in, "epoch")
            return (
                f"{line}\nnote: the selected epoch, {record.epoch + 1}, lies in the burn-in of {burn_in}: "
                "no example had a weight yet"
            )
        case WaitingForFolder():
            return f"{record.folder}: another process is working in it; waiting"
        case CellStarted():
            return f"{record.number} of {record.of}: {record.name}"
        case CellFinished():
            return f"{record.name}: FAILED: {record.error}" if record.error else f"{record.name}: done"


def _run_started(record: RunStarted) -> str:
    train, validation, test = record.sizes
    position = f", going on at epoch {record.epoch + 1}, step {record.step + 1}" if record.epoch or record.step else ""
    position = ", trained already" if record.epoch == record.epochs else position
    frozen = f", {record.frozen:,} of them frozen" if record.frozen else ""
    return (
        f"{record.name}: {record.model} ({record.parameters:,} parameters{frozen}) on {record.data}, "
        f"{record.device}{position}\n"
        f"{record.formula}\n"
        f"{train:,} images to train on, {validation:,} to validate, {test:,} to test; "
        f"{record.epochs} epochs of {record.steps} steps"
        + (f"\naugmentation: {record.augmentation}" if record.augmentation else "")
        + (f"\nprecision: {record.precision}" if record.precision else "")
        + (f"\n{record.note}" if record.note else "")
    )


def _forecast(record: Forecast) -> str:
    text = (
        f"forecast: {duration(record.training)} of training left ({record.per_step:.2f} s a step), "
        f"then at most {duration(record.evaluation)} of evaluation (if no image is broken)"
    )
    seconds = record.training + record.evaluation / 3  # usually less than a third of the images stand
    if record.on_cpu and seconds > LONG_RUN:
        text += (
            "\nthat is long on a CPU. To shorten it: a GPU; a narrow model (model=cifar_resnet18_w16); fewer epochs "
            "(epochs=10); fewer or weaker attacks (evaluate=nat,pgd20 test_size=1000); data='digits()' model=small_cnn"
        )
    return text
