"""Every command in the documentation: verb, options, recipe and overrides exist; quick ones are run."""

from __future__ import annotations

import configparser
import re
import runpy
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from robustmail.catalog import recipe_files
from robustmail.cli.main import app
from robustmail.cli.margins import load_margins
from robustmail.cli.option_texts import parse_eps
from robustmail.config.loader import load_recipe
from robustmail.config.overrides import apply_overrides, parse_value
from robustmail.evaluation.attack_specs import parse_attacks
from robustmail.evaluation.attack_texts import split_attacks
from robustmail.evaluation.normalization import parse_normalization
from robustmail.trials import grid, paper
from tests.docs.conftest import SMALL, plugins_of, say
from tests.docs.pages import INLINE, PAGES, ROOT, SHELL, Command, blocks, commands, inline, prose

VERBS = typer.main.get_command(app)
COMMANDS = commands()
OURS = [command for command in COMMANDS if command.words[0] == "robustmail" and len(command.words) > 1]
OTHERS = [command for command in COMMANDS if command not in OURS]

DEVELOPERS = {"python3", ".", "ruff", "mypy", "lint-imports"}
"""programs of others whose words are not looked at"""
AT_ONCE = {"list", "show", "copy", "check", "--help", "--version"}
"""verbs that need nothing but a recipe"""
ON_THE_QUICKSTART = {"eval", "export", "margins", "figure", "report"}
"""verbs that are run where they name the run of the quickstart, or evaluations of it"""


def parsed(words: tuple[str, ...] | list[str]) -> tuple[str, dict]:
    """The verb and the values of its parameters; raises click's error for an option that does not exist."""
    context = typer.Context(VERBS, info_name="robustmail")
    name, verb, rest = VERBS.resolve_command(context, list(words))
    return name, verb.make_context(name, list(rest), parent=context).params


def check_meaning(verb: str, given: dict) -> None:
    """Raise the error of a recipe, an override, an attack, a margin or a convention that does not exist."""
    if verb in ("run", "show", "check") and not given["recipe"].endswith("/recipe.json"):  # of a run
        apply_overrides(load_recipe(given["recipe"]), given["overrides"] or [])
    elif verb == "copy":
        assert given["recipe"] in recipe_files()
    elif verb == "trials":
        names = [word for word in given["words"] if "=" not in word]
        overrides = [word for word in given["words"] if "=" in word]
        cells = grid.cells(names, given["over"] or [], overrides, grid.seeds(given["seeds"]))
        assert grid.recipes(cells)
    elif verb == "table":
        assert int(given["number"]) in paper.TABLES
        assert given["scale"] in paper.SCALES
        table, scale = paper.TABLES[int(given["number"])], paper.SCALES[given["scale"]]
        grid.recipes(grid.of_table(table, scale, [0], given["overrides"] or []))
    for names in (given.get("attacks"), given.get("against")):
        if names:
            parse_attacks(split_attacks(names), 8 / 255, 10, "linf")
    if given.get("margins"):
        load_margins(given["margins"])
    if given.get("normalize"):
        parse_normalization(given["normalize"], 3)
    if (data := given.get("data")) and "/" not in data and "." not in data:
        assert callable(parse_value(data, "data"))
    if given.get("eps"):
        assert 0 < parse_eps(given["eps"])[-1] <= 1


