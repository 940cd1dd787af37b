"""robustmail new: what it writes works as it is, and its test can fail."""

from __future__ import annotations

import errno
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from robustmail.cli import main
from robustmail.errors import PluginError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["robustmail", *words.split()])
        with pytest.raises(SystemExit) as left:
            main.main()
        return left.value.code, "".join(capsys.readouterr())

    return call


def run_test(name: str) -> None:
    """Run the test that was written, as pytest would."""
    sys.modules.pop(name, None)
    names = runpy.run_path(f"test_{name}.py")
    tests = [value for key, value in names.items() if key.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


@pytest.mark.parametrize(
    ("kind", "name", "breaks"),
    [
        ("margin", "new_margin", ("return p_true - p_other", "return (p_true - p_other).mean().expand(len(step.y))")),
        ("weighter", "new_weighter", ("u / u.mean()", "u / u.max()")),
        ("objective", "new_objective", ("self.beta * apart", "self.beta * apart.mean()")),
        ("attack", "new_attack", ("return torch.min(torch.max(moved, x - self.eps), x + self.eps)", "return moved")),
        ("recipe", "new_recipe", ("TRADES(beta=5.0)", "pm_adv")),
    ],
)
def test_what_is_written_passes_its_test_until_it_is_broken(said, kind: str, name: str, breaks: tuple[str, str]):
    code, out = said(f"new {kind} {name}")
    assert (code, out) == (0, f"{name}.py, test_{name}.py: edit, then robustmail check {name}.py\n")
    run_test(name)
    text = Path(f"{name}.py").read_text()
    assert breaks[0] in text
    Path(f"{name}.py").write_text(text.replace(*breaks))
    with pytest.raises(PluginError):
        run_test(name)
    assert said(f"new {kind} {name}") == (2, f"robustmail: {name}.py: exists already. Choose another name.\n")


@pytest.mark.parametrize("words", ["margin tilted", "package tilted"])
def test_a_beginning_that_cannot_be_written_whole_leaves_nothing(said, tmp_path: Path, monkeypatch, words: str):
    true, written = os.replace, []

    def full(source, target):
        written.append(target)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(source, target)

    monkeypatch.setattr(os, "replace", full)
    code, error = said(f"new {words}")
    assert (code, error.count("\n"), len(written)) == (2, 1, 2)
    assert "No space left on device" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_package_is_installed_and_listed(said, tmp_path: Path):
    pytest.importorskip("hatchling", reason="needs hatchling to build a package")
    assert said("new package tilted_plugins")[0] == 0
    words = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--target", "site", "./tilted_plugins"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *words]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'site'}"}
    listed = [sys.executable, "-P", "-m", "robustmail", "list", "margins"]
    out = subprocess.run(listed, capture_output=True, text=True, check=True, env=environment).stdout
    assert "  tilted_plugins_margin      from tilted-plugins\n" in out


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("margn mine", "new margn: no such beginning. Did you mean 'margin'?"),
        ("margin my-margin", "cannot be the name of a Python module. Write my_margin."),
        ("margin ../mine", "cannot be the name of a Python module. Write mine."),
        ("margin class", "cannot be the name of a Python module."),
        ("margin pm_adv", "that name is taken by robustmail"),
        ("weighter sigmoid", "that name is taken by robustmail"),
    ],
)
def test_a_name_that_cannot_be_is_refused(said, tmp_path: Path, words: str, refused: str):
    code, error = said(f"new {words}")
    assert (code, error.count("\n")) == (2, 1)
    assert refused in error
    assert list(tmp_path.iterdir()) == []
