"""What a command imports before it works; a process of its own, for the tests have imported all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = """
import contextlib, io, sys
import typer
from robustmail.cli import main

command = typer.main.get_command(main.app)
for words in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command.main(words, prog_name="robustmail", standalone_mode=False)
    found = [name for name in {modules} if name in sys.modules]
    assert not found, f"{{words}} imports {{found}}"
    assert said.getvalue(), words
"""
HELP = '[["--help"], ["--version"], *([verb, "--help"] for verb in command.commands)]'


@pytest.mark.parametrize(
    ("commands", "modules"),
    [
        pytest.param(HELP, "main.HEAVY", id="help"),
        pytest.param('[["list"], ["list", "attacks"]]', '("torch", "numpy", "rich")', id="list"),
    ],
)
def test_help_and_list_import_nothing_heavy(commands: str, modules: str):
    code = COMMANDS.format(commands=commands, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
