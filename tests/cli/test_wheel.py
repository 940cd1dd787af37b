"""What is installed from a wheel, without a checkout, has its recipes and its types with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import robustmail

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="needs hatchling to build a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def said(site: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "robustmail", *words], cwd=site.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_recipes_and_types(installed):
    assert {p.stem for p in (ROOT / "recipes").glob("*.py")} == {
        p.stem for p in installed.glob("robustmail/recipes/*.py")
    }
    assert (installed / "robustmail" / "py.typed").exists()
    said(installed, "new", "margin", "mine")
    assert (installed.parent / "mine.py").exists()


def test_the_wheel_has_its_licence_and_says_what_it_is(installed):
    (info,) = installed.glob("robustmail-*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    about = (info / "METADATA").read_text(encoding="utf-8")
    assert f"\nVersion: {robustmail.__version__}\n" in about
    lines = ("License-Expression: MIT", "License-File: LICENSE", "Requires-Python: >=3.11", "Provides-Extra: export",
             "Description-Content-Type: text/markdown", "Classifier: Typing :: Typed")  # fmt: skip
    for line in lines:
        assert f"\n{line}\n" in about
    assert "robustmail = robustmail.cli.main:main" in (info / "entry_points.txt").read_text()
    assert {path.name for path in installed.iterdir()} == {"robustmail", info.name}, "nothing else on Python's path"


def test_the_sdist_has_what_builds_and_tests_it(tmp_path):
    pytest.importorskip("hatchling", reason="needs hatchling to build an sdist")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "tox.ini", "recipes/quickstart.py", "robustmail/py.typed",
            "tests/conftest.py", "docs/conf.py", "docs/notebooks/train-and-attack.ipynb"} <= names  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs/", "site/", "data/"))]


@pytest.mark.long
def test_recipes_are_listed_shown_and_copied_without_a_checkout(installed):
    assert "mail_trades" in said(installed, "list", "recipes")
    assert "loss = mean( w * 5 KL(nat || adv) + CE(nat) )" in said(installed, "show", "mail_trades")
    said(installed, "copy", "mail_at")
    assert (installed.parent / "mail_at.py").read_text() == (ROOT / "recipes" / "mail_at.py").read_text()
