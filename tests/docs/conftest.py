"""A folder in which the commands of the documentation can be run: a finished run, an evaluation, a file of plugins."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from robustmail.cli import main
from tests.docs.pages import ROOT, blocks

SMALL = {
    "run": ["epochs=1", "burn_in=0", "test_size=20", "evaluate=('nat','pgd10')", "--plain"],
    "eval": ["--n", "20", "--attacks", "nat,pgd10", "--plain"],
    "margins": ["--n", "20", "--steps", "2", "--against", "pgd5", "--plain"],
    "figure": ["--n", "20", "--plain"],
}
"""What makes a command quick: added at its end, where the last one of an option or an override counts."""

Say = Callable[..., str]


def say(folder: Path, *words: str) -> str:
    """What a command prints, run in this process in a folder. Fails where it does not exit with 0."""
    before, argv = Path.cwd(), sys.argv
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        patch.setenv("COLUMNS", "200")
        os.chdir(folder)
        sys.argv = ["robustmail", *words]
        capture = patch_streams(patch)
        try:
            main.main()
        except SystemExit as leave:
            code = leave.code
        finally:
            os.chdir(before)
            sys.argv = argv
    printed, errors = capture
    assert code == 0, errors.getvalue() or printed.getvalue()
    return printed.getvalue()


def patch_streams(patch: pytest.MonkeyPatch):
    import io

    printed, errors = io.StringIO(), io.StringIO()
    patch.setattr(sys, "stdout", printed)
    patch.setattr(sys, "stderr", errors)
    return printed, errors


def plugins_of(page: str) -> str:
    """The block of Python that a page says to put into mine.py: the first that makes a recipe or an attack."""
    made = ("\nrecipe = ", "\nattack = ")
    return next(b.text for b in blocks("python") if b.page == ROOT / page and any(name in b.text for name in made))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes and the README's mine.py, as a reader has them before any command."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "docs/studies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mine.py").write_text(plugins_of("README.md"), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def finished(workplace: Path) -> Path:
    """The same folder with a run of the quickstart and its evaluation."""
    say(workplace, "run", "quickstart", *SMALL["run"])
    say(workplace, "eval", "runs/quickstart/0", *SMALL["eval"])
    return workplace
