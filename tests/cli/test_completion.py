"""What Tab offers, in bash and zsh; fields as options; the help."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from robustmail.cli import main
from robustmail.cli.recipe_verbs import as_overrides


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Ask as bash does; words: broken at = and :, the last is being typed."""
    monkeypatch.chdir(tmp_path)

    def ask(*words: str) -> list[str]:
        asked = {"COMP_WORDS": "\n".join(["robustmail", *words]), "COMP_CWORD": str(len(words)),
                 "_ROBUSTMAIL_COMPLETE": "complete_bash"}  # fmt: skip
        for name, value in asked.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["robustmail"])
        with pytest.raises(SystemExit) as left:
            main.main()
        assert left.value.code == 0
        return capsys.readouterr().out.split()

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ru"], ["run"]),
        (["run", "quick"], ["quickstart"]),
        (["run", "mail_trades", "burn"], ["burn_in=", "burn_in=74"]),  # two, so that the shell adds no space
        (["run", "mail_trades", "weighter.sl"], ["weighter.slope=", "weighter.slope=2.0"]),
        (["run", "mail_trades", "margin", "=", "pm_n"], ["pm_nat"]),
        (["run", "mail_trades", "margin", "="], "pm_nat"),
        (["run", "mail_trades", "--margin", "pm_n"], ["pm_nat"]),
        (["run", "mail_trades", "--burn"], ["--burn_in"]),
        (["run", "mail_trades", "--fre"], ["--fresh", "--freeze"]),
        (["run", "mail_trades", "precision", "=", "b"], ["bf16"]),
        (["trials", "quick"], ["quickstart"]),
        (["trials", "at", "--over", "margin", "=", "pm_n"], ["pm_nat"]),
        (["eval", "--attacks", "nat,pgd2"], ["nat,pgd20"]),
        (["eval", "--attacks", "nat,na"], []),
        (["eval", "runs/m"], ["runs/mine/0"]),
        (["eval", "model"], ["model.pth"]),
        (["compare", "runs/mine/0", "runs"], ["runs/mine/0"]),
        (["list", "weigh"], ["weighters"]),
        (["run", "mine.py", "margin", "=", "mine.py", ":", "dou"], ["doubt"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else words,
)
def test_bash_is_offered_what_may_follow(offered, tmp_path: Path, words: list[str], expected: list[str] | str):
    (tmp_path / "runs/mine/0").mkdir(parents=True)
    (tmp_path / "runs/mine/0/recipe.json").write_text("{}")
    (tmp_path / "model.pth").touch()
    (tmp_path / "mine.py").write_text("def doubt(step): ...\nraise SystemExit('Tab has run it')\n")
    found = offered(*words)
    assert expected in found if isinstance(expected, str) else found == expected


@pytest.fixture
def shell_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the command `robustmail`, first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "robustmail"
    command.write_text(f"#!{sys.executable}\nfrom robustmail.cli.main import main\nmain()\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path


@pytest.mark.parametrize(
    ("shell", "start"),
    [
        ("bash", ["bash", "--norc", "--noprofile", "-i"]),
        ("zsh", ["zsh", "-f", "-i"]),
    ],
)
def test_a_shell_completes_the_line(shell_path: Path, shell: str, start: list[str]):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    before = {"bash": "bind 'set bell-style none'", "zsh": "autoload -U compinit; compinit -u -D"}[shell]
    number, terminal = pty.openpty()
    termios.tcsetwinsize(number, (24, 100))
    process = subprocess.Popen(start, stdin=terminal, stdout=terminal, stderr=terminal, cwd=shell_path,
                               env={**os.environ, "TERM": "xterm"},
                               start_new_session=True, close_fds=True)  # fmt: skip
    try:
        os.write(number, f"{before}; eval \"$(robustmail --show-completion)\"; PS1='rea''dy> '\n".encode())
        until(number, "ready> ")
        os.write(number, b"robustmail run mail_trades weighter.sl")
        until(number, "weighter.sl")
        os.write(number, b"\t")
        until(number, "ope=")
    finally:
        process.kill()
        process.wait()
        os.close(number)
        os.close(terminal)


def test_a_shell_whose_settings_cannot_be_written_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "home").write_text("no folder")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m robustmail --install-completion; exit $?"],
        env={**os.environ, "HOME": str(tmp_path / "home")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    start, end = done.stderr.split(": cannot be written (")
    assert start.startswith(f"robustmail: {tmp_path}/home")  # which of the files in it depends on typer's release
    assert end.endswith("). Put what robustmail --show-completion prints where your shell reads it.\n")


def until(number: int, text: str, seconds: float = 15) -> None:
    """Read a terminal until it has shown the text."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([number], [], [], 1)[0]:
            shown += os.read(number, 4096).decode(errors="replace")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "3", "at"], ["at", "seed=3"]),
        (["at", "--burn-in=3", "--out", "--seed"], ["at", "--out", "--seed", "burn_in=3"]),
        (["at", "--fresh", "--attack.eps", "-1"], ["at", "--fresh", "attack.eps=-1"]),
        (["at", "--plain", "--", "--seed", "3"], ["at", "--plain", "--", "--seed", "3"]),
    ],
)
def test_fields_are_options_wherever_they_stand(words: list[str], expected: list[str]):
    assert as_overrides(words, own=["--out", "--fresh", "--plain"], flags=["--fresh", "--plain"]) == expected


def test_the_help_has_every_verb_under_a_purpose(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robustmail", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    said = capsys.readouterr().out
    assert "Train:\n  run " in said
    assert "Evaluate:\n  eval " in said
    assert "Other" not in said
