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

from robustmail.checkpoints import Checkpoint, Reading, fit, make, normalisation_in, open_checkpoint
from robustmail.config.loader import find, load_source
from robustmail.config.overrides import read
from robustmail.data.sources import image_folder
from robustmail.data.testsets import TestSet, in_turn, of_images, of_path
from robustmail.errors import DataError, ModelError, RecipeError
from robustmail.evaluation.evaluator import classes_of
from robustmail.evaluation.normalization import (
    PROBED,
    Normalize,
    Score,
    fitting,
    plausible,
    read_convention,
    shortlisted,
    spelt,
)
from robustmail.models.classifier import Classifier

__all__ = ["Subject", "open_data", "open_subject", "reopen"]


@dataclass(frozen=True)
class Subject:
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
    def of(cls, model: nn.Module, data: TestSet, name: str = "model") -> Subject:
        """A model of one's own, which takes images in [0, 1]."""
        described = dict.fromkeys(("checkpoint", "weights", "normalize", "source")) | {"model": type(model).__name__}
        return cls(name, model, classes_of(model, data.part), described)


def open_data(text: str) -> TestSet:
    """`cifar10`, `npz("file.npz")`, or the path of an npz file or an image folder.

    Raises DataError or RecipeError: no such thing, damaged, images outside [0, 1].
    """
    path = Path(text)
    if path.exists():
        return replace(of_path(path), given=text)
    if "(" not in text and (path.suffix == ".npz" or (len(path.parts) > 1 and ".py:" not in text)):
        raise DataError(text, "no such file or folder")
    source = read(text, "data")
    if not callable(source):
        raise RecipeError(f"--data {text}", "is no data source", "Write cifar10, npz('FILE') or a path.")
    found = of_images(source())
    folder = isinstance(getattr(source, "of", source), image_folder)  # a subset's source is its `of`
    return replace(found, part=in_turn(found.part) if folder else found.part, given=text)


def open_subject(
    path: Path, data: TestSet, model: str | None = None, normalize: str | None = None, weights: str | None = None,
    probe: bool = False, device: torch.device | str = "cpu",
) -> Subject:  # fmt: skip
    """Read a checkpoint into a model, by what the file says, the user says, and labelled images tell.

    model: a timm name or file.py:factory; without one, what the names and shapes of the tensors fit. normalize: a
    convention; without one, what the file holds, or with `probe` the one that fits. Where several readings remain,
    images decide, and `said` tells. Raises ModelError for whatever is left open, or does not fit.
    """
    checkpoint = open_checkpoint(path, weights, data.part.x.shape[-1])
    channels = data.part.x.shape[1]
    networks = _networks(checkpoint, data, model)
    conventions, why = _conventions(checkpoint, networks, normalize, probe, channels)
    sample = data.part.first(PROBED)
    given = normalize is not None and normalize != "none"
    tried = {**conventions, "none": None} if given else conventions
    said = [why] if why else []
    if len(networks) * len(tried) > 1:
        best, told = _chosen(shortlisted(networks, tried, sample), data, conventions, given)
        said += told
        network, convention, judged = best.network, conventions[best.convention], best.model
    else:
        (network, net), (_, convention) = next(iter(networks.items())), next(iter(conventions.items()))
        judged = Classifier(net, convention).eval()
    described = {
        "checkpoint": str(path),
        "weights": checkpoint.weights,
        "model": network,
        "normalize": spelt(convention),
        "source": _source(checkpoint, model),
    }
    judged = judged.to(device)
    said = [*_assumed(checkpoint, network), *said]
    return Subject(_called(path, checkpoint), judged, classes_of(judged, data.part), described, checkpoint.sha256,
                   tuple(said))  # fmt: skip


def reopen(spec: dict[str, Any], data: TestSet, path: Path | None = None) -> Subject:
    """The model that an evaluation's results speak of, from its own path or another."""
    if spec["checkpoint"] is None and path is None:
        raise ModelError(
            "verify", "this evaluation was of a model in memory", "Call robustmail.verify(DIR, model, data)."
        )
    where = path or Path(spec["checkpoint"])
    checkpoint = open_checkpoint(where, spec["weights"] or None, data.part.x.shape[-1])
    read = _read_networks(checkpoint) if "model" not in checkpoint.facts else {}
    net = read.get(spec["model"]) or next(iter(_networks(checkpoint, data, _named(spec, checkpoint)).values()))
    normalize = read_convention(spec["normalize"], data.part.x.shape[1])
    judged = Classifier(net, normalize).eval()
    described = {k: spec[k] for k in ("weights", "model", "normalize")} | {"checkpoint": str(where)}
    return Subject(_called(where, checkpoint), judged, classes_of(judged, data.part), described, checkpoint.sha256)


