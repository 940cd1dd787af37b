"""Attack paths: the same examples attacked from several starts, with several step sizes, and by another attack.

A path holds what a margin can read of an attack: the adversarial examples and the trace.
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

__all__ = ["AttackPath", "PathSpec", "second_path", "path_specs", "run_path"]


@dataclass(frozen=True)
class PathSpec:
    """A named attack that records a trace, and the seed of its random start."""

    name: str
    attack: Any
    seed: int


@dataclass(frozen=True)
class AttackPath:
    """The end of an attack and its trace, on the CPU.

    x_adv: adversarial examples, [N, C, H, W].
    trace: [K, N] each, K = iterates.
    broken: [N] bool, True where x_adv is misclassified.
    """

    x_adv: Tensor
    trace: Trace
    broken: Tensor

    def take(self, rows: slice, device: torch.device) -> AttackPath:
        """Select examples and move them to a device."""
        trace = Trace(self.trace.correct[:, rows].to(device), self.trace.p_true[:, rows].to(device))
        return AttackPath(self.x_adv[rows].to(device), trace, self.broken[rows].to(device))


def path_specs(eps: float, norm: Norm, steps: int, seed: int) -> list[PathSpec]:
    """List the attack paths to compare; the first is the reference: PGD with step size eps / 4 (2/255 at 8/255).

    The others: PGD from two other random starts, PGD with half and with double the step size, and in l-inf LM-PGD. All
    take the same number of steps, so that all traces have the same length.
    """
    pgd = PGD(eps=eps, alpha=eps / 4, steps=steps, norm=norm)
    specs = [
        PathSpec("PGD", pgd, seed),
        PathSpec("PGD, second start", pgd, seed + 1),
        PathSpec("PGD, third start", pgd, seed + 2),
        PathSpec("PGD, half the step", replace(pgd, alpha=eps / 8), seed),
        PathSpec("PGD, double the step", replace(pgd, alpha=eps / 2), seed),
    ]
    if norm == "linf":
        specs.append(PathSpec("LM-PGD", LMPGD(eps=eps, alpha=eps / 4, steps=steps), seed))
    return specs


def run_path(model: nn.Module, part: Split, spec: PathSpec, sizer: BatchSizer) -> Iterator[ProgressUpdate | AttackPath]:
    """Attack every example in exact float32; yields progress, then the path.

    The random start of an image depends on the image and the seed alone, so a path depends neither on the batch size
    nor on the other images.
    """
    batches: list[AttackPath] = []
    n, n_done = len(part.y), 0
    while n_done < n:
        start_time = time.perf_counter()
        batches.append(sizer.with_oom_retry(partial(_attack_batch, model, part, spec, n_done, sizer)))
        n_done += len(batches[-1].broken)
        sizer.adapt(time.perf_counter() - start_time)
        yield ProgressUpdate(spec.name, n_done, n)
    trace = Trace(*(torch.cat([getattr(path.trace, name) for path in batches], 1) for name in Trace._fields))
    yield AttackPath(torch.cat([path.x_adv for path in batches]), trace, torch.cat([path.broken for path in batches]))


def second_path(reference: AttackPath, other: AttackPath) -> Trace:
    """Combine two traces, [K, N]: the other path's where both paths have the same outcome, else the reference's.

    If the two attacks end with different outcomes, the reference trace is kept: otherwise a margin that separates the
    outcomes would look path-dependent.
    """
    is_same = reference.broken == other.broken
    return Trace(
        other.trace.correct.where(is_same, reference.trace.correct),
        other.trace.p_true.where(is_same, reference.trace.p_true),
    )


def _attack_batch(model: nn.Module, part: Split, spec: PathSpec, start: int, sizer: BatchSizer) -> AttackPath:
    x, y = image_batch(model, part, slice(start, start + sizer.batch))
    with exact_inference(model, sizer.pass_size) as view:
        with per_image_noise(x, spec.seed, "path"):
            adversarial = call_plugin("attack", spec.attack, view, x, y)
        with torch.no_grad():
            broken = view(adversarial.x).argmax(1) != y
    return AttackPath(adversarial.x, adversarial.trace, broken).take(slice(None), torch.device("cpu"))
