"""What the verbs share: options, how their texts are read, and how a stopped command ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from robustmail.cli.completion import (
    DEVICES,
    complete_attacks,
    complete_overrides,
    complete_plugins,
    complete_recipe,
    complete_runs,
    complete_words,
)
from robustmail.cli.option_texts import check_count, parse_norm, read_number
from robustmail.errors import DataError, Stopped

if TYPE_CHECKING:
    from robustmail.data.testsets import TestSet
    from robustmail.evaluation.model_loading import LoadedModel
    from robustmail.evaluation.pretrained import Pretrained
    from robustmail.norms import Norm
    from robustmail.recipe import Recipe

__all__ = [
    "DEFAULT_ATTACKS",
    "EVALUATE",
    "MEASURE",
    "OWN",
    "PUBLISH",
    "TRAIN",
    "AcceptReading",
    "AsJson",
    "AttackNames",
    "Batch",
    "Corruptions",
    "Crop",
    "Data",
    "Device",
    "DryRun",
    "Epoch",
    "Eps",
    "EvaluationInputs",
    "Executor",
    "File",
    "Folder",
    "Folders",
    "Fresh",
    "IgnoreUnused",
    "Jobs",
    "MaxImages",
    "Model",
    "Normalize",
    "NormName",
    "Overrides",
    "Plain",
    "Png",
    "Probe",
    "RecipeName",
    "Resize",
    "ResultsFolder",
    "Seed",
    "Shard",
    "SubmititParameters",
    "Transfer",
    "TransferModel",
    "TransferNormalize",
    "Weights",
    "command_line",
    "evaluation_stopped",
    "how_to_go_on",
    "load_recipe_with",
    "open_inputs",
    "open_transfer",
    "result_name",
    "stop_exit",
    "wants_plain",
]

DEFAULT_ATTACKS = "nat,pgd100,cw,apgd,aa"
TRAIN, OWN, EVALUATE, PUBLISH, MEASURE = "Train", "Write your own", "Evaluate", "Publish", "Measure"
"""The groups of verbs in `robustmail --help`"""

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A built-in recipe, a file, or FILE:VARIABLE.", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH=VALUE]...",
        help="Changes to the recipe: weighter.slope=5 epochs=30 burn_in=20.",
        autocompletion=complete_overrides,
    ),
]
File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A checkpoint of any format, a folder with one, or hf://OWNER/NAME/FILE.",
        autocompletion=complete_runs,
    ),
]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder of an evaluation.", autocompletion=complete_runs)
]
Folders = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Folders of evaluations or runs.", autocompletion=complete_runs)
]

Model = Annotated[
    str | None,
    typer.Option(
        help="A name of timm or RobustBench, or file.py:factory.  [default: inferred]",
        autocompletion=complete_plugins("models"),
    ),
]
Weights = Annotated[str | None, typer.Option(help="Which state_dict, where the file has several.")]
Normalize = Annotated[
    str | None, typer.Option(help="Of the inputs: cifar10, imagenet, ..., MEAN/STD or none.  [default: inferred]")
]
Probe = Annotated[bool, typer.Option("--probe", help="Choose the normalization by accuracy on 256 images.")]
AcceptReading = Annotated[
    bool, typer.Option("--accept-reading", help="Go on although the inferred architecture is doubtful.")
]
IgnoreUnused = Annotated[
    bool, typer.Option("--ignore-unused", help="Leave out tensors that the network of --model has no place for.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A recipe's data=, an npz file or an image folder.  [default: a run's own]",
        autocompletion=complete_plugins("data"),
    ),
]
Resize = Annotated[
    int | None, typer.Option(help="Shorter side of image files in pixels.  [default: as the model was pretrained]")
]
Crop = Annotated[
    int | None, typer.Option(help="Side of the centre square of image files.  [default: as the model was pretrained]")
]
MaxImages = Annotated[int | None, typer.Option("--n", help="Use only the first N images.  [default: all]")]
Eps = Annotated[
    str | None,
    typer.Option(
        help="Radius of the ball, for pixels in [0, 1]; several, as 0,4/255,8/255, give a curve.  "
        "[default: a run's own; else 8/255, in l2 0.5]"
    ),
]
NormName = Annotated[
    str | None,
    typer.Option(
        "--norm", help="linf or l2.  [default: a run's own; else linf]", autocompletion=complete_words("linf", "l2")
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the attacks' random starts.")]
Batch = Annotated[
    int | None, typer.Option(help="Images attacked at once; does not change results.  [default: adapted]")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", autocompletion=complete_words(*DEVICES))]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete earlier results in the folder and start again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print plain lines instead of a live view.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

AttackNames = Annotated[
    str | None,
    typer.Option(
        help=f"Names, calls of attacks and file.py:attack, with commas.  [default: {DEFAULT_ATTACKS}]",
        autocompletion=complete_attacks,
    ),
]
Epoch = Annotated[int | None, typer.Option(help="Of a run's folder: the weights of this epoch, kept with keep_every.")]
ResultsFolder = Annotated[Path | None, typer.Option(help="Folder for the results.  [default: evals/NAME]")]
Shard = Annotated[str | None, typer.Option(help="K/N: only the K-th of N parts of the images; see robustmail merge.")]
Corruptions = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Instead of attacks: the folder of CIFAR-10-C or ImageNet-C; or `generate`, to make some here.",
    ),
]
Transfer = Annotated[
    str | None, typer.Option(metavar="OTHER", help="A checkpoint that is attacked too; FILE judges the examples.")
]
TransferModel = Annotated[str | None, typer.Option(help="The --model of OTHER.")]
TransferNormalize = Annotated[str | None, typer.Option(help="The --normalize of OTHER.")]
Png = Annotated[bool, typer.Option("--png", help="Write the adversarial examples as 8-bit PNG files, too.")]

Executor = Annotated[
    str,
    typer.Option(
        help="here: one run after another; local or slurm: in parallel, through submitit.",
        autocompletion=complete_words("here", "local", "slurm"),
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once, with local or slurm.")]
SubmititParameters = Annotated[
    list[str] | None, typer.Option("--with", help="A parameter for submitit, as slurm_partition=gpu. Repeatable.")
]


class EvaluationInputs(NamedTuple):
    """What is attacked, and how far: eps in `norm`, for pixels in [0, 1].

    sample: the images by which the reading of a checkpoint is judged; they may be more than `data`.
    """

    model: LoadedModel
    data: TestSet
    eps: float
    norm: Norm
    sample: TestSet


def load_recipe_with(name: str, overrides: list[str] | None) -> Recipe:
    """Load a recipe and apply overrides, PATH=VALUE each. Raises RecipeError: no such recipe, or a wrong override."""
    from robustmail.config.recorded import resolve_recipe

    return resolve_recipe(name, overrides)


def open_inputs(
    file: str,
    data: str | None = None,
    n: int | None = None,
    model: str | None = None,
    normalize: str | None = None,
    weights: str | None = None,
    probe: bool = False,
    device: str = "auto",
    eps: str | None = None,
    norm: str | None = None,
    accept_reading: bool = False,
    ignore_unused: bool = False,
    resize: int | None = None,
    crop: int | None = None,
) -> EvaluationInputs:
    """Load the model and the images that the options of `robustmail eval` name; the parameters are its options.

    Data, eps and norm that are not given are those stored in the file, if robustmail wrote it.

    Raises RobustmailError: the file, the data or the device cannot be used, or an option cannot be understood.
    """
    from dataclasses import replace

    from robustmail.checkpoints import check_exists, find_weights
    from robustmail.data.image_files import Preprocess, StreamedSplit
    from robustmail.evaluation.data_loading import open_data, open_recorded_data, pretrained_preprocess
    from robustmail.evaluation.model_loading import load_model
    from robustmail.models.pretrained import pretrained_config
    from robustmail.report.progress import shown_progress
    from robustmail.runtime.devices import pick_device

    source = find_weights(file)
    check_exists(source.path)
    facts = _training_facts(source.path)
    if data is None and "source" not in facts:
        raise DataError(file, "no data stored in it", "Pass --data cifar10, or an npz file.")
    preprocess = Preprocess(resize, crop) if resize or crop else None
    whole = open_data(data, preprocess) if data else open_recorded_data(facts["source"], file)
    named = model or source.model or facts.get("model")
    config = source.config or (pretrained_config(named) if named else None)
    images = whole.first(check_count("--n", n)).checked(*pretrained_preprocess(config))
    # To choose architecture and normalization by, more images help; but of files, no more are decoded than asked for.
    first_images = (images if isinstance(images.part, StreamedSplit) else whole).first_at_most(1000)
    torch_device = pick_device(device)
    with shown_progress(wants_plain(False)):
        subject = load_model(
            source, first_images, model, normalize, weights, probe, torch_device, accept_reading, ignore_unused
        )
    few_classes = images.class_warning(whole)
    subject = replace(subject, notes=(*images.notes, *subject.notes, *([few_classes] if few_classes else [])))
    trained_norm = facts.get("norm") or "linf"
    chosen_norm = parse_norm(norm or trained_norm)
    trained_eps = facts.get("eps") if chosen_norm == trained_norm else None  # an eps holds in its own norm only
    default_eps = float(trained_eps or {"linf": 8 / 255, "l2": 0.5}[chosen_norm])
    return EvaluationInputs(subject, images, read_number(eps) if eps else default_eps, chosen_norm, first_images)


def open_transfer(
    file: str,
    inputs: EvaluationInputs,
    model: str | None,
    normalize: str | None,
    probe: bool = False,
    accept_reading: bool = False,
    ignore_unused: bool = False,
) -> LoadedModel:
    """Load the model of --transfer, for the same images and on the same device as the evaluated one.

    Raises RobustmailError: the file cannot be used, or an option cannot be understood.
    """  # fmt: skip
    from robustmail.checkpoints import check_exists, find_weights
    from robustmail.evaluation.model_loading import load_model

    source = find_weights(file)
    check_exists(source.path)
    device = inputs.model.device
    return load_model(source, inputs.sample, model, normalize, None, probe, device, accept_reading, ignore_unused)


def result_name(subject: LoadedModel | Pretrained) -> str:
    """The name of a results folder or of an export: the model's; for the weights of runs/NAME/SEED it is NAME-SEED."""
    return "-".join(re.sub(r"[^\w.+-]", "_", part) for part in subject.name.split("/") if part)


