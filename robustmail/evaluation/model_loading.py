"""From a checkpoint to a model that can be evaluated: images in [0, 1] in, logits out.

Opening a model answers three questions: which networks may the file hold (`candidate_networks`), how may their images
be normalised (`candidate_normalizations`), and which of these pairs fits labelled images, and may it be believed
(`choose`). Whatever was inferred rather than given is in `LoadedModel.notes`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustmail.checkpoints import (
    Candidate,
    Checkpoint,
    WeightsSource,
    build_network,
    convert_names,
    find_weights,
    fits,
    load_tensors,
    normalisation_in,
    open_checkpoint,
)
from robustmail.config.loader import find_plugin
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError
from robustmail.evaluation.evaluator import classes_of
from robustmail.evaluation.normalization import (
    PROBE_IMAGES,
    Normalize,
    format_normalization,
    parse_normalization,
    usual_normalizations,
)
from robustmail.evaluation.reading_choice import Choice, choose
from robustmail.models.classifier import Classifier, is_network
from robustmail.models.pretrained import pretrained_config
from robustmail.models.robustbench_zoo import zoo_normalization
from robustmail.runtime.untrusted import is_code, printable, quoted, read_text

__all__ = [
    "LoadedModel", "candidate_networks", "candidate_normalizations", "display_name", "file_notes", "load_model",
    "named_model", "reload_model", "trained_model",
]  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A model under evaluation and where it comes from.

    name: for people; the file's, or, for a run's weights, that of the run's two folders.
    model: takes images [B, C, H, W] in [0, 1] and returns logits [B, classes].
    classes: number of logits.
    spec: how the file was read, in plain values: checkpoint, weights, model, normalize, source. `reload_model` needs no
    more to read it in the same way.
    sha256: of the file; None for a model in memory.
    notes: what was inferred rather than given, in sentences.
    doubts: what speaks against the way the file was read, in sentences; not empty only if the caller accepted that.
    """

    name: str
    model: nn.Module
    classes: int
    spec: dict[str, Any]
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all parameters and buffers, the normalisation among them; 16 hexadecimal digits."""
        sha = hashlib.sha256()
        for name, tensor in sorted({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}.items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    @property
    def weights(self) -> dict[str, Any]:
        """What identifies the weights: file, sha256 and fingerprint."""
        return {"file": self.spec.get("checkpoint"), "sha256": self.sha256, "fingerprint": self.fingerprint}

    @classmethod
    def of(cls, model: nn.Module, data: TestSet, name: str = "model") -> LoadedModel:
        """A model in memory, which takes images in [0, 1]. Raises ModelError if it fails on the images of `data`."""
        spec = dict.fromkeys(("checkpoint", "weights", "normalize", "source")) | {"model": type(model).__name__}
        return cls(name, model, classes_of(model, data.part), spec)


def load_model(
    path: str | Path | WeightsSource,
    data: TestSet,
    model: str | None = None,
    normalize: str | None = None,
    weights: str | None = None,
    probe: bool = False,
    device: torch.device | str = "cpu",
    accept_reading: bool = False,
    ignore_unused: bool = False,
) -> LoadedModel:
    """Load a checkpoint of any origin into a model, without running code that is in it.

    path: a file (torch, safetensors or npz), a folder with one, or hf://OWNER/NAME/FILE@REVISION, as `find_weights`
    takes it. A config.json in the folder may name the network and the normalisation.
    data: labelled images of the kind that the model was trained on; they decide between several ways to read the file.
    model: name of a network of timm or of robustmail, or file.py:factory; by default, all networks that fit the names
    and shapes of the file's tensors are tried.
    normalize: `cifar10`, `none`, `mean/std`; by default, what the file says.
    weights: which of several state dicts in the file, by its name there.
    probe: if the file does not say how images are normalised, try the usual ways.
    device: where the model shall be.
    accept_reading: take the way the file was read even if something speaks against it; then see `LoadedModel.doubts`.
    ignore_unused: leave out tensors of the file that the named network has no place for, such as an auxiliary head.

    Raises ModelError: the file cannot be read, or does not fit the network; nothing says which network or which
    normalisation it is; images would be normalised twice; or the way it was read is in doubt.
    """
    source = find_weights(path)
    model = named_model(source, model)
    checkpoint = open_checkpoint(source.path, weights, data.part.x.shape[-1])
    channels = data.part.x.shape[1]
    networks, left_out = candidate_networks(checkpoint, channels, model, ignore_unused)
    networks = {name: net.to(device) for name, net in networks.items()}
    normalizations, origin = candidate_normalizations(
        checkpoint, networks, channels, normalize, probe, source.normalize
    )
    is_guessed = model is None and "model" not in checkpoint.facts
    is_named = normalize not in (None, "none")
    choice = choose(checkpoint, networks, normalizations, data.part, is_guessed, is_named, accept_reading)
    spec = _spec(
        source.reference, checkpoint, choice.network, normalizations[choice.normalization], model, ignore_unused
    )
    notes = [*source.notes, *file_notes(checkpoint), *left_out, *_assumption_notes(checkpoint, choice.network)]
    notes += [*_title_note(choice), *filter(None, [origin]), *choice.notes]
    loaded = choice.model.to(device)
    classes = classes_of(loaded, data.part)
    name = source.name or display_name(checkpoint)
    return LoadedModel(name, loaded, classes, spec, checkpoint.sha256, tuple(notes), tuple(choice.doubts))


def named_model(source: WeightsSource, model: str | None) -> str | None:
    """The network's name: the caller's, else that of config.json. Raises ModelError: one that cannot be built here."""
    if model is None and source.transformers:
        raise ModelError(source.reference, f"its config.json is of the transformers library ({source.transformers})",
                         "Load it there in Python and pass it to robustmail.evaluate(model, data), which takes outputs "
                         "with .logits.")  # fmt: skip
    return model or source.model


def trained_model(model: nn.Module, path: Path, data: TestSet) -> LoadedModel:
    """A model in memory whose weights a training run has written to `path`, described as `load_model` would do."""
    checkpoint = open_checkpoint(path)
    spec = _spec(str(path), checkpoint, checkpoint.facts["model"], checkpoint.normalize)
    return LoadedModel(display_name(checkpoint), model, classes_of(model, data.part), spec, checkpoint.sha256)


def reload_model(
    spec: dict[str, Any], data: TestSet, path: str | Path | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """The model of an earlier evaluation. `spec` decides which code is run, so it must be trusted.

    spec: as in `LoadedModel.spec`. data: images of the same shape. path: of the checkpoint, if it was moved.
    Raises ModelError: the model was one in memory, or its file cannot be read in this way.
    """
    if spec["checkpoint"] is None and path is None:
        raise ModelError(
            "verify", "this evaluation was of a model in memory", "Call robustmail.verify(DIR, model, data)."
        )
    source = find_weights(path or spec["checkpoint"])
    channels = data.part.x.shape[1]
    checkpoint = open_checkpoint(source.path, spec["weights"] or None, data.part.x.shape[-1])
    fitting = {} if "model" in checkpoint.facts else _fitting_networks(checkpoint)
    network = fitting.get(spec["model"])
    if network is None:
        is_own_name = spec["model"] == checkpoint.facts.get("model")
        named, unused = None if is_own_name else spec["model"], spec.get("ignore_unused", False)
        (network,) = candidate_networks(checkpoint, channels, named, unused)[0].values()
    model = Classifier(network, parse_normalization(spec["normalize"], channels)).eval().to(device)
    kept = [key for key in ("weights", "model", "normalize", "ignore_unused") if key in spec]
    new_spec = {key: spec[key] for key in kept} | {"checkpoint": source.reference}
    name = source.name or display_name(checkpoint)
    return LoadedModel(name, model, classes_of(model, data.part), new_spec, checkpoint.sha256)


def _spec(
    reference: str,
    checkpoint: Checkpoint,
    network: str,
    normalize: Normalize | None,
    model: str | None = None,
    ignore_unused: bool = False,
) -> dict[str, Any]:
    """What `reload_model` needs to load the model again; model: as the caller named it, which may name code."""
    return {
        "checkpoint": reference,
        "weights": checkpoint.weights,
        "model": network,
        "normalize": format_normalization(normalize),
        "source": _source_hash(model),
        **({"ignore_unused": True} if ignore_unused else {}),
    }


def display_name(checkpoint: Checkpoint) -> str:
    """The file's name for people; for a run's weights, that of the run's two folders."""
    path = checkpoint.path
    if "epoch" not in checkpoint.facts:
        return path.stem
    run = "/".join(path.resolve().parts[-3:-1])
    if path.stem in ("best", "last"):
        return run
    return f"{run}/{path.stem}" if path.stem.startswith("epoch-") else path.stem


