"""`robustmail eval --corruptions`: accuracy on corrupted images, as a table, a CSV file and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustmail.cli.options import command_line, result_name, stop_exit
from robustmail.errors import RecipeError, Stopped

if TYPE_CHECKING:
    from robustmail.cli.options import EvaluationInputs

__all__ = ["evaluate_corruptions", "refuse_with_corruptions"]


def refuse_with_corruptions(*given: Any) -> None:
    """Raise RecipeError where an option of attacks is given (in the order of `names`), or for several processes."""
    from robustmail.runtime import distributed

    if distributed.launched_processes() > 1:
        raise RecipeError("--corruptions", "several processes cannot share it", "Run it without torchrun.")
    names = ("--attacks", "--eps", "--norm", "--shard", "--batch", "--png", "--transfer", "--dry-run")
    if refused := [name for name, value in zip(names, given, strict=True) if value]:
        wrong = f"{refused[0]} has no meaning with it: corrupted images are not attacked"
        raise RecipeError("--corruptions", wrong, "Leave it out, or evaluate without --corruptions too.")


def evaluate_corruptions(
    inputs: EvaluationInputs, where: str, n: int | None, out: Path | None, seed: int, fresh: bool
) -> None:
    """Measure the accuracy on corrupted images; print and draw a table of it."""
    from contextlib import closing

    from rich.console import Console

    from robustmail.data.corruptions import find_corruptions, generate_corruptions
    from robustmail.evaluation.corruptions import CorruptionTask, corruption_means, evaluate_corruptions
    from robustmail.report.corruptions import corruption_table, draw_corruptions, write_corruption_csv
    from robustmail.runtime.signals import Signals

    is_made = where == "generate" and not Path(where).exists()
    sets = generate_corruptions(inputs.data, seed) if is_made else find_corruptions(Path(where), inputs.data)
    name = f"{inputs.data.name}, corrupted here, not CIFAR-10-C or ImageNet-C" if is_made else where
    task = CorruptionTask(inputs.model, inputs.data, sets, name, n, inputs.data.preprocess, seed)
    folder = out or Path("evals") / f"{result_name(inputs.model)}-corruptions"
    for text in inputs.model.notes:
        print(text)
    rows, signals = [], Signals()
    try:
        with signals.caught(), closing(evaluate_corruptions(task, folder, fresh, command_line())) as found:
            for row in found:
                rows.append(row)
                print(f"{row.corruption} {row.severity or ''}: {100 * row.accuracy:.1f} %".replace(" :", ":"))
                signals.check()
    except Stopped as stop:
        raise stop_exit(stop, folder) from None
    title = f"{inputs.model.name} on {name}"
    Console().print(corruption_table(rows, corruption_means(rows), title))
    write_corruption_csv(rows, folder / "corruptions.csv")
    pictures = draw_corruptions(rows, title, folder / "corruptions")
    print(", ".join(map(str, [*pictures, folder / "corruptions.csv", folder / "corruptions.json"])))
