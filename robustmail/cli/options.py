"""Options that several verbs share, and how their texts are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from robustmail.data.testsets import TestSet
from robustmail.errors import DataError, RecipeError, RobustmailError, RunError
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.norms import Norm

__all__ = ["File", "Folder", "Folders", "Plain", "Weights", "opened", "name_of", "once", "attack_of", "positive"]


File = Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint of any kind, or a run's folder.")]


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An evaluation's folder.")]


Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of evaluations or runs.")]


Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live view.")]


Weights = Annotated[str | None, typer.Option(help="Which of a file's several sets of weights.")]


def opened(
    file: Path, data: str | None = None, n: int | None = None, model: str | None = None, normalize: str | None = None,
    weights: str | None = None, probe: bool = False, device: str = "auto", eps: str | None = None,
    norm: str | None = None, accept_reading: bool = False,
) -> tuple[LoadedModel, TestSet, float, Norm]:  # fmt: skip
    """(model, images, eps, norm) of what the options of `eval` name; what is left out is the file's own, if it says."""
    from dataclasses import replace

    from robustmail.checkpoints import check_exists
    from robustmail.evaluation.model_loading import load_data, load_model, open_recorded_data
    from robustmail.runtime.devices import pick_device

    check_exists(path := _weights_of(file))
    facts = _facts_of(path)
    if data is None and "source" not in facts:
        raise DataError(str(file), "does not say which data to attack", "Pass --data cifar10, or an npz file.")
    everything = load_data(data) if data else open_recorded_data(facts["source"], str(file))
    chosen = everything.first(positive("--n", n))
    subject = load_model(path, everything.first(min(1000, len(everything.part.y))), model, normalize, weights, probe,
                           pick_device(device), accept_reading)  # fmt: skip
    lacking = chosen.lacks(everything)
    subject = replace(subject, said=(*everything.said, *subject.said, *([lacking] if lacking else [])))
    trained = facts.get("norm") or "linf"
    measure = _norm(norm or trained)
    own = facts.get("eps") if measure == trained else None  # a length in one norm says nothing in another
    budget = _number("--eps", eps) if eps else float(own or {"linf": 8 / 255, "l2": 0.5}[measure])
    return subject, chosen, budget, measure


def _weights_of(file: Path) -> Path:
    """The file itself, or the chosen weights of a run's folder."""
    if not file.is_dir():
        return file
    from robustmail.runtime.untrusted import beside, inside, read_json

    try:
        chosen = read_json(file / "results.json")["weights"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = "best.safetensors"
    if (found := beside(file, chosen) or inside(file, "best.safetensors")) is None:
        raise RunError(str(file), "is a folder without weights of a run", "Pass a checkpoint file.")
    return found


def _facts_of(path: Path) -> dict[str, Any]:
    """What a file that robustmail wrote says of its data and budget."""
    from robustmail.checkpoints import open_checkpoint

    return open_checkpoint(path).facts if path.suffix == ".safetensors" else {}


def name_of(subject: LoadedModel) -> str:
    """A name for a folder of results: the model's own, which for a run's weights is that of the run's two folders."""
    return "-".join(re.sub(r"[^\w.+-]", "_", part) for part in subject.name.split("/") if part)


def once(option: str, text: str, usual: str) -> list[str]:
    """The names in a list with commas, each once (raises RecipeError); usual: what one would write."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(option, f"{twice[0]} is named twice")
    if not names:
        raise RecipeError(option, "names none", f"Write {usual}.")
    return names


def attack_of(name: str) -> Any:
    """The attack of a name: one of one's own from its file, or the name itself."""
    from robustmail.config.overrides import parse_value

    return parse_value(name, "attacks") if ".py:" in name else name


def _number(option: str, text: str) -> float:
    from robustmail.config.overrides import parse_value

    try:
        value = parse_value(text)
    except RobustmailError:
        value = None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RecipeError(f"{option} {text}", "is no number", "Write 8/255.")
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(f"{option} {text}", "is no finite number", "Write 8/255.") from None


def positive(option: str, value: int | None) -> int | None:
    """A count that is none or at least one (raises RecipeError)."""
    if value is not None and value < 1:
        raise RecipeError(f"{option} {value}", "must be at least 1")
    return value


def _norm(text: str) -> Any:
    norm = text.lower().replace("-", "")
    if norm not in ("linf", "l2"):
        raise RecipeError(f"--norm {text}", "no such norm", "There are: linf, l2.")
    return norm


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise RecipeError(f"--shard {text}", "must be K/N with 1 <= K <= N", "Write 1/4, 2/4, 3/4 and 4/4.")
    return int(found[1]), int(found[2])