# Question 1: which networks may the file hold?


def candidate_networks(
    checkpoint: Checkpoint, channels: int, model: str | None = None, ignore_unused: bool = False
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """(the networks that a file may hold, with its weights, by name, the likeliest first; what was left out, in
    sentences).

    channels: of the images. model: the network's name or file.py:factory, if the caller knows it; otherwise the file
    may name it, and otherwise all networks that fit its tensors are candidates. ignore_unused: leave out tensors that
    the named network has no place for.
    Raises ModelError: no network fits, or the file names one whose code the caller has to allow.
    """
    path = str(checkpoint.path)
    if model is not None:
        network, notes = _named_network(checkpoint, channels, model, ignore_unused)
        if checkpoint.normalize:
            from robustmail.models.robustbench_networks import use_statistics  # imports timm

            use_statistics(network, checkpoint.normalize)
        return {model: network}, notes
    if "model" in checkpoint.facts:
        facts = checkpoint.facts
        network = build_network(
            _recorded_model(checkpoint), checkpoint.tensors, facts.get("classes"), facts.get("channels")
        )
        network, notes = load_tensors(checkpoint.tensors, network, path)
        return {facts["model"]: network}, notes
    if not (fitting := _fitting_networks(checkpoint)):
        raise ModelError(path, "its tensors fit no network that robustmail knows",
                         "Say which it is: --model NAME (timm's or ours) or --model file.py:factory.")  # fmt: skip
    return fitting, ()


def _named_network(
    checkpoint: Checkpoint, channels: int, model: str, ignore_unused: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network that the caller named, with the file's weights, and what was left out. Raises ModelError."""
    path = str(checkpoint.path)
    source: str | Callable[..., Any] = find_plugin(model) if is_code(model) else model
    if not isinstance(source, nn.Module):
        source = build_network(source, checkpoint.tensors, channels=channels)
    try:
        return load_tensors(checkpoint.raw_tensors, source, path, ignore_unused)
    except ModelError:
        renamed = {} if is_code(model) else convert_names(model, checkpoint.tensors, source)
        if not renamed or not fits(renamed, source):
            raise
    note = f"its names are those of an older {model}: timm's own conversion renames them"
    return load_tensors(renamed, source, path)[0], (note,)


def file_notes(checkpoint: Checkpoint) -> list[str]:
    """Which of several state dicts was taken, and what was changed in it."""
    others = [name or "the file itself" for name in checkpoint.tensor_counts if name != checkpoint.weights]
    chosen = (
        f"weights: {checkpoint.weights or 'the file itself'} ({checkpoint.reason}); also there, with --weights NAME"
    )
    notes = [f"{chosen}: {', '.join(others[:6])}"] if others else []
    return [printable(note) for note in (*notes, *checkpoint.notes)]


def _fitting_networks(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return {name: candidate.network for name, candidate in _candidates(checkpoint).items()}


def _candidates(checkpoint: Checkpoint) -> dict[str, Candidate]:
    """The candidates by a name with all assumptions, so that it means the same whenever the file is read again."""
    return {": ".join(filter(None, [c.name, "; ".join(c.assumptions)])): c for c in checkpoint.candidates}


def _recorded_model(checkpoint: Checkpoint) -> str:
    """The name that robustmail wrote into the file, of a network of timm or ours; the function of a recipe is code, and
    a file does not decide which code is run (ModelError)."""
    name: str = checkpoint.facts["model"]
    if is_network(name):
        return name
    function, recipe = name.rpartition(".py:")[2], checkpoint.path.parent / "recipe.py"
    is_beside = function.isidentifier() and recipe.is_file() and function in re.findall(r"\w+", read_text(recipe))
    wrong = f"its network is {function}{' of the recipe beside it' if is_beside else ''}, which is code"
    factory = f"{recipe}:{function}" if is_beside else "file.py:factory"
    raise ModelError(str(checkpoint.path), wrong, f"Pass {quoted('--model', factory)} if you trust it.")


def _source_hash(model: str | None) -> str | None:
    """A hash of the file whose code builds the network, if --model names one: the weights do not cover that code."""
    if model is None or not is_code(model):
        return None
    return hashlib.sha256(Path(model.rpartition(":")[0]).read_bytes()).hexdigest()[:8]


def _assumption_notes(checkpoint: Checkpoint, network: str) -> list[str]:
    candidate = None if "model" in checkpoint.facts else _candidates(checkpoint).get(network)
    if candidate is None:
        return []
    return [f"read off the tensors: {candidate.name}", *(f"  assumed: {text}" for text in candidate.assumptions)]


def _title_note(choice: Choice) -> list[str]:
    """Which of the networks that a name of RobustBench stands for it is."""
    title = getattr(choice.model.net, "title", None)
    return [f"{choice.network} is read as {title}"] if title else []


# Question 2: how may their images be normalised?


def candidate_normalizations(
    checkpoint: Checkpoint,
    networks: dict[str, nn.Module],
    channels: int,
    normalize: str | None = None,
    probe: bool = False,
    config: Normalize | None = None,
) -> tuple[dict[str, Normalize | None], str]:
    """(the normalisations that images may need, by name; a sentence that says where the only one comes from, or "").

    networks: the candidates, of which one may normalise by itself. channels: of the images. normalize: what the caller
    says, in the words of `parse_normalization`. probe: try the usual ones if the file does not say. config: what a
    config.json beside the file says.
    Raises ModelError: images would be normalised twice, or nothing says how.
    """
    in_network = next((pair for network in networks.values() if (pair := normalisation_in(network))), None)
    recorded = checkpoint.normalize
    if normalize is not None:
        if normalize != "none" and (pair := in_network or recorded):
            wrong = f"the model normalises already (mean and std {format_normalization(pair)})"
            raise ModelError(f"--normalize {normalize}", wrong, "Drop --normalize.")
        return {normalize: parse_normalization(normalize, channels)}, ""
    if in_network:
        return {"none": None}, f"the network normalises by itself ({format_normalization(in_network)})"
    if "normalize" in checkpoint.facts or recorded:
        how = f"normalised by {format_normalization(recorded)}" if recorded else "not normalised"
        return {"in the file": recorded}, f"images are {how}, says the file"
    if config is not None:
        return {"in config.json": config}, f"images are normalised by {format_normalization(config)}, says config.json"
    if probe:
        return usual_normalizations(channels), ""
    name, network = next(iter(networks.items()))
    if known := zoo_normalization(name, _outputs(network)):
        how = "not normalised" if known == "none" else f"normalised by {known}"
        return {known: parse_normalization(known, channels)}, f"images are {how}, as RobustBench's {name}"
    usual = "(none, cifar10, imagenet, ... or mean/std)"
    if (prepared := pretrained_config(name)) is not None:
        timm_has = format_normalization((prepared.mean, prepared.std))
        usual = f"(timm's weights of {name} have {timm_has}; or none, mean/std)"
    raise ModelError(str(checkpoint.path), "does not say how images are normalised",
                     f"Pass --normalize NAME {usual}, or --probe to try them on {PROBE_IMAGES} images.")  # fmt: skip


def _outputs(network: nn.Module) -> int:
    """The width of the last linear layer; 0 without one."""
    return next((m.out_features for m in reversed(list(network.modules())) if isinstance(m, nn.Linear)), 0)


# Question 3: which pair fits, and may it be believed?
