"""From whatever a user brings to a model that can be judged: images in [0, 1] in, logits out, no guess unsaid."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustmail.checkpoints import Candidate, Checkpoint, build_network, load_strict, normalisation_in, open_checkpoint
from robustmail.config.loader import find_plugin, load_module
from robustmail.config.overrides import parse_value
from robustmail.data.sources import image_folder
from robustmail.data.testsets import TestSet, from_image_data, from_path, interleave_classes
from robustmail.errors import DataError, ModelError, RecipeError
from robustmail.evaluation.evaluator import classes_of
from robustmail.evaluation.normalization import (
    PROBE_IMAGES,
    Normalize,
    Score,
    best_fit,
    format_normalization,
    parse_normalization,
    shortlist,
    usual_normalizations,
)
from robustmail.models.classifier import Classifier

__all__ = ["LoadedModel", "load_data", "load_model", "reload_model"]


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
    found = from_image_data(source())
    folder = isinstance(getattr(source, "of", source), image_folder)  # a subset's source is its `of`
    return replace(found, part=interleave_classes(found.part) if folder else found.part, given=text)


def load_model(
    path: Path, data: TestSet, model: str | None = None, normalize: str | None = None, weights: str | None = None,
    probe: bool = False, device: torch.device | str = "cpu",
) -> LoadedModel:  # fmt: skip
    """Read a checkpoint into a model, by what the file says, the user says, and labelled images tell.

    model: a timm name or file.py:factory; without one, what the names and shapes of the tensors fit. normalize: a
    convention; without one, what the file holds, or with `probe` the one that fits. Where several readings remain,
    images decide, and `said` tells. Raises ModelError for whatever is left open, or does not fit.
    """
    checkpoint = open_checkpoint(path, weights, data.part.x.shape[-1])
    channels = data.part.x.shape[1]
    networks = _candidate_networks(checkpoint, data, model)
    conventions, why = _conventions(checkpoint, networks, normalize, probe, channels)
    sample = data.part.first(PROBE_IMAGES)
    given = normalize is not None and normalize != "none"
    tried = {**conventions, "none": None} if given else conventions
    said = [why] if why else []
    if len(networks) * len(tried) > 1:
        best, told = _choose(shortlist(networks, tried, sample), data, conventions, given)
        said += told
        network, convention, judged = best.network, conventions[best.convention], best.model
    else:
        (network, net), (_, convention) = next(iter(networks.items())), next(iter(conventions.items()))
        judged = Classifier(net, convention).eval()
    described = {
        "checkpoint": str(path),
        "weights": checkpoint.weights,
        "model": network,
        "normalize": format_normalization(convention),
        "source": _source_hash(checkpoint, model),
    }
    judged = judged.to(device)
    said = [*_assumption_notes(checkpoint, network), *said]
    return LoadedModel(_display_name(path, checkpoint), judged, classes_of(judged, data.part), described, checkpoint.sha256,
                   tuple(said))  # fmt: skip


def reload_model(spec: dict[str, Any], data: TestSet, path: Path | None = None) -> LoadedModel:
    """The model that an evaluation's results speak of, from its own path or another."""
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
    judged = Classifier(net, normalize).eval()
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
        what: str | Callable[..., Any] = find_plugin(model) if ".py:" in model else model
        if isinstance(what, nn.Module):
            return {model: load_strict(checkpoint.raw_tensors, what, who)}
        return {
            model: load_strict(
                checkpoint.raw_tensors, build_network(what, checkpoint.tensors, channels=data.part.x.shape[1]), who
            )
        }
    if "model" in checkpoint.facts:
        facts = checkpoint.facts
        own = _own_model(checkpoint)
        built = build_network(own, checkpoint.tensors, facts.get("classes"), facts.get("channels"))
        return {facts["model"]: load_strict(checkpoint.tensors, built, who)}
    if not (found := _read_networks(checkpoint)):
        raise ModelError(who, "its tensors fit no network that robustmail knows",
                         "Say which it is: --model NAME (timm's or ours) or --model file.py:factory.")  # fmt: skip
    return found


def _read_networks(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return {name: reading.network() for name, reading in _readings(checkpoint).items()}


def _readings(checkpoint: Checkpoint) -> dict[str, Candidate]:
    """The readings by name; a second of the same name is called so."""
    found: dict[str, Candidate] = {}
    for reading in checkpoint.readings():
        k = sum(name.partition(" [")[0] == reading.name for name in found)
        found[f"{reading.name} [{k + 1}]" if k else reading.name] = reading
    return found


def _own_model(checkpoint: Checkpoint) -> Any:
    """The model of a file that robustmail wrote: a timm name, or a function in the recipe beside it."""
    name = checkpoint.facts["model"]
    recipe = checkpoint.path.parent / "recipe.py"
    if recipe.is_file():
        found = getattr(load_module(recipe), name, None)
        return found if callable(found) else name
    return name


def _source_hash(checkpoint: Checkpoint, model: str | None) -> str | None:
    """A hash of the file whose code makes the network, where that is somebody's own; weights do not tell of it."""
    if model is not None:
        file = Path(model.rpartition(":")[0]) if ".py:" in model else None
    else:
        recipe = checkpoint.path.parent / "recipe.py"
        file = recipe if "model" in checkpoint.facts and callable(_own_model(checkpoint)) else None
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file else None


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
            raise ModelError(f"--normalize {normalize}", f"the model normalises already (mean and std {format_normalization(there)})",
                             "Drop --normalize.")  # fmt: skip
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


def _choose(
    scores: list[Score], data: TestSet, conventions: dict[str, Normalize | None], given: bool
) -> tuple[Score, list[str]]:
    """(the score that fits best among what is in question, what must be said of it)."""
    allowed = [s for s in scores if s.convention in conventions]
    best, rivals, ranked = best_fit(allowed, data.part)
    if given:
        bare = [s for s in scores if s.network == best.network and s.convention == "none"]
        if bare and "none" not in conventions and bare[0].accuracy > best.accuracy + 0.05 and best not in bare:
            raise ModelError(
                f"--normalize {best.convention}",
                f"the model seems to normalise already: of {len(best.right)} images {100 * bare[0].accuracy:.1f} % are "
                f"right without, {100 * best.accuracy:.1f} % with it", "Drop --normalize, or pass --normalize none.",
            )  # fmt: skip
    return best, list(_choice_notes(best, rivals, ranked))


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


def _assumption_notes(checkpoint: Checkpoint, network: str) -> list[str]:
    """What the tensors do not say of the network that was read off them."""
    reading = None if "model" in checkpoint.facts else _readings(checkpoint).get(network)
    if reading is None:
        return []
    return [f"read off the tensors: {network}", *(f"  assumed: {text}" for text in reading.unwritten)]
