"""What is installed from a wheel, without a checkout, has its recipes and its types with it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_recipes_are_listed_shown_and_copied_without_a_checkout(installed):
    assert "mail_trades" in said(installed, "list", "recipes")
    assert "loss = mean( w * 5 KL(nat || adv) + CE(nat) )" in said(installed, "show", "mail_trades")
    said(installed, "copy", "mail_at")
    assert (installed.parent / "mail_at.py").read_text() == (ROOT / "recipes" / "mail_at.py").read_text()
