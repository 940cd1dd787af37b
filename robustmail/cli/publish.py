"""The verbs that hand results and models on: report, push, export. Heavy modules are imported when used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustmail import __version__
from robustmail.cli.completion import complete_words
from robustmail.cli.curve import evaluations_of, show_curve
from robustmail.cli.options import (
    PUBLISH,
    AcceptReading,
    File,
    Folder,
    Folders,
    IgnoreUnused,
    Model,
    Normalize,
    Probe,
    Weights,
    open_inputs,
    result_name,
    wants_plain,
)
from robustmail.cli.recipe_verbs import Verb
from robustmail.errors import ModelError, RunError, did_you_mean
from robustmail.runtime.progress import progress
from robustmail.text import plural

if TYPE_CHECKING:
    from robustmail.report.paper import Paper
    from robustmail.report.robustbench import Leaderboard

__all__ = ["add_to"]

PaperFile = Annotated[
    Path | None, typer.Option("--paper", help="A TOML file with title, authors, link, venue, additional_data, ...")
]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command(cls=Verb, rich_help_panel=PUBLISH)(report)
    app.command(cls=Verb, rich_help_panel=PUBLISH)(push)
    app.command(cls=Verb, rich_help_panel=PUBLISH)(export)


def report(
    folders: Folders,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="table, csv, markdown, latex, json, html, model-card or robustbench.",
            autocompletion=complete_words(
                "table", "csv", "markdown", "latex", "json", "html", "model-card", "robustbench"
            ),
        ),
    ] = "table",
    out: Annotated[
        Path | None,
        typer.Option(help="A file to write to, instead of the terminal; of robustbench the folder.  [robustbench]"),
    ] = None,
    paper: PaperFile = None,
    data: Annotated[
        str | None, typer.Option(help="With robustbench: the data that were evaluated, where they are not built in.")
    ] = None,
) -> None:
    """Compare evaluations or runs in a table, or write what others ask for.

    A row per folder, a column per attack; of a curve (several --eps) a row per eps. html writes report.html into each
    folder, model-card prints a card for the Hugging Face hub, robustbench writes what a new model on RobustBench's
    leaderboard needs.
    """
    from robustmail.evaluation.curve import is_curve
    from robustmail.report.export import FORMATS
    from robustmail.report.progress import shown_progress

    others = ("html", "model-card", "robustbench")
    if form not in FORMATS and form not in others:
        raise RunError(f"report --format {form}", "no such format", did_you_mean(form, [*FORMATS, *others]))
    if len(folders) == 1 and form == "table" and out is None and is_curve(folders[0]):
        show_curve(folders[0])
        return
    folders = evaluations_of(folders)
    with shown_progress(wants_plain(False)):
        _report(folders, form, out, paper, data)


def _report(folders: list[Path], form: str, out: Path | None, paper: Path | None, data: str | None) -> None:
    """Check the evaluations, and write them in a format."""
    from robustmail.report.export import export
    from robustmail.report.page import write_page

    _check_evaluations(folders)
    if form == "html":
        if out is not None:
            raise RunError(f"--out {out}", "a page goes into its evaluation's own folder", "Leave --out away.")
        for number, folder in enumerate(folders):
            progress("pages", number, len(folders))
            print(write_page(folder))
    elif form == "robustbench":
        _write_robustbench(folders, paper, data, out or Path("robustbench"))
    else:
        _print(_card(folders, paper) if form == "model-card" else export(folders, form), out)


def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(metavar="hf://OWNER/NAME", help="A repository of the Hugging Face hub.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights, a safetensors file, where they are not in the folder.")
    ] = None,
    paper: PaperFile = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
) -> None:
    """Upload weights, model card and results to the Hugging Face hub.

    Lists the files and asks first. Only the weights that were evaluated, README.md and the evaluation are uploaded.
    """
    from robustmail.checkpoints.hub import repository_files, repository_of, upload
    from robustmail.evaluation.publishing import check_secrets, files_to_publish
    from robustmail.evaluation.results import read_results
    from robustmail.evaluation.storage import read_evaluation
    from robustmail.report.model_card import model_card
    from robustmail.report.paper import read_paper

    repo, about = repository_of(repository), read_paper(paper)
    files: dict[str, Path | bytes] = dict(files_to_publish(read_evaluation(folder, strict=True), checkpoint))
    card = model_card(read_results(folder), folder, about, repo, next(iter(files)))
    check_secrets("the model card", card)
    files["README.md"] = card.encode()
    there = repository_files(repo)
    _show_upload(repository, files, there, private)
    if not yes:
        if not sys.stdin.isatty():
            raise RunError(f"push {repository}", "nothing is uploaded unasked", "Add --yes.")
        typer.confirm("Upload?", abort=True)
    print(upload(repo, files, f"Weights, card and results of {folder.name}", private))


def export(
    file: File,
    to: Annotated[str, typer.Option(help="onnx, torchscript or pt2 (torch.export).")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write.  [default: NAME.onnx, NAME.pt or NAME.pt2]")
    ] = None,
    model: Model = None,
    normalize: Normalize = None,
    weights: Weights = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled images, as of eval, to find out how the file is to be read.")
    ] = None,
    probe: Probe = False,
    accept_reading: AcceptReading = False,
    ignore_unused: IgnoreUnused = False,
    shape: Annotated[str | None, typer.Option(help="C,H,W of the images.  [default: what the file says]")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a model as a file for other programs: images in [0, 1] in, logits out, any number of images.

    Normalisation is inside. The file is run on random images first; where its logits are not those of the model,
    nothing is written.
    """
    from robustmail.evaluation.pretrained import Pretrained, open_pretrained
    from robustmail.export import SUFFIXES, check_export, export_model
    from robustmail.models.classifier import Classifier
    from robustmail.runtime.untrusted import printable

    check_export(out or Path(f"net{SUFFIXES.get(to, '')}"), to, replace or out is None)
    wanted = _parse_shape(shape)
    if data is None:
        opened = open_pretrained(file, model, normalize, weights, ignore_unused)
    else:
        inputs = open_inputs(
            file, data, None, model, normalize, weights, probe, "cpu",
            accept_reading=accept_reading, ignore_unused=ignore_unused,
        )  # fmt: skip
        loaded, (c, h, w) = inputs.model, inputs.data.part.x.shape[1:]
        assert isinstance(loaded.model, Classifier)
        opened = Pretrained(loaded.name, loaded.model, (c, h, w), loaded.sha256, loaded.notes)
    if (images := wanted or opened.shape) is None:
        raise ModelError(file, "does not say how large its images are", "Pass --shape 3,32,32.")
    for note in opened.notes:
        print(printable(note))
    path = out or Path(result_name(opened) + SUFFIXES[to])
    facts = {"name": opened.name, "sha256": opened.sha256, "version": __version__}
    done = export_model(opened.model, path, images, to, facts, replace)
    print(f"{path}: {to}, images [B, {', '.join(map(str, images))}] in [0, 1] -> logits [B, {done.classes}]")
    difference = f"{done.difference:.1g} at most, where the largest is {done.scale:.3g}"
    print(f"On {plural(done.images, 'random image')} its logits differ from those of the model by {difference}.")


