"""Where weights come from: a file, the folder of a run, a folder as the Hugging Face hub has it, or the hub itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustmail.checkpoints.cleaning import Normalisation
from robustmail.checkpoints.hub import HubFile, download, is_hub
from robustmail.checkpoints.weight_files import CONFIG, USUAL, only_weights
from robustmail.errors import ModelError, RunError
from robustmail.models.classifier import is_network
from robustmail.models.pretrained import PretrainedConfig, config_of
from robustmail.runtime.untrusted import beside, inside, parse_json, printable, quoted, read_bytes, read_json

__all__ = ["WeightsSource", "find_weights"]

MAX_CONFIG = 2**20  # bytes of a config.json


@dataclass(frozen=True)
class WeightsSource:
    """A file of weights, and what the folder that it lies in says about it.

    path: of the file.
    reference: what opens it again: its path, or hf://OWNER/NAME/FILE@COMMIT.
    given: what opens it with what config.json says: as `reference`, or the folder.
    name: for people; "" where the file's own will do.
    model: the network that config.json names, of timm or ours.
    config: how config.json has images prepared.
    transformers: the class of the transformers library that config.json names, whose network cannot be built here.
    notes: where the file comes from and what of config.json is not used, in sentences.
    """

    path: Path
    reference: str
    given: str
    name: str = ""
    model: str | None = None
    config: PretrainedConfig | None = None
    transformers: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def normalize(self) -> Normalisation | None:
        """(mean, std) in config.json, if any."""
        return (self.config.mean, self.config.std) if self.config else None


def find_weights(source: str | Path | WeightsSource) -> WeightsSource:
    """The file of weights that a text names.

    source: a file; the folder of a run; a downloaded folder with config.json and model.safetensors or
    pytorch_model.bin, or a model's folder in the hub's cache; or hf://OWNER/NAME/FILE@REVISION.
    Raises RunError: a run's folder without weights; a link that leads out of a folder. Raises ModelError: no file of
    weights or several in a folder, or the hub does not give it.
    """
    if isinstance(source, WeightsSource):
        return source
    if is_hub(source):
        return _of_hub(download(source))
    path = Path(source)
    return _of_folder(path) if path.is_dir() else WeightsSource(path, str(path), str(path))


def _of_hub(file: HubFile) -> WeightsSource:
    stem = Path(file.file).stem
    name = file.repo.rpartition("/")[2] + ("" if Path(file.file).name in USUAL else f"/{stem}")
    note = f"{file.reference} is {file.path}"
    source = WeightsSource(file.path, file.reference, file.reference, name, notes=(note,))
    # What huggingface_hub has put into its cache are links to where it keeps the content.
    config = file.path.parent / CONFIG
    return _with_config(source, config.resolve()) if config.is_file() else source


def _of_folder(folder: Path) -> WeightsSource:
    try:
        own = _weights_of_run(folder)
        if own is not None:
            return WeightsSource(own, str(own), str(own))
        folder, name = _snapshot(folder)
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except (OSError, ValueError) as error:
        raise ModelError(str(folder), f"cannot be read ({error})") from error
    path = folder / only_weights(names, str(folder), lambda name: quoted(folder / name))
    _real(path)
    source = WeightsSource(path, str(path), str(folder), name)
    return _with_config(source, _real(folder / CONFIG)) if CONFIG in names else source


def _weights_of_run(folder: Path) -> Path | None:
    """The weights that a run evaluated; None if it is no folder of robustmail's. Raises RunError: no weights in it."""
    try:
        name = read_json(folder / "results.json")["weights"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        name = "best.safetensors"
    path = beside(folder, name) or inside(folder, "best.safetensors")
    if path is None and any((folder / own).exists() for own in ("recipe.json", "ledger.csv")):
        raise RunError(str(folder), "a folder without weights of a run", "Pass a checkpoint file.")
    return path


# The hub's cache: models--OWNER--NAME/snapshots/COMMIT/FILE is a link into models--OWNER--NAME/blobs or into blobs


def _snapshot(folder: Path) -> tuple[Path, str]:
    """(the folder with the files, a name for people): of a model in the hub's cache the newest snapshot."""
    if (folder / "snapshots").is_dir() and folder.name.startswith("models--"):
        commits = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
        newest = folder / "refs" / "main"
        wanted = newest.read_bytes()[:64].decode("ascii", "replace").strip() if newest.is_file() else ""
        if wanted not in commits and len(commits) != 1:
            shown = ", ".join(map(printable, commits[:5])) or "none"
            todo = f"Pass {quoted(folder / 'snapshots' / (commits[0] if commits else 'COMMIT'))}."
            raise ModelError(str(folder), f"has these snapshots: {shown}", todo)
        folder = folder / "snapshots" / (wanted if wanted in commits else commits[0])
    repo = _cached_repo(folder)
    return folder, (repo.name if repo else folder.resolve().name).rpartition("--")[2]


def _cached_repo(folder: Path) -> Path | None:
    """The folder models--OWNER--NAME of a snapshot in the hub's cache; None for any other folder."""
    folder = folder.absolute()
    is_cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent if is_cached else None


def _real(path: Path) -> Path:
    """The file that a name in a folder stands for: itself, or what it is a link to, as in the hub's cache.

    Raises RunError: the link leads out of the folder and, in the hub's cache, out of where the content is kept.
    """
    allowed: Sequence[Path] = [path.parent]
    if repo := _cached_repo(path.parent):
        allowed = [path.parent, repo / "blobs", repo.parent / "blobs"]
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise RunError(str(path), "is a symbolic link to nothing") from error
    if not any(real.is_relative_to(folder.resolve()) for folder in allowed):
        wrong = f"is a symbolic link that leads out of {path.parent}"
        raise RunError(str(path), wrong, "Name its target itself, or copy it into there.")
    return real


# config.json


def _with_config(source: WeightsSource, path: Path) -> WeightsSource:
    """The source with what config.json says; what cannot be used is in the notes."""
    try:
        content = parse_json(read_bytes(path, MAX_CONFIG).decode())
    except (OSError, ValueError, RunError) as error:
        return replace(source, notes=(*source.notes, f"{CONFIG} is not used: {printable(str(error))[:160]}"))
    if not isinstance(content, dict):
        return replace(source, notes=(*source.notes, f"{CONFIG} is not used: it is no JSON object"))
    model, prepared = content.get("architecture"), content.get("pretrained_cfg", content)
    has_name = isinstance(model, str) and len(model) <= 100 and is_network(model)
    config = config_of(prepared) if isinstance(prepared, dict) else None
    notes = tuple(_config_notes(content, model, has_name, config))
    return replace(
        source,
        model=model if has_name else None,
        config=config,
        transformers=_transformers_class(content) if not has_name else None,
        notes=(*source.notes, *notes),
    )


def _config_notes(
    content: dict[str, Any], model: Any, has_name: bool, config: PretrainedConfig | None
) -> Iterator[str]:
    if has_name:
        yield f"{CONFIG} says it is {model}"
    elif model is not None:
        yield f"{CONFIG} names no network of timm or ours ({ascii(model)[:60]}): not used"
    if not has_name and (library_class := _transformers_class(content)):
        yield f"{CONFIG} is of the transformers library ({library_class}), whose networks are not built here"
    if content.get("model_args"):
        yield f"{CONFIG} has model_args ({ascii(content['model_args'])[:60]}): not used"
    if config:
        sizes = f"{config.resize} pixels, cropped to {config.crop}"
        yield f"{CONFIG} has images resized to {sizes}, {config.interpolation}"


def _transformers_class(content: dict[str, Any]) -> str | None:
    classes = content.get("architectures")
    if isinstance(classes, list) and classes and isinstance(classes[0], str):
        return printable(classes[0])[:60]
    kind = content.get("model_type")
    return f"model_type {printable(kind)[:60]}" if isinstance(kind, str) else None
