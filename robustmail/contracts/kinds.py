"""Which kind of plugin a callable is."""

from __future__ import annotations

import inspect
import typing
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from robustmail.contracts.samples import MARGINS, SIZE, in_training, random_logits, random_trace, step_with_logits
from robustmail.errors import PluginError, RobustmailError
from robustmail.plugin_calls import call_plugin, plugin_name, source_location
from robustmail.runtime.rng import fork_rng
from robustmail.step import Step, Terms

__all__ = ["kind_of"]


def kind_of(plugin: Any) -> str:
    """Infer the kind of a plugin: "margin", "weighter", "objective", "attack", "perturbation" or "augmentation".

    Decided by the number, names and annotations of its required parameters; failing that, by what it returns for a
    sample. Raises PluginError for a callable that is none of these.
    """
    call = plugin if inspect.isfunction(plugin) else type(plugin).__call__
    required = [
        p for p in inspect.signature(plugin).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    try:
        hints = typing.get_type_hints(call)
    except NameError:  # a name that is imported under TYPE_CHECKING only
        hints = {}
    hint = hints.get(required[0].name) if required else None
    names = [p.name for p in required]
    if len(required) == 3:
        return "augmentation" if names[2] == "rng" or hints.get(names[2]) is torch.Generator else "attack"
    if len(required) == 2 and "classes" not in names[0]:  # (classes, channels) is a model's
        return "perturbation"
    if len(required) == 1 and "param" not in names[0]:  # (parameters) is an optimiser's
        if hints.get("return") is Terms or "objective" in plugin_name(plugin).lower():
            return "objective"
        if hint is Tensor or names[0] in ("m", "margin", "margins"):
            return "weighter"
        return "margin" if hint is Step or (names[0] == "step" and "return" in hints) else _kind_by_result(plugin)
    raise PluginError(
        f"{plugin_name(plugin)} ({source_location(plugin)})",
        f"takes {', '.join(names) or 'nothing'}, so it is no plugin that has laws",
    )


def _kind_by_result(plugin: Any) -> str:
    """The kind of a plugin of one parameter, by what it returns for a step, or for margins."""
    step = step_with_logits(random_logits(), torch.arange(SIZE), random_trace(SIZE))
    for kind, argument, size in (("margin", in_training(plugin, step), SIZE), ("weighter", MARGINS, len(MARGINS))):
        with suppress(RobustmailError), fork_rng():  # it may fail in any way on an argument of another kind
            result = call_plugin("plugin", plugin, argument)
            if isinstance(result, Terms):
                return "objective"
            if isinstance(result, Tensor) and result.shape == (size,):
                return kind
    return "margin"
