"""What laws are made of: sample models, images and steps, and checks that return what is wrong, or None."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustmail.memory import memory_of
from robustmail.step import Context, Step, Trace

__all__ = [
    "MARGINS",
    "SIZE",
    "Law",
    "SampleModel",
    "all_finite",
    "changes_of_generators",
    "changes_of_model",
    "difference",
    "in_training",
    "random_images",
    "random_logits",
    "random_trace",
    "sample_model",
    "step_with_logits",
]

Law = Callable[[Any], str | None]
"""plugin -> what is wrong, or None"""

SIZE = 6
"""Images in a sample batch"""

MARGINS = torch.linspace(-1, 1, 7)


class SampleModel(nn.Module):
    """A model with all that a plugin might change: BatchNorm, dropout in a mode of its own, gradients."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, classes]"""
        logits: Tensor = self.head(self.drop(self.bn(self.conv(x)).relu().flatten(1)))
        return logits


def sample_model(classes: int = 10) -> SampleModel:
    """A new model in train mode, except dropout in eval mode, with gradients in its parameters."""
    model = SampleModel(classes).train()
    nn.functional.cross_entropy(model(torch.rand(4, 3, 8, 8)), torch.arange(4) % classes).backward()
    model.drop.eval()
    return model


def random_images(n: int = SIZE, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 8, 8] in [0, 1] and labels [n]."""
    return torch.rand(n, 3, 8, 8), torch.arange(n) % classes


def random_trace(n: int) -> Trace:
    """A trace of 10 iterates of n images."""
    return Trace(torch.rand(10, n) < 0.7, torch.rand(10, n))


def random_logits(n: int = SIZE, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Natural and adversarial logits, [n, classes] each."""
    return torch.randn(n, classes) * 3, torch.randn(n, classes) * 3


def step_with_logits(
    logits: tuple[Tensor, Tensor], y: Tensor, trace: Trace, x: Tensor | None = None, targets: Tensor | None = None
) -> Step:
    """A step whose natural and adversarial logits are `logits`, not computed by its model; targets: soft labels."""
    images = torch.rand(len(y), 3, 8, 8) if x is None else x
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same network each time: an objective may ask it about further images
        model = sample_model(logits[0].shape[1]).eval()
    step = Step(model, images, y, images, trace, targets)
    step._logits = {"nat": logits[0], "adv": logits[1]}
    return step


def in_training(plugin: Any, step: Step) -> Step:
    """Give the step what it would know in training: places, an epoch, what the plugin remembers, and a teacher."""
    if step.context is None:
        classes = step._logits["nat"].shape[1] if step.has("nat") else 10
        declared = memory_of(plugin)
        rows = {name: memory.first_rows(step.y, classes) for name, memory in declared.items()}
        step.context = Context(
            step.y.clone(), 1, 2, declared, rows, lambda images: images.flatten(1)[:, :classes].detach() * 3
        )  # fmt: skip
    return step


def all_finite(value: Any) -> str | None:
    """What is wrong with a value that is not a tensor of finite numbers."""
    if not isinstance(value, Tensor):
        return f"returned {type(value).__name__}"
    return None if value.isfinite().all() else f"returned {value.flatten()[:4].tolist()}"


def difference(a: Tensor, b: Tensor, tolerance: float, when: str) -> str | None:
    """How two results differ that should be equal, up to `tolerance` times the larger of 1 and max |a|."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)} {when}"
    gap = (a.detach().float() - b.detach().float()).abs().max().item()
    return f"changes by {gap:.3g} {when}" if not gap <= tolerance * max(1.0, a.detach().abs().max().item()) else None


def changes_of_model(model: nn.Module, call: Callable[[], Any]) -> str | None:
    """What `call()` changes in the model for good."""

    def snapshot() -> dict[str, list[Any]]:
        return {
            "modes": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "gradients": [copy.deepcopy(p.grad) for p in model.parameters()],
            "weights": [p.detach().clone() for p in model.parameters()],
            "BatchNorm statistics": [b.clone() for b in model.buffers()],
        }

    before = snapshot()
    call()
    changed = [name for name, values in snapshot().items() if not all(map(_equal, values, before[name]))]
    return f"changed {' and '.join(changed)}" if changed else None


def changes_of_generators(call: Callable[[], Any]) -> str | None:
    """Which global random generators `call()` advances."""

    def states() -> dict[str, str]:
        words, position = np.random.get_state()[1:3]  # type: ignore[index, misc]
        return {
            "torch's": str(torch.get_rng_state().tolist()),
            "numpy's": f"{words.tolist()} {position}",
            "Python's": str(random.getstate()),
        }

    before = states()
    call()
    moved = [name for name, state in states().items() if state != before[name]]
    return f"moved {' and '.join(moved)} global generator" if moved else None


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
