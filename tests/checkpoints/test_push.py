"""Weights, card and results go to a hub: these, whole, without secrets, and with the user's word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

from robustmail.evaluation.storage import with_seal
from robustmail.models.classifier import build
from robustmail.runtime.secrets import find_secret
from tests.checkpoints.fake_hub import FakeHub, use_hub
from tests.security.folders import call

TOKEN = "hf_" + "x" * 30
pytestmark = pytest.mark.long


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub that takes uploads of whoever has TOKEN; a repository of somebody's own files is there."""
    fake = FakeHub({"me/old": {"README.md": b"mine", "notes.txt": b"keep"}}, token=TOKEN)
    monkeypatch.chdir(tmp_path)
    with fake.running():
        use_hub(fake.url, tmp_path / "hub", monkeypatch)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file, and its evaluation on digits."""
    folder = tmp_path_factory.mktemp("pushed")
    torch.manual_seed(0)
    tensors = build("small_cnn", 10, 1).net.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "net.safetensors")
    return folder


@pytest.fixture
def folder(evaluated: Path, capsys, tmp_path: Path) -> Path:
    if not (evaluated / "e").exists():
        words = ("eval", evaluated / "net.safetensors", "--model", "small_cnn", "--normalize", "none",
                 "--data", "digits", "--n", "20", "--attacks", "nat", "--out", evaluated / "e", "--plain")  # fmt: skip
        code, _, said = call(capsys, *words)
        assert code == 0, said
    shutil.copytree(evaluated / "e", tmp_path / "e")
    shutil.copy(evaluated / "net.safetensors", tmp_path / "e")
    return tmp_path / "e"


def resealed(folder: Path, **changes: Any) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["provenance"] |= changes.pop("provenance", {})
    (folder / "results.json").write_text(json.dumps(with_seal(results | changes)))


def uploads(hub: FakeHub) -> list[str]:
    return [request for request in hub.requests if request.startswith("POST")]


def test_what_is_uploaded_can_be_opened_and_verified_again(hub, folder, capsys):
    (folder / "secret.txt").write_text("not ours")
    (folder / "recipe.py").write_text("print('of the user')")
    code, out, said = call(capsys, "push", folder, "hf://me/net", "--yes")
    assert code == 0, said
    files = hub.repositories["me/net"]
    names = ["net.safetensors", *(f"evaluation/{n}" for n in ("results.json", "ledger.csv", "examples.safetensors"))]
    assert sorted(files) == sorted([*names, "README.md"])
    assert all(f"  {name}  {len(files[name]):,} bytes" in out for name in names)
    assert "a new repository, which everybody can read" in out
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_name == "accuracy"
    there = Path("there/evaluation")
    there.mkdir(parents=True)
    for name in names[1:]:
        (there / Path(name).name).write_bytes(files[name])
    code, _, said = call(capsys, "verify", there, "--checkpoint", "hf://me/net")
    assert code == 0, said


def test_nothing_is_uploaded_without_the_users_word(hub, folder, capsys):
    code, out, said = call(capsys, "push", folder, "hf://me/old")
    assert (code, said.count("\n")) == (2, 1)
    assert "nothing is uploaded unasked. Add --yes" in said
    assert "README.md" in out
    assert "(replaces the one that is there)" in out
    assert uploads(hub) == []
    assert hub.repositories["me/old"] == {"README.md": b"mine", "notes.txt": b"keep"}


def test_files_that_are_there_and_not_ours_stay(hub, folder, capsys):
    assert call(capsys, "push", folder, "hf://me/old", "--yes")[0] == 0
    assert hub.repositories["me/old"]["notes.txt"] == b"keep"
    assert hub.repositories["me/old"]["README.md"] != b"mine"


REFUSED = {
    "a secret in the command": (lambda f: resealed(f, provenance={"command": f"x --data https://me:pw@h/{TOKEN}"}),
                                "holds a token of the Hugging Face hub, so nothing is uploaded"),
    "a secret of the environment": (lambda f: resealed(f, provenance={"command": "x kept-secret-1"}),
                                    "the value of the environment variable MY_API_KEY"),
    "unfinished": (lambda f: resealed(f, complete=False), "is not finished"),
    "altered": (lambda f: (f / "results.json").write_text((f / "results.json").read_text().replace("nat", "tan")),
                ""),
    "no weights": (lambda f: (f / "net.safetensors").unlink(), "does not hold its weights"),
    "other weights": (lambda f: save_file({"a": torch.zeros(1)}, f / "net.safetensors"), "its bytes differ"),
    "a link": (lambda f: ((f / "net.safetensors").rename(f.parent / "n"), (f / "net.safetensors").symlink_to("../n")),
               ""),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_must_not_leave_is_refused_in_one_line(hub, folder, capsys, monkeypatch, change, message):
    monkeypatch.setenv("MY_API_KEY", "kept-secret-1")
    change(folder)
    code, _, said = call(capsys, "push", folder, "hf://me/net", "--yes")
    assert (code, said.count("\n")) == (2, 1), said
    assert message in said
    assert TOKEN not in said
    assert "kept-secret-1" not in said
    assert uploads(hub) == []


def test_a_pickle_is_not_uploaded(hub, folder, capsys):
    torch.save({}, "net.pth")
    said = call(capsys, "push", folder, "hf://me/net", "--checkpoint", "net.pth", "--yes")[2]
    assert "is no safetensors file, and other formats can hold more than weights" in said


@pytest.mark.parametrize("repository", ["me/net", "hf://me", "hf://me/net/file.pt", "hf://me/net@main", "hf://../x/y"])
def test_what_is_no_repository_is_refused(hub, folder, capsys, repository):
    code, _, said = call(capsys, "push", folder, repository, "--yes")
    assert (code, "Write hf://OWNER/NAME." in said) == (2, True)
    assert uploads(hub) == []


def test_who_is_not_logged_in_is_told_how(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, said = call(capsys, "push", folder, "hf://me/net", "--yes")
    assert (code, said.count("\n")) == (2, 1)
    assert "log in with `hf auth login`" in said


@pytest.mark.parametrize("text", ["hf_" + "a" * 34, "ghp_" + "a" * 36, "AKIA" + "A" * 16, "x://u:p@h", "--token abc",
                                  "-----BEGIN RSA PRIVATE KEY-----"])  # fmt: skip
def test_a_secret_is_seen(text):
    assert find_secret(f"before {text} after")


def test_what_every_evaluation_says_is_no_secret():
    usual = '{"command": "robustmail eval m.pth --data cifar10", "fingerprint": "hf_1", "link": "https://x.y"}'
    assert find_secret(usual) is None
