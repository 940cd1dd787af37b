"""Attack paths: the same examples attacked from several starts, with several steps, and by another attack.

What is kept of a path is all that a margin can read of it: where it ends, and its trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.lm_pgd import LMPGD
from robustmail.attacks.per_image_noise import per_image_noise
from robustmail.attacks.pgd import PGD
from robustmail.data.dataset import Split
from robustmail.evaluation.evaluator import image_batch
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.norms import Norm
from robustmail.plugin_calls import call_plugin
from robustmail.records import ProgressUpdate
from robustmail.step import Trace

__all__ = ["AttackPath", "PathSpec", "second_path", "path_specs", "run_paths"]


@dataclass(frozen=True)
class PathSpec:
    """An attack that keeps a trace, and the seed of its start."""

    name: str
    attack: Any
    seed: int


@dataclass(frozen=True)
class AttackPath:
    """Where an attack ended and what it saw, on the CPU.

    x_adv: [N, C, H, W]; trace: [K, N] each; broken: [N] bool, is the end misclassified?
    """

    x_adv: Tensor
    trace: Trace
    broken: Tensor

    def take(self, which: slice, device: torch.device) -> AttackPath:
        """The same of some examples, on a device."""
        trace = Trace(self.trace.correct[:, which].to(device), self.trace.p_true[:, which].to(device))
        return AttackPath(self.x_adv[which].to(device), trace, self.broken[which].to(device))


def path_specs(eps: float, norm: Norm, steps: int, seed: int) -> list[PathSpec]:
    """The paths, the reference first: the training attack, PGD with steps of eps / 4 (2/255 at 8/255).

    Then two other starts, half and double the step, and LM-PGD where there is one (in l-inf); each of `steps` steps, so
    that all traces have one length.
    """
    pgd = PGD(eps=eps, alpha=eps / 4, steps=steps, norm=norm)
    found = [
        PathSpec("PGD", pgd, seed),
        PathSpec("PGD, second start", pgd, seed + 1),
        PathSpec("PGD, third start", pgd, seed + 2),
        PathSpec("PGD, half the step", replace(pgd, alpha=eps / 8), seed),
        PathSpec("PGD, double the step", replace(pgd, alpha=eps / 2), seed),
    ]
    if norm == "linf":
        found.append(PathSpec("LM-PGD", LMPGD(eps=eps, alpha=eps / 4, steps=steps), seed))
    return found


def run_paths(model: nn.Module, part: Split, plan: PathSpec, room: BatchSizer) -> Iterator[ProgressUpdate | AttackPath]:
    """Take a path with every example, in exact float32; the last thing yielded is the path.

    A start is noise of the image's own, so that neither the batch nor the rest of the set can change a path.
    """
    found: list[AttackPath] = []
    n, done = len(part.y), 0
    while done < n:
        began = time.perf_counter()
        found.append(room.with_oom_retry(partial(_walk, model, part, plan, done, room)))
        done += len(found[-1].broken)
        room.adapt(time.perf_counter() - began)
        yield ProgressUpdate(plan.name, done, n)
    trace = Trace(*(torch.cat([getattr(p.trace, name) for p in found], 1) for name in Trace._fields))
    yield AttackPath(torch.cat([p.x_adv for p in found]), trace, torch.cat([p.broken for p in found]))


def second_path(reference: AttackPath, other: AttackPath) -> Trace:
    """Another path's trace for the reference's end: for each example for which both ends are judged alike.

    An example that one path breaks and the other does not has no second path to the same fate here; it keeps its own
    trace, so that a margin is not called path-dependent for telling the two fates apart.
    """
    alike = reference.broken == other.broken
    return Trace(other.trace.correct.where(alike, reference.trace.correct),
                 other.trace.p_true.where(alike, reference.trace.p_true))  # fmt: skip


def _walk(model: nn.Module, part: Split, plan: PathSpec, start: int, room: BatchSizer) -> AttackPath:
    x, y = image_batch(model, part, slice(start, start + room.batch))
    with exact_inference(model, room.pass_size) as view:
        with per_image_noise(x, plan.seed, "path"):
            found = call_plugin("attack", plan.attack, view, x, y)
        with torch.no_grad():
            broken = view(found.x).argmax(1) != y
    return AttackPath(found.x, found.trace, broken).take(slice(None), torch.device("cpu"))
