"""From whatever a user brings to a model that can be judged: images in [0, 1] in, logits out, no guess unsaid."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustmail.checkpoints import Candidate, Checkpoint, build_network, load_strict, normalisation_in, open_checkpoint
from robustmail.config.loader import find_plugin
from robustmail.config.overrides import parse_value
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet, from_image_data, from_path
from robustmail.errors import DataError, ModelError, RecipeError
from robustmail.evaluation.doubts import compare_stored_accuracies, reading_doubts
from robustmail.evaluation.evaluator import classes_of
from robustmail.evaluation.normalization import (
    PROBE_IMAGES,
    Normalize,
    Score,
    best_fit,
    format_normalization,
    parse_normalization,
    score_all,
    shortlist,
    usual_normalizations,
)
from robustmail.models.classifier import Classifier, is_network
from robustmail.runtime.untrusted import data_source, is_code, quoted, read_text

__all__ = ["LoadedModel", "load_data", "open_recorded_data", "load_model", "reload_model", "trained_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model under evaluation and where it comes from.

    described: plain values that say how the file was read, and suffice to read it so again. said: what was inferred
    rather than given, in sentences.
    """

    name: str
    model: nn.Module
    classes: int
    described: dict[str, Any]
    sha256: str | None = None
    said: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    """what speaks against the way the file was read, in sentences"""

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every parameter and buffer, and of the normalisation."""
        sha = hashlib.sha256()
        for name, tensor in sorted({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}.items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    @property
    def weights(self) -> dict[str, Any]:
        """What identifies the weights."""
        return {"file": self.described.get("checkpoint"), "sha256": self.sha256, "fingerprint": self.fingerprint}

    @classmethod
    def of(cls, model: nn.Module, data: TestSet, name: str = "model") -> LoadedModel:
        """A model of one's own, which takes images in [0, 1]."""
        described = dict.fromkeys(("checkpoint", "weights", "normalize", "source")) | {"model": type(model).__name__}
        return cls(name, model, classes_of(model, data.part), described)


def load_data(text: str) -> TestSet:
    """`cifar10`, `npz("file.npz")`, or the path of an npz file or an image folder.

    Raises DataError or RecipeError: no such thing, damaged, images outside [0, 1].
    """
    path = Path(text)
    if path.exists():
        return replace(from_path(path), given=text)
    if "(" not in text and (path.suffix == ".npz" or (len(path.parts) > 1 and ".py:" not in text)):
        raise DataError(text, "no such file or folder")
    source = parse_value(text, "data")
    if not callable(source):
        raise RecipeError(f"--data {text}", "is no data source", "Write cifar10, npz('FILE') or a path.")
    return _of_source(source, text)


def open_recorded_data(text: str, who: str) -> TestSet:
    """What the file `who` says it was trained on: a built-in source, or else the option that allows it (DataError)."""
    if (source := data_source(text)) is None:
        wrong = f"was trained on {text}, and a file may not say what to open"
        raise DataError(who, wrong, f"Add {quoted('--data', text)} if you trust it, or other data.")
    return _of_source(source, text)


def _of_source(source: Callable[[], Any], text: str) -> TestSet:
    return replace(from_image_data(source()), given=text)


