"""One file of weights, read and cleaned: what the evaluation and the doctor start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from robustmail.checkpoints.accuracies import stored_accuracies
from robustmail.checkpoints.file_formats import read_file
from robustmail.checkpoints.infer.candidates import Candidate, candidates
from robustmail.checkpoints.state_dicts import (
    CleanStateDict,
    Normalisation,
    choose_state_dict,
    clean_state_dict,
    find_state_dicts,
)
from robustmail.errors import ModelError
from robustmail.runtime.untrusted import parse_json

__all__ = ["Checkpoint", "inspect_content", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, as a bare network would have them, and what else the file says.

    tensors: float32, without wrappers' prefixes and normalisation; raw_tensors: as they are in the file.
    normalize: (mean, std) found in the file. facts: what robustmail itself wrote there, or {}.
    """

    path: Path
    container: str
    size: int
    sha256: str
    weights: str
    """where in the file: "state_dict", or "" for the file itself"""
    why: str
    """why these and not others"""
    candidates: dict[str, int]
    """tensors of each set of weights in the file"""
    others: dict[str, str]
    """the values beside them"""
    raw_tensors: dict[str, Tensor] = field(repr=False)
    cleaned: CleanStateDict = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    """that the file says its network has on clean test images, in [0, 1]"""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.cleaned.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        return self.cleaned.notes

    @property
    def ailments(self) -> tuple[str, ...]:
        """Why the weights cannot be used; empty for a healthy file."""
        return self.cleaned.ailments

    @property
    def normalize(self) -> Normalisation | None:
        written: Normalisation | None = self.facts.get("normalize")
        return written or self.cleaned.normalize

    @cached_property
    def _readings(self) -> list[Candidate]:
        return [] if self.ailments else candidates(self.tensors, self.image_size)

    def readings(self) -> list[Candidate]:
        """The networks that fit, likeliest first; worked out when first asked for."""
        return self._readings


def open_checkpoint(path: str | Path, weights: str | None = None, size: int | None = None) -> Checkpoint:
    """Read a file of weights without running code in it; `weights` names the set to take where there are several.

    size: the side of the images, where it is known. Raises ModelError, also for weights that are NaN or quantised.
    """
    checkpoint = inspect_content(path, weights, size)
    if checkpoint.ailments:
        more = len(checkpoint.ailments) - 1
        wrong = checkpoint.ailments[0] + (f", and {more} more tensors are unusable" if more else "")
        raise ModelError(str(path), wrong, "Evaluate a checkpoint from before that.")
    return checkpoint


def inspect_content(path: str | Path, weights: str | None = None, size: int | None = None) -> Checkpoint:
    """As open_checkpoint, but weights that cannot be used are returned, with their `ailments`."""
    opened = read_file(path)
    found = find_state_dicts(opened.content)
    chosen, why = choose_state_dict(found.weights, weights, str(path))
    raw = found.weights[chosen]
    facts = _facts(opened.metadata.get("robustmail", ""))
    shape = facts.get("shape")
    return Checkpoint(
        opened.path, opened.container, opened.size, opened.sha256, chosen, why,
        {name: len(tensors) for name, tensors in found.weights.items()}, found.others,
        raw, clean_state_dict(raw), facts, size or (shape[-1] if shape else None),
        stored_accuracies({**opened.metadata, **found.others}),
    )  # fmt: skip


def _facts(text: str) -> dict[str, Any]:
    """What robustmail wrote into the file, as far as it is of the right kind: anybody may have written it."""
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
    fine = 1 <= len(mean) == len(std) <= 4 and all(map(_is_number, mean + std)) and all(s > 0 for s in std)
    return (mean, std) if fine else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**7


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
