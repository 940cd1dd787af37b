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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path):
    command = [sys.executable, "-P", "-m", "robustmail", "list"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"the output cannot be written (No space left on device)" in done.stderr