def load_model(
    path: Path, data: TestSet, model: str | None = None, normalize: str | None = None, weights: str | None = None,
    probe: bool = False, device: torch.device | str = "cpu", accept_reading: bool = False,
) -> LoadedModel:  # fmt: skip
    """Read a checkpoint into a model, by what the file says, the user says, and labelled images tell.

    model: a timm name or file.py:factory; without one, what the names and shapes of the tensors fit. normalize: a
    convention; without one, what the file holds, or with `probe` the one that fits. Where several readings remain,
    images decide, and `said` tells. Raises ModelError for whatever is left open, does not fit, or is in doubt, unless
    accept_reading: then `reading_doubts` tells.
    """
    checkpoint = open_checkpoint(path, weights, data.part.x.shape[-1])
    networks = {name: network.to(device) for name, network in _candidate_networks(checkpoint, data, model).items()}
    conventions, why = _conventions(checkpoint, networks, normalize, probe, data.part.x.shape[1])
    choice = _choose(networks, conventions, data.part)
    if choice.best is not None and normalize not in (None, "none"):
        _refuse_normalising_twice(choice.best, networks, data.part.first(PROBE_IMAGES))
    guessed = model is None and "model" not in checkpoint.facts
    probed = len(conventions) > 1
    compared, found = [], []
    if choice.best is not None and (guessed or probed or checkpoint.accuracies):
        best = choice.best.on(data.part) if checkpoint.accuracies else choice.best
        compared = list(compare_stored_accuracies(best, checkpoint.accuracies))
        usual = choice.network == next(iter(networks))
        found = reading_doubts(best, choice.ranked, data.part, checkpoint.accuracies, usual)
        if found and (guessed or probed) and not accept_reading:
            raise _doubtful(path, choice.network, choice.convention if probed else "", guessed, found)
    described = {
        "checkpoint": str(path),
        "weights": checkpoint.weights,
        "model": choice.network,
        "normalize": format_normalization(conventions[choice.convention]),
        "source": _source_hash(model),
    }
    said = [*_assumption_notes(checkpoint, choice.network), *filter(None, [why]), *choice.said, *compared,
            *(f"IN DOUBT: {text}" for text in found)]  # fmt: skip
    judged = choice.model.to(device)
    return LoadedModel(
        _display_name(path, checkpoint),
        judged,
        classes_of(judged, data.part),
        described,
        checkpoint.sha256,
        tuple(said),
        tuple(found),
    )


@dataclass(frozen=True)
class _Choice:
    """The network and the convention that fit the images best, and how that was found."""

    network: str
    convention: str
    model: Classifier
    best: Score | None
    """None where there was nothing to choose from, and the network does not take these images"""
    ranked: list[Score]
    said: list[str]


def _choose(networks: dict[str, nn.Module], conventions: dict[str, Normalize | None], part: Split) -> _Choice:
    """Try each network under each convention. Raises ModelError where none takes these images."""
    if len(networks) * len(conventions) > 1:
        best, rivals, ranked = best_fit(shortlist(networks, conventions, part.first(PROBE_IMAGES)), part)
        return _Choice(
            best.network, best.convention, best.model, best, ranked, list(_choice_notes(best, rivals, ranked))
        )
    network, convention = next(iter(networks)), next(iter(conventions))
    model = Classifier(networks[network], conventions[convention]).eval()
    only = next(score_all([(network, convention)], networks, conventions, part.first(PROBE_IMAGES)), None)
    return _Choice(network, convention, model, only, [], [])


def trained_model(model: nn.Module, path: Path, data: TestSet) -> LoadedModel:
    """A model in memory whose weights a training run has written to `path`, described as `load_model` would do."""
    checkpoint = open_checkpoint(path)
    described = {
        "checkpoint": str(path),
        "weights": checkpoint.weights,
        "model": checkpoint.facts["model"],
        "normalize": format_normalization(checkpoint.normalize),
        "source": None,
    }
    name = _display_name(path, checkpoint)
    return LoadedModel(name, model, classes_of(model, data.part), described, checkpoint.sha256)


