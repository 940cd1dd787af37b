"""A reader that has read enough, as `| head`, ends a verb without a word; nothing is coloured where nobody asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [["list"], ["list", "runs"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(tmp_path: Path, words: list[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").touch()
    (tmp_path / "run" / "recipe.json").write_text("{}")  # rich writes its line
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "robustmail", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