@pytest.fixture
def beside_mine(command: Command, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes and studies, and the mine.py of the command's own page, where the page has one."""
    for name in ("recipes", "docs"):
        (tmp_path / name).symlink_to(workplace / name)
    try:
        source = plugins_of(str(command.page.relative_to(ROOT)))
    except StopIteration:
        source = plugins_of("README.md")
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", OURS, ids=lambda command: command.id)
def test_a_command_has_a_verb_options_and_a_recipe_that_exist(command: Command, beside_mine: Path):
    if command.words[1] not in ("--help", "--version", "--install-completion"):
        check_meaning(*parsed(command.words[1:]))


@pytest.mark.parametrize(
    "command", [c for c in OURS if c.words[1] in AT_ONCE], ids=lambda command: command.id
)  # fmt: skip
def test_a_command_that_needs_nothing_runs(command: Command, beside_mine: Path):
    assert say(beside_mine, *command.words[1:])


def on_the_quickstart(command: Command) -> bool:
    """May the command be run on what the `finished` folder holds?"""
    if command.words[1] == "run":
        return command.words[2:] in [("recipes/quickstart.py",), ("mine.py",)] and command.page == ROOT / "README.md"
    names = [word for word in command.words[2:] if word.startswith(("runs/", "evals/", "model"))]
    return command.words[1] in ON_THE_QUICKSTART and bool(names) and set(names) <= {"runs/quickstart/0", "evals/*"}


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in OURS if on_the_quickstart(c)], ids=lambda command: command.id)
def test_a_command_on_the_quickstart_runs_with_small_settings(command: Command, finished: Path):
    verb, *words = command.words[1:]
    evaluations = [path.relative_to(finished).as_posix() for path in (finished / "evals").iterdir()]
    words = [name for word in words for name in (evaluations if word == "evals/*" else [word])]
    out = ["--out", f"{verb}-{command.line}"] if verb != "report" else []
    assert say(finished, verb, *words, *SMALL.get(verb, []), *out)


SENTENCES = [command for command in inline() if command.page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("command", SENTENCES, ids=lambda command: command.id)
def test_a_command_in_a_sentence_has_a_verb_and_options_that_exist(command: Command):
    verb = VERBS.commands[command.words[1]]
    assert {word for word in command.words[2:] if word.startswith("--")} <= options_of(verb)
    if {*command.words[2:]} & {*recipe_files()}:
        check_meaning(*parsed(command.words[1:]))


def options_of(verb) -> set[str]:
    return {"--help", "--traceback"} | {option for parameter in verb.params for option in parameter.opts}


def test_no_command_hides_in_another_block():
    text = "".join(block.text for block in blocks() if block.language not in SHELL)
    text += "".join(re.findall(r"^    .*\n", "".join(map(prose, PAGES)), re.MULTILINE))  # indented blocks
    assert re.findall(r"^ *(?:\$ *)?(?:robustmail|torchrun) [a-z-]+ .*$", text, re.MULTILINE) == []


def test_an_option_in_a_sentence_exists():
    ours = set().union(*map(options_of, [VERBS, *VERBS.commands.values()]))
    unknown = {
        f"{page.relative_to(ROOT)}: {found[1]}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for found in INLINE.finditer(prose(page))
        if found[1].startswith("--") and len(found[1]) > 2 and found[1].split()[0].split("=")[0] not in ours
    }
    assert not unknown


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: command.id)
def test_a_command_of_another_tool_names_what_exists(command: Command, tmp_path: Path, monkeypatch):
    program, *words = command.words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words)
        assert (given.module, given.training_script) == (True, "robustmail")
        verb, params = parsed([word for word in given.training_script_args if word != "--"])
        check_meaning(verb, params)
    elif program == "tox":
        file = configparser.ConfigParser()
        file.read(ROOT / "tox.ini")
        assert not words or (words[0] == "-e" and f"testenv:{words[1]}" in file)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = [word.partition("[")[2].rstrip("]") for word in words if word.startswith(".[")]
        assert words[0] == "install"
        assert set(extras) <= set(project["optional-dependencies"])
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif program == "python" and words[0] == "-m":
        assert find_spec(words[1])
    elif program == "python":
        assert runpy.run_path(str(ROOT / words[0]))["options"]().parse_args(words[1:])
    else:
        assert program in DEVELOPERS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval model.pth --probee", "--probee"),
        ("lits", "lits"),
        ("show mail_att", "mail_att"),
        ("run mail_at weigter.slope=5", "weigter"),
        ("run mail_at weighter.slop=5", "slop"),
        ("trials at --over margin=pm_advv", "pm_advv"),
        ("table 1 --scale mini weigter.slope=5", "weigter"),
        ("eval model.pth --attacks nat,pgdd", "pgdd"),
        ("eval model.pth --normalize cifar", "cifar"),
        ("eval model.pth --data cifar", "cifar"),
        ("margins model.pth --margins pm", "pm"),
    ],
)
def test_a_misspelt_command_would_be_found(words: str, message: str):
    with pytest.raises(Exception, match=message):
        check_meaning(*parsed(words.split()))
