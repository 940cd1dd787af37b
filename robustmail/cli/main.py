"""The command line. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from robustmail import __version__, catalog
from robustmail.cli import evaluate, margins, trials
from robustmail.errors import (
    PluginError,
    RecipeError,
    RobustmailError,
    RunError,
    Stopped,
    asked_to_stop,
    did_you_mean,
    in_brief,
)  # fmt: skip
from robustmail.runtime.untrusted import printable
from robustmail.train.dry_run import dry_run

if TYPE_CHECKING:
    from robustmail.recipe import Recipe

__all__ = ["app", "main"]


class _Verbs(TyperGroup):
    """Verbs in which somebody else's code cannot end the process: to leave, by sys.exit or otherwise, is an error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            from robustmail.plugin_calls import error_location

            place = error_location(error)  # nothing where it is our own `raise typer.Exit`
            leaves = not isinstance(error, Exception) or (isinstance(error, (typer.Exit, typer.Abort)) and place)
            if asked_to_stop(error) or not leaves:
                raise
            wrong = f"leaves with {in_brief(error)}"
            raise PluginError(place or "a plugin", wrong, "Raise an error instead.") from error


app = typer.Typer(
    name="robustmail", cls=_Verbs,
    help="Train networks against adversarial attacks, and decide which examples the training listens to.",
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe, a file, or FILE:VARIABLE.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PATH=VALUE]...", help="For example weighter.slope=5 epochs=30 burn_in=20."),
]
WHAT = ("recipes", *catalog.PLURALS)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    full: Annotated[bool, typer.Option("--traceback", help="With any verb: print an error's whole traceback.")] = False,
) -> None:
    if version:
        print(f"robustmail {__version__}")
        raise typer.Exit


@app.command("run")
def run_(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.  [default: runs/RECIPE/SEED]")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, deleting a finished run in the folder.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fresh, delete an unfinished run too.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live view.")] = False,
) -> None:
    """Train a recipe and evaluate it; the same command again continues it."""
    from rich.console import Console

    from robustmail.config.loader import recipe_path
    from robustmail.runtime import distributed
    from robustmail.runtime.signals import Signals
    from robustmail.train.run import run

    made = _load(recipe, overrides)
    name = _run_name(recipe)
    folder = out or Path("runs") / name / str(made.seed)
    path, _ = recipe_path(recipe)
    from robustmail.report.dashboard import LogFile, choose_run_view
    from robustmail.report.figures import draw_curves

    console, log, signals = Console(), LogFile(folder / "log.txt"), Signals()
    try:
        with distributed.process_group(made.device), signals.caught():
            records = run(made, folder, name, path, fresh, yes, signals)
            if not distributed.is_main_process():
                for _ in records:
                    pass
                return
            with choose_run_view(console, plain or bool(os.environ.get("CI"))) as show:
                for record in records:
                    log(record)
                    show(record)
            if not (folder / "curves.png").exists():
                draw_curves(folder, name)
    except Stopped as stop:
        if not distributed.speaks():
            raise typer.Exit(128 + stop.signum) from None
        again = shlex.join(["robustmail", *_without(sys.argv[1:], "--fresh", "--yes")])
        saved = f"saved in {folder}. Go on with: {again}" if (folder / "state.pt").exists() else "nothing was begun"
        print(f"robustmail: stopped by {signal.Signals(stop.signum).name}; {saved}", file=sys.stderr)
        raise typer.Exit(128 + stop.signum) from None


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print the resolved recipe, its loss as a formula, and what a step costs."""
    from robustmail.fields import flatten

    made = _load(recipe, overrides)
    flat = flatten(made)
    width = max(map(len, flat))
    for path, value in flat.items():
        print(f"{path:<{width}}  {value}")
    print(f"\n{made.formula}\n")
    for epoch, passes in dry_run(made).items():
        f, b = passes.total
        print(
            f"from epoch {epoch + 1}: {f} forward and {b} backward passes a step "
            f"({passes.attack[0]} + {passes.attack[1]} in the attack)"
        )


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Rehearse a recipe on four random images, and hold its plugins to their laws; or the plugins in any file."""
    from robustmail.config.loader import load_plugins
    from robustmail.contracts import assert_lawful, kind_of, laws
    from robustmail.plugin_calls import plugin_name
    from robustmail.text import plural
    from robustmail.train.run import preflight

    if plugins := load_plugins(recipe):
        for name, plugin in plugins.items():
            try:
                kind = kind_of(plugin)
            except PluginError as error:
                if len(plugins) == 1:
                    raise
                print(f"{name}: left out, it {error.wrong}")
                continue
            assert_lawful(plugin, kind)
            print(f"{name}: a lawful {kind}, {len(laws(kind))} laws tried")
        return
    made = _load(recipe, overrides)
    preflight(made)
    dry_run(made)
    said, later = f"rehearsed in its {plural(len(made.change_points()), 'phase')}", made.change_points()[1:]
    if later:
        said += f" (something changes at epoch{'s' * (len(later) > 1)} {', '.join(str(turn + 1) for turn in later)})"
    for kind, plugin in made.own_plugins().items():
        assert_lawful(plugin, kind)
        said += f"; {plugin_name(plugin)} keeps all {plural(len(laws(kind)), 'law')} of {kind}s"
    print(f"{recipe}: {said}")


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="[KIND]", help=f"One of {', '.join(WHAT)}.")] = None,
) -> None:
    """List recipes, plugins and models; installed packages' too."""
    if what is not None and what not in WHAT:
        raise RecipeError(f"list {what}", "no such kind", did_you_mean(what, WHAT))
    for kind in [what] if what else WHAT:
        if kind == "recipes":
            found = {name: catalog.summary(path) for name, path in catalog.recipe_files().items()}
        else:
            found = {name: entry.summary for name, entry in catalog.catalog_entries(kind).items()}
        if what is None:
            print(f"\n{kind}")
        for name, text in found.items():
            print(f"  {name:<26} {text}")