def _parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """(C, H, W) of --shape. Raises RunError: other than three numbers from 1 to 4096."""
    if text is None:
        return None
    try:
        channels, height, width = map(int, text.split(","))
    except ValueError:
        channels = height = width = 0
    if not all(1 <= side <= 4096 for side in (channels, height, width)):
        raise RunError(f"--shape {text}", "not three sizes, of channels, height and width", "Write 3,32,32.")
    return channels, height, width


def _show_upload(repository: str, files: Mapping[str, Path | bytes], there: list[str] | None, private: bool) -> None:
    kind = "a new repository" if there is None else "a repository that exists"
    audience = f", {'private' if private else 'which everybody can read'}" if there is None else ""
    print(f"{repository}, {kind}{audience}:")
    for name, file in files.items():
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        print(f"  {name}  {size:,} bytes{'  (replaces the one that is there)' if name in (there or ()) else ''}")


def _card(folders: list[Path], paper: Path | None) -> str:
    from robustmail.evaluation.results import read_results
    from robustmail.report.model_card import model_card
    from robustmail.report.paper import read_paper

    if len(folders) > 1:
        raise RunError("report --format model-card", "a card is of one model", "Name one folder.")
    return model_card(read_results(folders[0]), folders[0], read_paper(paper))


def _print(text: str, out: Path | None) -> None:
    from robustmail.runtime.files import atomic_write_text

    if out is None:
        print(text.rstrip("\n"))
    else:
        atomic_write_text(out, text)


