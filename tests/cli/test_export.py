"""robustmail export: a run, a stranger's file and a bad command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustmail.models.classifier import build
from tests.security.folders import call

FACTS = {"model": "small_cnn", "classes": 10, "channels": 1, "shape": [1, 8, 8], "normalize": [[0.5], [0.25]]}


@pytest.fixture(autouse=True)
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/net/0, with weights that know all about themselves; bare.pth, with the same and no word about them."""
    monkeypatch.chdir(tmp_path)
    tensors = {name: t.contiguous() for name, t in build("small_cnn", 10, 1).net.state_dict().items()}
    Path("runs/net/0").mkdir(parents=True)
    save_file(tensors, "runs/net/0/best.safetensors", {"robustmail": json.dumps(FACTS | {"epoch": 3})})
    torch.save(tensors, "bare.pth")


def test_a_run_is_exported_and_told(capsys):
    code, out, said = call(capsys, "export", "runs/net/0", "--to", "torchscript")
    assert (code, said) == (0, "")
    assert "net-0.pt: torchscript, images [B, 1, 8, 8] in [0, 1] -> logits [B, 10]\nOn 12 random images" in out
    assert Path("net-0.pt").stat().st_size > 100_000
    code, _, said = call(capsys, "export", "runs/net/0", "--to", "torchscript")
    assert (code, "is there already" in said) == (2, True)
    assert call(capsys, "export", "runs/net/0", "--to", "torchscript", "--replace")[0] == 0


def test_a_bare_file_needs_words_or_images(capsys):
    words = ("export", "bare.pth", "--to", "torchscript", "--out", "net.pt")
    named = ("--model", "small_cnn", "--normalize", "none")
    for more, message in (((), "Pass --model"), (named, "Pass --shape 3,32,32")):
        code, _, said = call(capsys, *words, *more)
        assert (code, message in said, said.count("\n")) == (2, True, 1)
        assert not Path("net.pt").exists()
    assert call(capsys, *words, *named, "--shape", "1,8,8")[0] == 0
    np.savez(
        "some.npz", x=np.random.default_rng(0).integers(256, size=(30, 8, 8), dtype=np.uint8), y=np.arange(30) % 10
    )
    code, out, said = call(capsys, *words, *named, "--data", "some.npz", "--replace")
    assert (code, "[B, 1, 8, 8]" in out) == (0, True), said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--to onx", "Did you mean 'onnx'?"),
        ("--to pt2 --out nowhere/net.pt2", "there is no folder nowhere"),
        ("--to pt2 --shape 8,8", "Write 3,32,32"),
        ("--to pt2 --shape 1,0,8", "Write 3,32,32"),
        ("--to pt2 --shape 3,8,8", "fails on images of 3 x 8 x 8"),
    ],
)
def test_a_bad_command_is_one_line_and_writes_nothing(more, message, capsys):
    before = sorted(Path().rglob("*"))
    code, _, said = call(capsys, "export", "runs/net/0", *more.split())
    assert (code, message in said, said.count("\n")) == (2, True, 1), said
    assert sorted(Path().rglob("*")) == before
