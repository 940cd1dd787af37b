"""The one place where a plugin is called and its error is reported."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from robustmail.errors import PluginError, RobustmailError, asked_to_stop, did_you_mean

__all__ = [
    "T",
    "plugin_error",
    "call_plugin",
    "PACKAGE",
    "plugin_name",
    "source_location",
    "error_location",
    "is_third_party",
]


T = TypeVar("T")


def plugin_error(kind: str, plugin: Any, wrong: str, todo: str = "") -> PluginError:
    """The error of a plugin that breaks its contract, with its name and place."""
    return PluginError(f"{kind} {plugin_name(plugin)} ({source_location(plugin)})", wrong, todo)


def call_plugin(kind: str, plugin: Callable[..., T], *args: Any) -> T:
    """Call a plugin; should it fail, in whatever way, the error names it and its line (raises PluginError)."""
    try:
        return plugin(*args)
    except RobustmailError:
        raise
    except BaseException as error:  # SystemExit, too, or the process would end as if all were well
        if asked_to_stop(error):
            raise
        near = did_you_mean(error.name, dir(error.obj)) if isinstance(error, AttributeError) and error.name else ""
        raise PluginError(
            f"{kind} {plugin_name(plugin)} ({error_location(error) or source_location(plugin)})",
            f"failed with {type(error).__name__}: {error}", near if near.startswith("Did") else "",
        ) from error  # fmt: skip


PACKAGE = str(Path(__file__).parent)


def plugin_name(value: Any) -> str:
    """The name that a user would type: a function's own, or that of a dataclass."""
    value = value.func if isinstance(value, functools.partial) else value
    return str(getattr(value, "__label__", None) or getattr(value, "__name__", None) or type(value).__name__)


def source_location(value: Any) -> str:
    """`file.py:12` of a plugin's source, or its module where there is none to show."""
    target = _maker(value)
    try:
        return f"{inspect.getsourcefile(target)}:{inspect.getsourcelines(target)[1]}"
    except (OSError, TypeError):
        return str(target.__module__)


def error_location(error: BaseException) -> str:
    """`file.py:12`: the innermost line of an error that is neither an installed package's nor ours; or nothing."""
    trace, found = error.__traceback__, ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages" not in file and not file.startswith((PACKAGE, "<frozen")):
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def is_third_party(plugin: Any) -> bool:
    """Is a plugin somebody's own, rather than robustmail's?"""
    return callable(plugin) and str(_maker(plugin).__module__).split(".")[0] not in ("robustmail", "builtins")


def _maker(value: Any) -> Any:
    return value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