@app.command()
def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe.")],
    to: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="By default RECIPE.py here.")] = None,
) -> None:
    """Write an editable copy of a built-in recipe."""
    from robustmail.runtime.files import atomic_write_text

    built_in = catalog.recipe_files()
    if recipe not in built_in:
        raise RecipeError(f"copy {recipe}", "no such built-in recipe", did_you_mean(recipe, built_in))
    target = to or Path(f"{recipe}.py")
    target = target / f"{recipe}.py" if target.is_dir() else target
    if target.exists():
        raise RunError(str(target), "exists already", "Name another file: robustmail copy RECIPE FILE.")
    if not target.parent.is_dir():
        raise RunError(str(target.parent), "no such folder", "Make it first.")
    atomic_write_text(target, built_in[recipe].read_text(encoding="utf-8"))
    print(f"{target}: edit it, then robustmail run {target}")


evaluate.add_to(app)
trials.add_to(app)
margins.add_to(app)


@app.command("bench")
def bench_(
    model: Annotated[
        str, typer.Option(help="A timm name, ours included, for images of 3 x 32 x 32.")
    ] = "cifar_resnet18",
    batch: Annotated[int, typer.Option(min=2, help="Images in a batch.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that everybody gets, after one to warm up.")] = 3,
    precision: Annotated[str, typer.Option(help="Ours: auto, bf16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where bench-MODEL-BATCH.json and .png go.")] = Path("bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="About a minute if idle: a narrow model, a small batch.")
    ] = False,
) -> None:
    """Measure images a second side by side with plain loops, torchattacks and ART."""
    from rich.console import Console

    from robustmail.bench import bench
    from robustmail.report.bench import bench_table, save_bench

    if precision not in (known := ("auto", "bf16", "fp32")):
        raise RecipeError(f"bench --precision {precision}", "no such precision", did_you_mean(precision, known))
    console = Console()
    size = ("cifar_resnet18_w16", 32) if quick else (model, batch)
    with console.status("building") as status:
        report = bench(
            *size, repeats, precision=precision, device=device,  # type: ignore[arg-type]
            progress=status.update,
        )  # fmt: skip
    console.print(bench_table(report))
    for path in save_bench(report, out):
        print(path)


def main() -> None:
    """Run the command line; every error that a user can cause is one line and exit code 2."""
    words = sys.argv[1:] or ["--help"]
    loud = "--traceback" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has not all our characters gets the others
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as under nohup
    try:
        if ours:
            signal.signal(signal.SIGINT, _stop)
        command = typer.main.get_command(app)
        code = command.main(_without(words, "--traceback"), prog_name="robustmail", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except RobustmailError as error:
        if not error.told:
            _complain(str(error), loud)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped", loud)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if (wrong := _usage(error)) is not None:
            _complain(wrong, loud)
            sys.exit(2)
        _complain(
            f"unexpected {type(error).__name__}: {' '.join(str(error).split())}. Add --traceback to see where", loud
        )
        sys.exit(1)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(signum: int, _: object) -> None:
    raise Stopped(signum)


def _usage(error: Exception) -> str | None:
    """What click says of wrong words, in one line; None for any other error."""
    if not callable(message := getattr(error, "format_message", None)):
        return None
    todo = _as_override(getattr(error, "option_name", ""), getattr(error, "ctx", None)) or "Try robustmail --help."
    said = str(message()).rstrip()
    return " ".join(f"{said}{'' if said.endswith(('.', '?', ')')) else '.'} {todo}".split())


def _as_override(option: str, context: Any) -> str:
    """What `--seed 2` was meant to be, given to a verb that takes a recipe's fields as words."""
    if getattr(context, "info_name", "") not in ("run", "show", "check"):
        return ""
    from robustmail.recipe import Recipe

    field, words = option.lstrip("-").replace("-", "_"), sys.argv[1:]
    if field not in Recipe.__dataclass_fields__:
        return ""
    value = next((v for word, v in zip(words, [*words[1:], ""], strict=True) if word == option), "")
    value = next((word.partition("=")[2] for word in words if word.startswith(f"{option}=")), value)
    return f"Write {shlex.quote(f'{field}={value}')}." if value else f"Write {field}=VALUE."


def _complain(text: str, loud: bool) -> None:
    if loud:
        traceback.print_exc()
    print(f"robustmail: {printable(text)}", file=sys.stderr, flush=True)


def _load(name: str, overrides: list[str] | None) -> Recipe:
    from robustmail.config.loader import load_recipe
    from robustmail.config.overrides import apply_overrides

    return apply_overrides(load_recipe(name), overrides or [])


def _run_name(recipe: str) -> str:
    file, _, variable = recipe.partition(":")
    return Path(file).stem + (f"-{variable}" if variable and variable != "recipe" else "")


def _without(words: list[str], *dropped: Any) -> list[str]:
    return [word for word in words if word not in dropped]