def reload_model(
    spec: dict[str, Any], data: TestSet, path: Path | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """The model that an evaluation's results speak of, from its own path or another: for specs that are trusted."""
    if spec["checkpoint"] is None and path is None:
        raise ModelError(
            "verify", "this evaluation was of a model in memory", "Call robustmail.verify(DIR, model, data)."
        )
    where = path or Path(spec["checkpoint"])
    checkpoint = open_checkpoint(where, spec["weights"] or None, data.part.x.shape[-1])
    read = _read_networks(checkpoint) if "model" not in checkpoint.facts else {}
    net = read.get(spec["model"]) or next(
        iter(_candidate_networks(checkpoint, data, _given_model(spec, checkpoint)).values())
    )
    normalize = parse_normalization(spec["normalize"], data.part.x.shape[1])
    judged = Classifier(net, normalize).eval().to(device)
    described = {k: spec[k] for k in ("weights", "model", "normalize")} | {"checkpoint": str(where)}
    return LoadedModel(
        _display_name(where, checkpoint), judged, classes_of(judged, data.part), described, checkpoint.sha256
    )


def _display_name(path: Path, checkpoint: Checkpoint) -> str:
    """A name for people: the file's, or, for the best or last weights of a run of ours, that of its two folders."""
    ours = path.stem in ("best", "last") and "epoch" in checkpoint.facts
    return "/".join(path.resolve().parts[-3:-1]) if ours else path.stem


def _given_model(spec: dict[str, Any], checkpoint: Checkpoint) -> str | None:
    """The model as it was named with --model, or None where the file names it itself."""
    return None if spec["model"] == checkpoint.facts.get("model") else spec["model"]


def _candidate_networks(checkpoint: Checkpoint, data: TestSet, model: str | None) -> dict[str, nn.Module]:
    """The networks that the file may be, by name."""
    who = str(checkpoint.path)
    if model is not None:
        what: str | Callable[..., Any] = find_plugin(model) if is_code(model) else model
        if isinstance(what, nn.Module):
            return {model: load_strict(checkpoint.raw_tensors, what, who)}
        return {
            model: load_strict(
                checkpoint.raw_tensors, build_network(what, checkpoint.tensors, channels=data.part.x.shape[1]), who
            )
        }
    if "model" in checkpoint.facts:
        facts = checkpoint.facts
        built = build_network(_named_model(checkpoint), checkpoint.tensors, facts.get("classes"), facts.get("channels"))
        return {facts["model"]: load_strict(checkpoint.tensors, built, who)}
    if not (found := _read_networks(checkpoint)):
        raise ModelError(who, "its tensors fit no network that robustmail knows",
                         "Say which it is: --model NAME (timm's or ours) or --model file.py:factory.")  # fmt: skip
    return found


def _read_networks(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return {name: reading.network for name, reading in _readings(checkpoint).items()}


def _readings(checkpoint: Checkpoint) -> dict[str, Candidate]:
    """The readings by a name that says what was assumed, so that it means the same wherever the file is read again."""
    return {": ".join(filter(None, [r.name, "; ".join(r.unwritten)])): r for r in checkpoint.readings()}


def _named_model(checkpoint: Checkpoint) -> str:
    """The name, timm's or ours, in a file that robustmail wrote; a function of a recipe is code, and is not run."""
    name: str = checkpoint.facts["model"]
    if is_network(name):
        return name
    function, recipe = name.rpartition(".py:")[2], checkpoint.path.parent / "recipe.py"
    there = function.isidentifier() and recipe.is_file() and function in re.findall(r"\w+", read_text(recipe))
    wrong = f"its network is {function}{' of the recipe beside it' * there}, which is code"
    where = f"{recipe}:{function}" if there else "file.py:factory"
    raise ModelError(str(checkpoint.path), wrong, f"Pass {quoted('--model', where)} if you trust it.")


def _source_hash(model: str | None) -> str | None:
    """A hash of the file whose code makes the network, where that is somebody's own; weights do not tell of it."""
    if model is None or not is_code(model):
        return None
    return hashlib.sha256(Path(model.rpartition(":")[0]).read_bytes()).hexdigest()[:8]


def _conventions(
    checkpoint: Checkpoint, networks: dict[str, nn.Module], normalize: str | None, probe: bool, channels: int
) -> tuple[dict[str, Normalize | None], str]:
    """(the conventions in question, a sentence on where they come from).

    Raises ModelError where normalisation would be done twice, or nothing says which it is.
    """
    who = str(checkpoint.path)
    inside = next((found for net in networks.values() if (found := normalisation_in(net))), None)
    there = inside or checkpoint.normalize
    if normalize is not None:
        if there and normalize != "none":
            raise ModelError(
                f"--normalize {normalize}",
                f"the model normalises already (mean and std {format_normalization(there)})",
                "Drop --normalize.",
            )
        return {normalize: parse_normalization(normalize, channels)}, ""
    if inside:
        return {"none": None}, f"the network normalises by itself ({format_normalization(inside)})"
    if "normalize" in checkpoint.facts or checkpoint.normalize:
        how = (
            f"normalised by {format_normalization(checkpoint.normalize)}" if checkpoint.normalize else "not normalised"
        )
        return {"in the file": checkpoint.normalize}, f"images are {how}, says the file"
    if probe:
        return usual_normalizations(channels), ""
    raise ModelError(who, "does not say how images are normalised",
                     "Pass --normalize NAME (none, cifar10, imagenet, ... or mean/std), or --probe to try them on "
                     f"{PROBE_IMAGES} images.")  # fmt: skip


def _refuse_normalising_twice(best: Score, networks: dict[str, nn.Module], sample: Split) -> None:
    """Refuse a normalisation that the user named if the model seems to normalise already (raises ModelError)."""
    bare = next(score_all([(best.network, "none")], networks, {"none": None}, sample), None)
    if bare is not None and bare.accuracy > best.right[: len(sample.y)].double().mean().item() + 0.05:
        raise ModelError(
            f"--normalize {best.convention}",
            f"the model seems to normalise already: of {len(sample.y)} images {100 * bare.accuracy:.1f} % are "
            f"right without, {100 * best.accuracy:.1f} % with it", "Drop --normalize, or pass --normalize none.",
        )  # fmt: skip


def _choice_notes(best: Score, rivals: list[Score], ranked: list[Score]) -> Iterator[str]:
    """How the choice was made, in lines."""
    mine = [s for s in ranked if s.network == best.network]
    others = [s for s in ranked if s.network != best.network]
    n = len(ranked[0].right)
    if len(mine) > 1:
        yield f"input convention: {best.convention}, of those tried on {n} images"
        for score in mine[:5]:
            few = f", on {len(score.right)} images" if len(score.right) != n else ""
            loss = f"cross-entropy {score.loss.mean().item():.3f}"
            yield f"  {100 * score.accuracy:5.1f} %  {loss}  {score.convention}{few}"
        if near := [r.convention for r in rivals if r.network == best.network]:
            yield (f"  {len(best.right)} images do not tell {best.convention} from {', '.join(near)}; the smaller "
                   "cross-entropy decided. Pass --normalize if you know better")  # fmt: skip
    if others:
        count, most = len({s.network for s in others}), 100 * others[0].accuracy
        yield f"other readings of the tensors: {count}, right on {most:.1f} % at most ({others[0].network})"
        if unlike := [r.network for r in rivals if r.network != best.network]:
            yield f"  {len(best.right)} images do not tell it from {unlike[0]}. Pass --model if you know better"


def _doubtful(path: Path, network: str, convention: str, inferred: bool, found: list[str]) -> ModelError:
    """Nothing is evaluated that may be another network."""
    read = f"read as {network}" + (f", images normalised as {convention}" if convention else "")
    given = ["--model file.py:factory"] * inferred + ["--normalize NAME"] * bool(convention)
    return ModelError(
        str(path), f"is {read}, which is in doubt: {'; '.join(found)}",
        f"Say what it is: robustmail eval {path} {' '.join(given)}, or pass --accept-reading to take it as it is read.",
    )  # fmt: skip


def _assumption_notes(checkpoint: Checkpoint, network: str) -> list[str]:
    """What the tensors do not say of the network that was read off them."""
    reading = None if "model" in checkpoint.facts else _readings(checkpoint).get(network)
    if reading is None:
        return []
    return [f"read off the tensors: {reading.name}", *(f"  assumed: {text}" for text in reading.unwritten)]
