"""`robustmail inspect FILE`: what a file of weights is, told as a doctor would."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmail.checkpoints.checkpoint import Checkpoint, inspect_content
from robustmail.checkpoints.infer.candidates import Candidate
from robustmail.runtime.untrusted import data_source
from robustmail.text import plural

__all__ = ["Inspection", "inspect_checkpoint"]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint and the networks that its tensors fit."""

    checkpoint: Checkpoint
    readings: list[Candidate]

    def lines(self) -> list[str]:
        """The letter, in plain text."""
        file = self.checkpoint
        out = [f"{_printable(file.path.name)}: {file.container}, {_bytes(file.size)}, sha256 {file.sha256[:16]}…"]
        out += [*_told(file), *_weights(file), *_normalisation(file)]
        out += [f"Note: {_printable(note)}." for note in file.notes]
        if file.ailments:
            out += ["", "These weights cannot be used:", *(f"  {_printable(a)}" for a in file.ailments[:5])]
            out += [f"  and {len(file.ailments) - 5} more tensors"] if len(file.ailments) > 5 else []
            return [*out, "", "Bring a checkpoint from before that, with floating-point weights."]
        return [*out, "", *self._architecture(), "", *self._next()]

    def as_dict(self) -> dict[str, Any]:
        """The same for --json."""
        file = self.checkpoint
        return {
            "path": str(file.path), "container": file.container, "bytes": file.size, "sha256": file.sha256,
            "candidates": file.candidates, "weights": file.weights, "why": file.why, "others": file.others,
            "prefixes": list(file.cleaned.prefixes), "normalize": file.normalize, "facts": file.facts,
            "notes": list(file.notes), "ailments": list(file.ailments), "tensors": len(file.tensors),
            "numbers": _numbers(file),
            "readings": [
                {"name": r.name, "classes": r.classes, "channels": r.channels, "size": r.size,
                 "unwritten": list(r.unwritten)} for r in self.readings
            ],
        }  # fmt: skip

    def _architecture(self) -> list[str]:
        if not self.readings:
            return ["The names and shapes fit no network that robustmail knows."]
        first, *others = self.readings
        out = [f"It reads as: {first.name}, {_takes(first)}."]
        if first.unwritten:
            out.append(f"  assumed, since no tensor says it: {'; '.join(first.unwritten)}")
        if others:
            out.append(f"The shapes allow {len(others)} more, which labelled images will tell apart:")
            out += [f"  {other.name}: {_differs(other, first)}" for other in others[:5]]
            out += [f"  and {len(others) - 5} more"] if len(others) > 5 else []
        return out

    def _next(self) -> list[str]:
        file = shlex.quote(_printable(str(self.checkpoint.path)))
        if not self.readings:
            return [
                "Say which network it is, one of timm's or a function of your own that builds it:",
                f"  robustmail eval {file} --model NAME", f"  robustmail eval {file} --model file.py:factory",
            ]  # fmt: skip
        written = "normalize" in self.checkpoint.facts or self.checkpoint.normalize
        missing = [] if written else ["the normalisation of the images"]
        if not self.checkpoint.facts.get("data"):
            missing.append("the data it was trained on")
        out = [f"Not written in the file: {', '.join(missing)}."] if missing else []
        first = self.readings[0]
        known = {10: "cifar10", 100: "cifar100"} if first.channels == 3 and first.size in (None, 32) else {}
        data = (
            ""
            if data_source(self.checkpoint.facts.get("source"))
            else f" --data {known.get(first.classes, 'IMAGES.npz')}"
        )
        return [*out, "Next:", f"  robustmail eval {file}{data}{'' if written else ' --probe'}"]


def inspect_checkpoint(path: str | Path, weights: str | None = None, size: int | None = None) -> Inspection:
    """Examine a file without running code in it. Raises ModelError for what is no checkpoint or needs code."""
    checkpoint = inspect_content(path, weights, size)
    return Inspection(checkpoint, checkpoint.readings())


def _told(file: Checkpoint) -> list[str]:
    out = []
    if file.facts:
        facts = ", ".join(f"{name} {value}" for name, value in file.facts.items())
        out.append(f"Written by robustmail: {facts}.")
    if file.others:
        shown = [f"{name} = {value}" for name, value in list(file.others.items())[:12]]
        out.append(f"Beside the weights: {', '.join(map(_printable, shown))}.")
    return out


def _weights(file: Checkpoint) -> list[str]:
    name = _printable(file.weights) or "the file itself"
    out = [f"Weights: {name}, {len(file.raw_tensors)} tensors, {_numbers(file):,} numbers ({file.why})."]
    rest = [_printable(other) or "the file itself" for other in file.candidates if other != file.weights]
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


def _takes(reading: Candidate) -> str:
    side = f"{reading.size}x{reading.size}" if reading.size else "any size"
    return f"images of {plural(reading.channels, 'channel')} and {side}, {reading.classes} classes"


def _differs(other: Candidate, first: Candidate) -> str:
    return "; ".join(part for part in other.unwritten if part not in first.unwritten) or "nothing else assumed"


def _bytes(size: int) -> str:
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size} bytes"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