def wants_plain(plain: bool) -> bool:
    """Whether to print plain lines: asked for, or in continuous integration, where the environment sets CI."""
    return plain or bool(os.environ.get("CI"))


def command_line() -> str:
    """The command under way, quoted for a shell."""
    return shlex.join(["robustmail", *sys.argv[1:]])


def how_to_go_on(saved: Path | None) -> str:
    """What a stopped command has saved, and the command that goes on; saved: the folder, None where nothing was."""
    if saved is None:
        return f"nothing was begun that could go on. Begin again with: {command_line()}"
    words = [word for word in sys.argv[1:] if word not in ("--fresh", "--yes")]  # which would delete what was saved
    return f"saved in {saved}. Resume with: {shlex.join(['robustmail', *words])}"


def stop_exit(stop: Stopped, saved: Path | None) -> typer.Exit:
    """Report a stop by a signal, and how to go on, on one line; return the exit, with code 128 + signal number.

    saved: the folder in which the same command resumes, if there is anything yet. Under torchrun only one of the
    processes reports.
    """
    from robustmail.runtime import distributed

    if distributed.speaks():
        name = signal.Signals(stop.signum).name
        print(f"robustmail: stopped by {name}; {how_to_go_on(saved)}", file=sys.stderr)
    return typer.Exit(128 + stop.signum)


def evaluation_stopped(stop: Stopped, folder: Path | None) -> typer.Exit:
    """`stop_exit` of an evaluation, which the same command resumes in its folder, if that was made already."""
    return stop_exit(stop, folder if folder is not None and folder.exists() else None)


def _training_facts(path: Path) -> dict[str, Any]:
    """The data, eps and norm stored in weights that robustmail wrote; empty for any other file."""
    from robustmail.checkpoints import open_checkpoint

    return open_checkpoint(path).facts if path.suffix == ".safetensors" else {}
