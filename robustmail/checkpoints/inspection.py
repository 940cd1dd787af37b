"""`robustmail inspect FILE`: what is in a checkpoint, and what to do next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmail.checkpoints.checkpoint import Checkpoint, inspect_content
from robustmail.checkpoints.infer import Candidate
from robustmail.checkpoints.source import WeightsSource, find_weights
from robustmail.runtime.untrusted import data_source
from robustmail.text import plural

__all__ = ["Inspection", "inspect_checkpoint"]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` returns.

    checkpoint: the file, read and cleaned. candidates: the networks that its tensors fit, likeliest first. source:
    where the file comes from, and what config.json beside it says.
    """

    checkpoint: Checkpoint
    candidates: list[Candidate]
    source: WeightsSource

    def lines(self) -> list[str]:
        """The report that `robustmail inspect` prints, in plain text."""
        file = self.checkpoint
        out = [f"Note: {note}." for note in self.source.notes]
        out += [f"{_printable(file.path.name)}: {file.container}, {_bytes(file.size)}, sha256 {file.sha256[:16]}…"]
        out += [*_recorded(file), *_weights(file), *_normalisation(file)]
        out += [f"Note: {_printable(note)}." for note in file.notes]
        if file.problems:
            out += ["", "These weights cannot be used:", *(f"  {_printable(a)}" for a in file.problems[:5])]
            out += [f"  and {len(file.problems) - 5} more tensors"] if len(file.problems) > 5 else []
            return [*out, "", "Bring a checkpoint from before that, with floating-point weights."]
        return [*out, "", *self._architecture(), "", *self._next()]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, as `robustmail inspect --json` prints it."""
        file = self.checkpoint
        return {
            "path": str(file.path), "source": self.source.reference,
            "container": file.container, "bytes": file.size, "sha256": file.sha256,
            "candidates": file.tensor_counts, "weights": file.weights, "why": file.reason, "others": file.plain_values,
            "prefixes": list(file.cleaned.prefixes), "normalize": file.normalize, "facts": file.facts,
            "notes": list(file.notes), "ailments": list(file.problems), "tensors": len(file.tensors),
            "numbers": _numbers(file),
            "readings": [
                {"name": r.name, "classes": r.classes, "channels": r.channels, "size": r.size,
                 "unwritten": list(r.assumptions)} for r in self.candidates
            ],
        }  # fmt: skip

    def _architecture(self) -> list[str]:
        if not self.candidates:
            return ["The names and shapes fit no network that robustmail knows."]
        first, *rest = self.candidates
        out = [f"It reads as: {first.name}, {_takes(first)}."]
        if first.assumptions:
            out.append(f"  assumed, since no tensor says it: {'; '.join(first.assumptions)}")
        if rest:
            out.append(f"The shapes allow {len(rest)} more, which labelled images will tell apart:")
            out += [f"  {candidate.name}: {_differs(candidate, first)}" for candidate in rest[:5]]
            out += [f"  and {len(rest) - 5} more"] if len(rest) > 5 else []
        return out

    def _next(self) -> list[str]:
        file = shlex.quote(_printable(self.source.given))
        if not self.candidates and not self.source.model:
            return [
                "Say which network it is, one of timm's or a function of your own that builds it:",
                f"  robustmail eval {file} --model NAME",
                f"  robustmail eval {file} --model file.py:factory",
            ]
        has_normalization = "normalize" in self.checkpoint.facts or self.checkpoint.normalize or self.source.normalize
        missing = [] if has_normalization else ["the normalisation of the images"]
        if not self.checkpoint.facts.get("data"):
            missing.append("the data it was trained on")
        out = [f"Not written in the file: {', '.join(missing)}."] if missing else []
        is_recorded = data_source(self.checkpoint.facts.get("source")) is not None
        data = "" if is_recorded else f" --data {self._usual_data()}"
        return [*out, "Next:", f"  robustmail eval {file}{data}{'' if has_normalization else ' --probe'}"]

    def _usual_data(self) -> str:
        """The data set to try: CIFAR's for small colour images, by the number of classes."""
        first, config = next(iter(self.candidates), None), self.source.config
        is_small = config is None or config.crop == 32
        if first is None or first.channels != 3 or first.size not in (None, 32) or not is_small:
            return "IMAGES.npz"
        return {10: "cifar10", 100: "cifar100"}.get(first.classes, "IMAGES.npz")


def inspect_checkpoint(
    path: str | Path | WeightsSource, weights: str | None = None, size: int | None = None
) -> Inspection:
    """Say what is in a checkpoint, without running code that is in it: format, weights, what was recorded, and the
    networks that have these tensors.

    path: of the file, or what else `find_weights` takes: a folder, hf://OWNER/NAME/FILE. weights: which of several
    state dicts, by its path in the file. size: side of the images in pixels, if known.
    Raises ModelError: the file is not a checkpoint, is damaged, or could only be read by running its code. Raises as
    `find_weights`.
    """
    source = find_weights(path)
    checkpoint = inspect_content(source.path, weights, size)
    return Inspection(checkpoint, checkpoint.candidates, source)


def _recorded(file: Checkpoint) -> list[str]:
    out = []
    if file.facts:
        facts = ", ".join(f"{name} {value}" for name, value in file.facts.items())
        out.append(f"Written by robustmail: {facts}.")
    if file.plain_values:
        shown = [f"{name} = {value}" for name, value in list(file.plain_values.items())[:12]]
        out.append(f"Beside the weights: {', '.join(map(_printable, shown))}.")
    return out


def _weights(file: Checkpoint) -> list[str]:
    weights = _printable(file.weights) or "the file itself"
    out = [f"Weights: {weights}, {len(file.raw_tensors)} tensors, {_numbers(file):,} numbers ({file.reason})."]
    rest = [_printable(name) or "the file itself" for name in file.tensor_counts if name != file.weights]
    if rest:
        more = f" and {len(rest) - 6} more" if len(rest) > 6 else ""
        out.append(f"Also there, with --weights NAME: {', '.join(rest[:6])}{more}.")
    if file.cleaned.prefixes:
        out.append(f"Every name begins with {_printable(''.join(file.cleaned.prefixes))}, which is taken off.")
    return out


def _normalisation(file: Checkpoint) -> list[str]:
    if file.normalize is None:
        return []
    mean, std = (", ".join(f"{value:g}" for value in part) for part in file.normalize)
    return [f"Normalisation in the file: mean {mean}; std {std}."]


def _numbers(file: Checkpoint) -> int:
    return sum(tensor.numel() for tensor in file.tensors.values())


def _takes(candidate: Candidate) -> str:
    side = f"{candidate.size}x{candidate.size}" if candidate.size else "any size"
    return f"images of {plural(candidate.channels, 'channel')} and {side}, {candidate.classes} classes"


def _differs(candidate: Candidate, first: Candidate) -> str:
    return "; ".join(part for part in candidate.assumptions if part not in first.assumptions) or "nothing else assumed"


def _bytes(size: int) -> str:
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size} bytes"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