def _called(path: Path, checkpoint: Checkpoint) -> str:
    """A name for people: the file's, or, for the best or last weights of a run of ours, that of its two folders."""
    ours = path.stem in ("best", "last") and "epoch" in checkpoint.facts
    return "/".join(path.resolve().parts[-3:-1]) if ours else path.stem


def _named(spec: dict[str, Any], checkpoint: Checkpoint) -> str | None:
    """The model as it was named with --model, or None where the file names it itself."""
    return None if spec["model"] == checkpoint.facts.get("model") else spec["model"]


def _networks(checkpoint: Checkpoint, data: TestSet, model: str | None) -> dict[str, nn.Module]:
    """The networks that the file may be, by name."""
    who = str(checkpoint.path)
    if model is not None:
        what: str | Callable[..., Any] = find(model) if ".py:" in model else model
        if isinstance(what, nn.Module):
            return {model: fit(checkpoint.raw_tensors, what, who)}
        return {model: fit(checkpoint.raw_tensors, make(what, checkpoint.tensors, channels=data.part.x.shape[1]), who)}
    if "model" in checkpoint.facts:
        facts = checkpoint.facts
        own = _own_model(checkpoint)
        built = make(own, checkpoint.tensors, facts.get("classes"), facts.get("channels"))
        return {facts["model"]: fit(checkpoint.tensors, built, who)}
    if not (found := _read_networks(checkpoint)):
        raise ModelError(who, "its tensors fit no network that robustmail knows",
                         "Say which it is: --model NAME (timm's or ours) or --model file.py:factory.")  # fmt: skip
    return found


def _read_networks(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return {name: reading.network() for name, reading in _readings(checkpoint).items()}


def _readings(checkpoint: Checkpoint) -> dict[str, Reading]:
    """The readings by name; a second of the same name is called so."""
    found: dict[str, Reading] = {}
    for reading in checkpoint.readings():
        k = sum(name.partition(" [")[0] == reading.name for name in found)
        found[f"{reading.name} [{k + 1}]" if k else reading.name] = reading
    return found


def _own_model(checkpoint: Checkpoint) -> Any:
    """The model of a file that robustmail wrote: a timm name, or a function in the recipe beside it."""
    name = checkpoint.facts["model"]
    recipe = checkpoint.path.parent / "recipe.py"
    if recipe.is_file():
        found = getattr(load_source(recipe), name, None)
        return found if callable(found) else name
    return name


def _source(checkpoint: Checkpoint, model: str | None) -> str | None:
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
            raise ModelError(f"--normalize {normalize}", f"the model normalises already (mean and std {spelt(there)})",
                             "Drop --normalize.")  # fmt: skip
        return {normalize: read_convention(normalize, channels)}, ""
    if inside:
        return {"none": None}, f"the network normalises by itself ({spelt(inside)})"
    if "normalize" in checkpoint.facts or checkpoint.normalize:
        how = f"normalised by {spelt(checkpoint.normalize)}" if checkpoint.normalize else "not normalised"
        return {"in the file": checkpoint.normalize}, f"images are {how}, says the file"
    if probe:
        return plausible(channels), ""
    raise ModelError(who, "does not say how images are normalised",
                     "Pass --normalize NAME (none, cifar10, imagenet, ... or mean/std), or --probe to try them on "
                     f"{PROBED} images.")  # fmt: skip


def _chosen(
    scores: list[Score], data: TestSet, conventions: dict[str, Normalize | None], given: bool
) -> tuple[Score, list[str]]:
    """(the score that fits best among what is in question, what must be said of it)."""
    allowed = [s for s in scores if s.convention in conventions]
    best, rivals, ranked = fitting(allowed, data.part)
    if given:
        bare = [s for s in scores if s.network == best.network and s.convention == "none"]
        if bare and "none" not in conventions and bare[0].accuracy > best.accuracy + 0.05 and best not in bare:
            raise ModelError(
                f"--normalize {best.convention}",
                f"the model seems to normalise already: of {len(best.right)} images {100 * bare[0].accuracy:.1f} % are "
                f"right without, {100 * best.accuracy:.1f} % with it", "Drop --normalize, or pass --normalize none.",
            )  # fmt: skip
    return best, list(_told(best, rivals, ranked))


def _told(best: Score, rivals: list[Score], ranked: list[Score]) -> Iterator[str]:
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


def _assumed(checkpoint: Checkpoint, network: str) -> list[str]:
    """What the tensors do not say of the network that was read off them."""
    reading = None if "model" in checkpoint.facts else _readings(checkpoint).get(network)
    if reading is None:
        return []
    return [f"read off the tensors: {network}", *(f"  assumed: {text}" for text in reading.unwritten)]
