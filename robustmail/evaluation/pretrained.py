"""A trained model out of a file, a folder or the hub, without images: only where nothing has to be guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robustmail.checkpoints import Checkpoint, WeightsSource, check_exists, find_weights, open_checkpoint
from robustmail.checkpoints.infer import stem_channels
from robustmail.errors import ModelError
from robustmail.evaluation.model_loading import (
    candidate_networks,
    candidate_normalizations,
    display_name,
    file_notes,
    named_model,
)
from robustmail.models.classifier import Classifier
from robustmail.models.pretrained import pretrained_config

__all__ = ["Pretrained", "from_pretrained", "open_pretrained"]


@dataclass(frozen=True)
class Pretrained:
    """A model that was opened without images, and where it comes from.

    name: for people. model: images [B, C, H, W] in [0, 1] -> logits [B, classes], in eval mode. shape: (C, H, W) of its
    images, where the file, config.json or timm says it. sha256: of the file. notes: how it was read, in sentences.
    """

    name: str
    model: Classifier
    shape: tuple[int, int, int] | None
    sha256: str | None
    notes: tuple[str, ...] = ()


def from_pretrained(
    source: str | Path | WeightsSource,
    model: str | None = None,
    normalize: str | None = None,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    ignore_unused: bool = False,
) -> Classifier:
    """A trained model: images [B, C, H, W] in [0, 1] in, logits [B, classes] out, normalisation inside, in eval mode.

    No code that is in the file or beside it is run, and nothing is guessed: where the file does not say which network
    it is, or how images are normalised, the caller does, or `load_model` decides by labelled images.
    source: the folder of a run, a file (torch, safetensors or npz), a folder as the Hugging Face hub has it, or
    hf://OWNER/NAME/FILE@REVISION.
    model: name of a network of timm or of robustmail, or file.py:factory; by default, what the file or its config.json
    says.
    normalize: `cifar10`, `none`, `mean/std`; by default, what the file or config.json says.
    weights: which of several state dicts in the file, by its name there.
    device: where the model shall be.
    ignore_unused: leave out tensors of the file that the named network has no place for.

    Raises ModelError: the file cannot be read or does not fit the network; nothing says which network or which
    normalisation it is; or images would be normalised twice. Raises RunError: a run's folder without weights.
    """
    opened = open_pretrained(source, model, normalize, weights, ignore_unused)
    return opened.model.to(device)


def open_pretrained(
    source: str | Path | WeightsSource,
    model: str | None = None,
    normalize: str | None = None,
    weights: str | None = None,
    ignore_unused: bool = False,
) -> Pretrained:
    """The model of `from_pretrained` on the CPU, with its name, the shape of its images and how it was read."""
    found = find_weights(source)
    check_exists(found.path)
    named = named_model(found, model)
    checkpoint = open_checkpoint(found.path, weights)
    if named is None and "model" not in checkpoint.facts:
        raise ModelError(found.reference, "does not say which network it is, and there are no images to decide by",
                         "Pass --model NAME (timm's or ours) or --model file.py:factory, or labelled images, --data; "
                         "in Python model=, or load_model(path, data).")  # fmt: skip
    channels = _channels(checkpoint)
    networks, left_out = candidate_networks(checkpoint, channels, named, ignore_unused)
    normalizations, origin = candidate_normalizations(checkpoint, networks, channels, normalize, False, found.normalize)
    ((network_name, network),), (normalization,) = networks.items(), normalizations.values()
    notes = (*found.notes, *file_notes(checkpoint), *left_out, *filter(None, [origin]))
    return Pretrained(
        found.name or display_name(checkpoint),
        Classifier(network, normalization).eval(),
        _shape(found, checkpoint, network_name, channels),
        checkpoint.sha256,
        notes,
    )


def _channels(checkpoint: Checkpoint) -> int:
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return checkpoint.facts.get("channels") or stem_channels(shapes) or 3


def _shape(found: WeightsSource, checkpoint: Checkpoint, network: str, channels: int) -> tuple[int, int, int] | None:
    """(C, H, W) of the images: a run's own, else as config.json or timm has them prepared; None if nothing says it."""
    if shape := checkpoint.facts.get("shape"):
        return (shape[0], shape[1], shape[2])
    config = found.config or pretrained_config(network)
    return (channels, config.crop, config.crop) if config else None
