"""Verbs as click sees them. Of those that take a recipe its fields are options: `--seed 1` is read as `seed=1`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand

from robustmail.catalog import recipe_fields
from robustmail.errors import RecipeError, did_you_mean

__all__ = ["RecipeVerb", "Verb", "as_overrides"]

SHOWN = {
    "--seed N": "Seed of the run.",
    "--epochs N": "Number of epochs.",
    "--device NAME": "auto, cpu, cuda, cuda:1 or mps.",
    "--FIELD.FIELD VALUE": "Any other field: --weighter.slope 5 is weighter.slope=5.",
}
"""what a verb's help says of fields as options"""


class Verb(TyperCommand):
    """A verb with its arguments as we write them in its usage line: versions of typer put various brackets there."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(argument.metavar or str(argument.name).upper() for argument in arguments)]


class RecipeVerb(Verb):
    """A verb with a recipe among its arguments, and with the recipe's fields as options beside its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = [name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)]
        flags = {name for parameter in self.get_params(ctx) if getattr(parameter, "is_flag", False)
                 for name in parameter.opts}  # fmt: skip
        return super().parse_args(ctx, as_overrides(args, own, flags, lenient=ctx.resilient_parsing))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Fields of the recipe"):
            formatter.write_dl(list(SHOWN.items()))

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete the verb's own options and the fields; called by click for words that begin with a dash."""
        from robustmail.cli.completion import complete_fields

        item = type(super().shell_complete(ctx, "--")[0])  # of click, or of typer's copy of it
        fields = [item(text, help=about) for text, about in complete_fields(ctx, incomplete)]
        return [*super().shell_complete(ctx, incomplete), *fields]


def as_overrides(args: list[str], own: Iterable[str], flags: Iterable[str], lenient: bool = False) -> list[str]:
    """Replace options that are fields of a recipe by overrides, PATH=VALUE, at the end.

    args: words after the verb.
    own: the verb's own options, which stay.
    flags: those of them that take no value.
    lenient: for completion: a field without its value yet is no error, and becomes the word PATH.

    Raises RecipeError for an option that is neither the verb's nor a field, and for a field without a value.
    """
    own, flags, fields = {*own, "--help", "--traceback"}, {*flags, "--help", "--traceback"}, recipe_fields()
    words, overrides, left = list(args), list[str](), list[str]()
    while words:
        word = words.pop(0)
        if word == "--":
            left += [word, *words]
            break
        option, equals, value = word.partition("=")
        if not word.startswith("--") or option in own:
            left.append(word)
            if word in own and word not in flags and words:  # its value may look like anything
                left.append(words.pop(0))
            continue
        path = option.removeprefix("--").replace("-", "_")
        if path.partition(".")[0] not in fields:
            if lenient:
                continue
            known = [*own, *(f"--{name}" for name in fields)]
            raise RecipeError(option, "no such option", did_you_mean(option, known))
        if not equals and not words and not lenient:
            raise RecipeError(option, "needs a value", f"Write {option} VALUE.")
        if equals or words:
            overrides.append(f"{path}={value if equals else words.pop(0)}")
        else:
            overrides.append(path)
    return [*left, *overrides]
