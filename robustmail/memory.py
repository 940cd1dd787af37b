"""What a plugin keeps from step to step: one row for each example, for each class, or for the run.

    @remembers(loss=per_example(decay=0.9))
    def slow_loss(step):
        step.remember(loss=ce(step.logits_adv, step.y))
        return -step.memory["loss"]

A plugin reads and writes a row for each example of the batch, [B, ...]; whose row it is, the declaration says. What is
written is committed after the update of the parameters, saved with the state, and the same in several processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from robustmail.errors import RecipeError
from robustmail.functional import one_hot

__all__ = ["Memory", "joint_memory", "memory_of", "per_class", "per_example", "per_run", "remembers"]

Plugin = TypeVar("Plugin", bound=Callable[..., Any])
Shape = tuple[int | Literal["classes"], ...]


@dataclass(frozen=True)
class Memory:
    """A table of float32 rows.

    per: whose rows they are: each "example"'s of the training set, each "class"'s, or the one of the "run".
    shape: of a row; () for a number; "classes" in it stands for the number of classes.
    start: every value before the first write; "label" for the one-hot label, in rows of shape ("classes",).
    decay: d in [0, 1): a write leaves d * old + (1 - d) * new, where new is the mean over the examples of that row.
    Raises RecipeError for a value out of its range.
    """

    per: Literal["example", "class", "run"]
    shape: Shape = ()
    start: float | Literal["label"] = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        given = f"per_{self.per} (given shape={self.shape}, start={self.start}, decay={self.decay})"
        if not all(size == "classes" or (isinstance(size, int) and size > 0) for size in self.shape):
            raise RecipeError(given, "no shape of a row", 'Write e.g. per_example(), or per_example("classes").')
        if isinstance(self.start, str) and (self.start, self.per, self.shape) != ("label", "example", ("classes",)):
            wrong = "start must be a number, or 'label' for one row of classes for each example"
            raise RecipeError(given, wrong, 'Write per_example("classes", start="label").')
        if not isinstance(self.start, str) and not math.isfinite(self.start):
            raise RecipeError(given, "start must be finite")
        if not 0 <= self.decay < 1:
            raise RecipeError(given, "decay must be at least 0 and less than 1")

    def first_rows(self, y: Tensor, classes: int) -> Tensor:
        """The rows before the first write, one for each label of y [n] int64: [n, ...] float32."""
        if self.start == "label":
            return one_hot(y, classes)
        shape = [classes if size == "classes" else int(size) for size in self.shape]
        return torch.full((len(y), *shape), float(self.start))

    def __str__(self) -> str:
        row = f"[{', '.join(map(str, self.shape))}]" if self.shape else "a number"
        first = "its label" if self.start == "label" else self.start
        return f"{row} per {self.per}, {first} at first{f', decay {self.decay:g}' if self.decay else ''}"


def per_example(
    *shape: int | Literal["classes"], start: float | Literal["label"] = 0.0, decay: float = 0.0
) -> Memory:  # fmt: skip
    """A row for each image of the training set, generated ones included; the parameters are those of `Memory`."""
    return Memory("example", shape, start, decay)


def per_class(*shape: int | Literal["classes"], start: float = 0.0, decay: float = 0.0) -> Memory:
    """A row for each class; it takes the mean of what is written for the batch's examples of that class."""
    return Memory("class", shape, start, decay)


def per_run(*shape: int | Literal["classes"], start: float = 0.0, decay: float = 0.0) -> Memory:
    """One row; it takes the mean of what is written for the batch's examples."""
    return Memory("run", shape, start, decay)


def remembers(**tables: Memory) -> Callable[[Plugin], Plugin]:
    """Declare what a function keeps, by name: a decorator. A class declares it with an attribute `memory`, a dict."""

    def declare(plugin: Plugin) -> Plugin:
        vars(plugin)["memory"] = tables
        return plugin

    return declare


def memory_of(plugin: object) -> Mapping[str, Memory]:
    """What a plugin declares: its attribute `memory`, if that is a mapping from names to `Memory`; else nothing."""
    declared = getattr(plugin, "memory", None)
    if isinstance(declared, Mapping) and all(isinstance(value, Memory) for value in declared.values()):
        return declared
    return {}


def joint_memory(plugins: Iterable[object]) -> dict[str, Memory]:
    """What several plugins declare, by name; they share what has one name.

    Raises RecipeError where two of them declare one name in two ways.
    """
    joint: dict[str, Memory] = {}
    for plugin in plugins:
        for name, memory in memory_of(plugin).items():
            if joint.setdefault(name, memory) != memory:
                who = f"{getattr(plugin, '__name__', type(plugin).__name__)} (memory {name!r})"
                wrong = f"declared as {memory}, by another plugin as {joint[name]}"
                raise RecipeError(who, wrong, "Give it another name.")
    return joint