def _write_robustbench(folders: list[Path], paper: Path | None, data: str | None, out: Path) -> None:
    """Write the entries, texts and tensors of all folders; nothing where one of them is no leaderboard number."""
    from robustmail.evaluation.results import read_results
    from robustmail.report.paper import read_paper
    from robustmail.report.robustbench import entry_name, leaderboard_of

    about = read_paper(paper)
    boards = {folder: leaderboard_of(read_results(folder), folder) for folder in folders}
    names = [entry_name(read_results(folder), about) for folder in folders]
    if len({*names}) < len(names):
        raise RunError("report --format robustbench", f"several models are called {names[0]}", "Report one at a time.")
    for folder, board in boards.items():
        _write_entry(folder, board, about, data, out)


def _write_entry(folder: Path, board: Leaderboard, paper: Paper, data: str | None, out: Path) -> None:
    from robustmail.evaluation.attacked_images import attacked_images, write_tensor
    from robustmail.evaluation.curve import is_curve
    from robustmail.evaluation.data_loading import open_data, open_recorded_data
    from robustmail.evaluation.results import read_results
    from robustmail.evaluation.storage import read_evaluation
    from robustmail.report import robustbench
    from robustmail.runtime.files import atomic_write_json, atomic_write_text, make_folder

    results, held = read_results(folder), read_evaluation(folder, strict=True)
    in_curve = is_curve(folder.resolve().parent)
    name = robustbench.entry_name(results, paper)
    info = robustbench.model_info(results, board, paper)
    images = open_data(data) if data else open_recorded_data(held.results["spec"]["data_given"], str(folder))
    tensor = attacked_images(held, images)
    entry = out / "model_info" / board.dataset / board.threat_model / f"{name}.json"
    make_folder(entry.parent)
    file = out / f"{name}-adversarial.pt"
    sha256 = write_tensor(tensor, file)
    texts = {
        out / f"{name}-new-model.md": robustbench.issue_text(results, board, paper, info, in_curve),
        out / f"{name}-external-evaluation.md": robustbench.external_text(
            results, board, paper, file.name, sha256, in_curve
        ),
    }
    atomic_write_json(entry, info)
    for path, text in texts.items():
        atomic_write_text(path, text)
    print(f"{entry}: the entry in model_info. {file}: {plural(len(tensor), 'image')}, adversarial where one was found")
    print("\n".join(f"{path}: the text of an issue" for path in texts))
    if missing := [field for field, value in info.items() if value is None]:
        print(f"Still to be said, in a file for --paper: {', '.join(missing)}")


def _check_evaluations(folders: list[Path]) -> None:
    """Raise RunError, naming the row, where an evaluation's files are missing, damaged or do not agree."""
    from robustmail.evaluation.results import read_results
    from robustmail.evaluation.storage import read_evaluation

    for number, folder in enumerate(folders):
        progress("evaluations", number, len(folders))
        read_results(folder)
        read_evaluation(folder, strict=True)
