"""The command line. What is heavy is imported only by the verbs that use it, inside of their functions.

`HEAVY` names it. None of it is there after any `--help`; torch is not there after `list` and completion either.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from robustmail import __version__
from robustmail.cli import bench, evaluate, margins, new, publish, recipes, trials
from robustmail.cli.options import how_to_go_on
from robustmail.errors import PluginError, RobustmailError, Stopped, asked_to_stop, in_brief
from robustmail.runtime.untrusted import printable

__all__ = ["HEAVY", "app", "main"]

HEAVY = ("torch", "numpy", "scipy", "matplotlib", "rich", "pydantic", "importlib.metadata")
"""What takes longer to import than a help text may take"""
FULL = (errno.ENOSPC, errno.EDQUOT)
LONGEST = 200  # letters of what the help says about a verb; it is wrapped


class _InterruptedError(Exception):
    """Ctrl-C: versions of typer end at a KeyboardInterrupt without a word."""


class _Verbs(TyperGroup):
    """Verbs by purpose. A plugin cannot end them: sys.exit and the like in its code become a PluginError."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for parameter in self.get_params(ctx):
            if getattr(parameter, "is_flag", False) and parameter.default is None:  # of --help, --show-completion
                parameter.default = False  # typer hands None to pydantic, whose import takes as long as all the rest
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        verbs = self.commands.values()
        widest = max(len(str(verb.name)) for verb in verbs)
        for purpose in dict.fromkeys(getattr(verb, "rich_help_panel", None) for verb in verbs):
            rows = [
                (str(verb.name).ljust(widest), verb.get_short_help_str(LONGEST))
                for verb in verbs
                if getattr(verb, "rich_help_panel", None) == purpose
            ]
            with formatter.section(purpose or "Other"):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except BaseException as error:
            if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # | head
                _drop_output()
                raise SystemExit(141) from None  # as a program that SIGPIPE ends; click and rich would say 1
            from robustmail.plugin_calls import error_location

            location = error_location(error)  # empty for our own `raise typer.Exit`
            is_typer_exit = isinstance(error, (typer.Exit, typer.Abort))
            leaves = not isinstance(error, Exception) or (is_typer_exit and location)
            if asked_to_stop(error):
                raise _InterruptedError from error
            if not leaves:
                raise
            wrong = f"leaves with {in_brief(error)}"
            raise PluginError(location or "a plugin", wrong, "Raise an error instead.") from error


app = typer.Typer(
    name="robustmail",
    cls=_Verbs,
    help="Train networks against adversarial attacks, and decide which examples the training listens to.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    with_traceback: Annotated[
        bool, typer.Option("--traceback", help="With any verb: print the whole traceback of an error.")
    ] = False,
) -> None:
    if version:
        print(f"robustmail {__version__}")
        raise typer.Exit


for verbs in (recipes, new, trials, evaluate, publish, margins, bench):
    verbs.add_to(app)


def main() -> None:
    """Run the command line and exit: 0, or 2 with one line for every error that a user can cause.

    Other codes: 1 for an unexpected error, 128 + signal number after a signal.
    """
    words = sys.argv[1:] or ["--help"]
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks is computed on its CPU
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait spin for some milliseconds, which makes training many times slower beside a busy process.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported; the bits stay the same
    with_traceback = "--traceback" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a terminal that lacks some of our characters
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    try:
        if is_interruptible:
            signal.signal(signal.SIGINT, _raise_stopped)
        command = typer.main.get_command(app)
        verb_words = [word for word in words if word != "--traceback"]
        code = command.main(verb_words, prog_name="robustmail", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except RobustmailError as error:
        if not error.is_reported_by_peer:
            _print_error(str(error), with_traceback)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort, _InterruptedError):
        _print_error(f"stopped; {how_to_go_on(None)}", with_traceback)
        sys.exit(130)
    except Exception as error:
        known = _usage_error(error) or _output_error(error, words)
        if known is not None:
            _print_error(known, with_traceback)
            sys.exit(2)
        message = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}. Add --traceback to see where"
        _print_error(message, with_traceback)
        sys.exit(1)
    finally:
        if is_interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _raise_stopped(signum: int, _: object) -> None:
    raise Stopped(signum)


def _usage_error(error: Exception) -> str | None:
    """The message of click about a wrong verb or option, as one line; None for any other error."""
    if not callable(format_message := getattr(error, "format_message", None)):
        return None
    message = str(format_message()).rstrip()
    return " ".join(f"{message}{'' if message.endswith(('.', '?', ')')) else '.'} Try robustmail --help.".split())


def _output_error(error: Exception, words: list[str]) -> str | None:
    """The message where what is not a file of ours cannot be written; None for any other error."""
    if not isinstance(error, OSError):
        return None
    if "--install-completion" in words:
        todo = "Put what robustmail --show-completion prints where your shell reads it."
        return f"{error.filename}: cannot be written ({error.strerror}). {todo}"
    if error.errno in FULL:  # of `> file`; our own files raise a RunError
        from robustmail.runtime.files import FREE_SPACE

        _drop_output()
        return f"the output cannot be written ({error.strerror}). {FREE_SPACE}"
    return None


def _drop_output() -> None:
    """Let nobody try to write the rest of the output at exit: Python 3.14 would fail again there, and exit with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(text: str, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exc()
    print(f"robustmail: {printable(text)}", file=sys.stderr, flush=True)
