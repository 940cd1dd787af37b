"""How plugins are called and their errors reported, and where a plugin comes from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from robustmail.errors import PluginError, RobustmailError, asked_to_stop, did_you_mean

__all__ = [
    "PACKAGE",
    "T",
    "call_plugin",
    "definition_of",
    "error_location",
    "expect_batch",
    "is_third_party",
    "plugin_error",
    "plugin_name",
    "source_location",
]

PACKAGE = str(Path(__file__).parent)
T = TypeVar("T")


def plugin_error(kind: str, plugin: Any, wrong: str, todo: str = "") -> PluginError:
    """The error of a plugin that breaks its contract: with its kind, name and source location."""
    return PluginError(f"{kind} {plugin_name(plugin)} ({source_location(plugin)})", wrong, todo)


def call_plugin(kind: str, plugin: Callable[..., T], *args: Any) -> T:
    """Return plugin(*args).

    Raises PluginError, with the plugin's name and the line that failed, for any exception that is not ours.
    """
    try:
        return plugin(*args)
    except RobustmailError:
        raise
    except BaseException as error:  # SystemExit too: without this the process would end without an error message
        if asked_to_stop(error):
            raise
        near = did_you_mean(error.name, dir(error.obj)) if isinstance(error, AttributeError) and error.name else ""
        raise PluginError(
            f"{kind} {plugin_name(plugin)} ({error_location(error) or source_location(plugin)})",
            f"failed with {type(error).__name__}: {error}", near if near.startswith("Did") else "",
        ) from error  # fmt: skip


def expect_batch(kind: str, plugin: Any, value: Any, size: int) -> None:
    """Raise PluginError where a plugin returned something else than a tensor of shape [size]."""
    from torch import Tensor  # here: listing plugins does not wait for torch

    if not isinstance(value, Tensor):
        raise plugin_error(kind, plugin, f"returned {type(value).__name__}, not a tensor of shape [B]")
    if value.shape != (size,):
        raise plugin_error(
            kind, plugin, f"returned shape {list(value.shape)} for a batch of {size}, expected [{size}]",
            "Return one number per example.",
        )  # fmt: skip


def plugin_name(value: Any) -> str:
    """The name that a user types: that of a function, or of a value's class."""
    value = value.func if isinstance(value, functools.partial) else value
    return str(getattr(value, "__label__", None) or getattr(value, "__name__", None) or type(value).__name__)


def source_location(value: Any) -> str:
    """`file.py:12` of a plugin's source, or its module if there is no source."""
    target = definition_of(value)
    try:
        return f"{inspect.getsourcefile(target)}:{inspect.getsourcelines(target)[1]}"
    except (OSError, TypeError):
        return str(target.__module__)


def error_location(error: BaseException) -> str:
    """`file.py:12`: the innermost line of the user's own code in an error's traceback, or ""."""
    trace, location = error.__traceback__, ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages" not in file and not file.startswith((PACKAGE, "<frozen")):
            location = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return location


def is_third_party(plugin: Any) -> bool:
    """Whether a plugin is neither robustmail's nor a builtin."""
    return callable(plugin) and str(definition_of(plugin).__module__).split(".")[0] not in ("robustmail", "builtins")


def definition_of(value: Any) -> Any:
    """The function, or the class, whose source defines a plugin."""
    return value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
