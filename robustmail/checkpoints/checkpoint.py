"""One checkpoint, read and cleaned: what evaluation and `robustmail inspect` start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from robustmail.checkpoints.accuracies import stored_accuracies
from robustmail.checkpoints.cleaning import CleanStateDict, Normalisation, clean_state_dict
from robustmail.checkpoints.file_formats import read_file
from robustmail.checkpoints.infer import Candidate, candidates
from robustmail.checkpoints.state_dicts import choose_state_dict, complete_average, find_state_dicts
from robustmail.errors import ModelError
from robustmail.runtime.untrusted import parse_json

__all__ = ["Checkpoint", "inspect_content", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights: one state dict of it, cleaned, and what else the file says.

    path: of the file.
    container: its format, in words: "torch file (zip)".
    size: in bytes.
    sha256: of the file.
    weights: path of the state dict within the file, "state_dict" or "model.ema"; "" if the file is one.
    reason: why this state dict and not another one.
    tensor_counts: number of tensors of each state dict in the file, by path.
    plain_values: what is beside the state dicts, such as epoch and accuracy, as text.
    raw_tensors: the state dict as it is in the file.
    cleaned: the state dict as a bare network would have it.
    facts: what robustmail wrote into its own files: model, data, normalize, eps, ...; {} for files of others.
    image_size: side of the images in pixels, if it is known.
    accuracies: that the file says its network has on clean test images, in [0, 1], by name.
    """

    path: Path
    container: str
    size: int
    sha256: str
    weights: str
    reason: str
    tensor_counts: dict[str, int]
    plain_values: dict[str, str]
    raw_tensors: dict[str, Tensor] = field(repr=False)
    cleaned: CleanStateDict = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    accuracies: dict[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The cleaned state dict: float32, without prefixes of wrappers and without normalisation."""
        return self.cleaned.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        """What was changed in cleaning, in sentences."""
        return self.cleaned.notes

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the weights cannot be used, a sentence for each tensor; empty if they can."""
        return self.cleaned.problems

    @property
    def normalize(self) -> Normalisation | None:
        """(mean, std) that the file has for its images, if any."""
        recorded: Normalisation | None = self.facts.get("normalize")
        return recorded or self.cleaned.normalize

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The networks that fit the tensors, likeliest first; computed at the first access, which may take seconds."""
        return [] if self.problems else candidates(self.tensors, self.image_size)


def open_checkpoint(path: str | Path, weights: str | None = None, size: int | None = None) -> Checkpoint:
    """Read a checkpoint without running code that is in it.

    path: of the file. weights: which of several state dicts, by its path in the file or a part of it. size: side of the
    images in pixels, if known.
    Raises ModelError: the file cannot be read, holds no weights, or weights that are NaN, infinite or quantised.
    """
    checkpoint = inspect_content(path, weights, size)
    if checkpoint.problems:
        more = len(checkpoint.problems) - 1
        wrong = checkpoint.problems[0] + (f", and {more} more tensors are unusable" if more else "")
        raise ModelError(str(path), wrong, "Evaluate a checkpoint from before that.")
    return checkpoint


def inspect_content(path: str | Path, weights: str | None = None, size: int | None = None) -> Checkpoint:
    """Read a checkpoint as `open_checkpoint` does, but return it also if its weights cannot be used: see `problems`."""
    file = read_file(path)
    state_dicts = find_state_dicts(file.content)
    name, reason = choose_state_dict(state_dicts, weights, str(path))
    raw, borrowed = complete_average(state_dicts, name)
    cleaned = clean_state_dict(raw)
    facts = _facts(file.metadata.get("robustmail", ""))
    shape = facts.get("shape")
    return Checkpoint(
        path=file.path,
        container=file.container,
        size=file.size,
        sha256=file.sha256,
        weights=name,
        reason=reason,
        tensor_counts={name: len(tensors) for name, tensors in state_dicts.tensors.items()},
        plain_values=state_dicts.plain_values,
        raw_tensors=raw,
        cleaned=replace(cleaned, notes=(*state_dicts.notes, *borrowed, *cleaned.notes)),
        facts=facts,
        image_size=size or (shape[-1] if shape else None),
        accuracies=stored_accuracies({**file.metadata, **state_dicts.plain_values}),
    )


def _facts(text: str) -> dict[str, Any]:
    """What robustmail wrote into the file. Anybody may have written it, so values of a wrong type or size are
    dropped."""
    try:
        given = parse_json(text) if 0 < len(text) < 100_000 else {}
    except ValueError:
        return {}
    if not isinstance(given, Mapping):
        return {}
    facts: dict[str, Any] = {}
    for name in ("model", "data", "source", "norm"):
        value = given.get(name)
        if isinstance(value, str) and value.isprintable() and len(value) <= 300:
            facts[name] = value
    for name in ("classes", "channels", "epoch"):
        value = given.get(name)
        if _is_count(value):
            facts[name] = value
    shape = given.get("shape")
    if isinstance(shape, list) and len(shape) == 3 and all(_is_count(side) and 0 < side <= 4096 for side in shape):
        facts["shape"] = shape
    if _is_number(eps := given.get("eps")):
        facts["eps"] = eps
    if "normalize" in given and given["normalize"] is None:
        facts["normalize"] = None
    elif (normalize := _pair(given.get("normalize"))) is not None:
        facts["normalize"] = normalize
    return facts


def _pair(value: Any) -> Normalisation | None:
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, list) for v in value)):
        return None
    mean, std = (tuple(v) for v in value)
    is_valid = 1 <= len(mean) == len(std) <= 4 and all(map(_is_number, mean + std)) and all(s > 0 for s in std)
    return (mean, std) if is_valid else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**7


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
