"""Weights in folders and on the hub: what is named is opened, pinned to a commit, and what lies beside it is data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants, utils
from safetensors.torch import save, save_file

from robustmail.checkpoints import find_weights
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError, RunError
from robustmail.evaluation.model_loading import load_model, reload_model
from robustmail.models.classifier import Classifier, build
from tests.checkpoints.fake_hub import COMMITS, FakeHub, use_hub

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CONFIG = {
    "architecture": "small_cnn",
    "num_classes": 10,
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "mean": MEAN, "std": STD,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("small_cnn", 10, 3).net.eval()


@pytest.fixture(scope="module")
def weights(network) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})


@pytest.fixture(scope="module")
def data() -> TestSet:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=rng)
    return TestSet("random", Split(x, torch.randint(10, (16,), generator=rng)), 10)


reset_sessions = getattr(utils, "reset_sessions", lambda: None)
"""older releases ask whether they are offline when a session begins"""


@pytest.fixture
def hub(weights, tmp_path, monkeypatch):
    """A hub with a repository of weights and config.json, and others that go wrong."""
    fake = FakeHub(
        {
            "owner/name": {
                "model.safetensors": weights,
                "config.json": json.dumps(CONFIG).encode(),
                "README.md": b"hi",
            },
            "owner/bare": {"checkpoint/wrn.pt": weights},
            "owner/two": {"a.pt": b"1", "b.pt": b"2"},
            "owner/none": {"README.md": b"hi"},
            "owner/gated": {},
        },
        gated=("owner/gated",),
    )
    with fake.running():
        use_hub(fake.url, tmp_path / "hub", monkeypatch)
        reset_sessions()
        yield fake


def outputs(loaded, data: TestSet) -> torch.Tensor:
    return loaded.model(data.part.x.float() / 255)


def expected(network, data: TestSet, normalize=(MEAN, STD)) -> torch.Tensor:
    return Classifier(network, normalize)(data.part.x.float() / 255)


# The hub


@pytest.mark.parametrize(
    "text", ["hf://owner/name", "hf://owner/name/model.safetensors", "hf:/owner/name", "hf://owner/name@main"]
)
def test_a_file_of_the_hub_is_opened_and_recorded_with_its_commit(hub, network, data, text):
    loaded = load_model(text, data)
    assert loaded.spec["checkpoint"] == f"hf://owner/name/model.safetensors@{COMMITS['main']}"
    assert loaded.name == "name"
    assert any(COMMITS["main"] in note for note in loaded.notes)
    torch.testing.assert_close(outputs(loaded, data), expected(network, data))


def test_a_revision_is_that_revision(hub, data):
    assert find_weights("hf://owner/name/model.safetensors@v1").reference.endswith(f"@{COMMITS['v1']}")


def test_a_recorded_commit_is_opened_again_without_the_network(hub, data, monkeypatch):
    first = load_model("hf://owner/name", data)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    again = reload_model(first.spec, data)
    assert (again.fingerprint, again.spec["checkpoint"]) == (first.fingerprint, first.spec["checkpoint"])
    assert find_weights("hf://owner/name").reference == first.spec["checkpoint"]
    assert find_weights(Path("hf://owner/name/model.safetensors")).reference == first.spec["checkpoint"]
    assert not hub.requests


def test_nothing_but_weights_and_config_is_downloaded(hub):
    find_weights("hf://owner/name")
    bodies = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert {request.rpartition("/")[2] for request in bodies} == {"model.safetensors", "config.json"}


def test_a_file_without_config_beside_it_says_nothing_of_the_network(hub):
    source = find_weights("hf://owner/bare")
    assert (source.model, source.normalize, source.name) == (None, None, "bare/wrn")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("hf://owner", "not a file of the hub.*hf://OWNER/NAME/FILE@REVISION"),
        ("hf://", "not a file of the hub"),
        ("hf://owner/name/a@b@c", "not a file of the hub"),
        ("hf://owner/na--me/model.pt", "not a file of the hub"),
        ("hf://owner/name/../../x.pt", "has no file ../../x.pt"),
        ("hf://owner/nothing", "has no model owner/nothing"),
        ("hf://owner/nothing/model.pt", "has no model owner/nothing"),
        ("hf://owner/name/model.safetensor", "no file model.safetensor. Did you mean 'model.safetensors'"),
        ("hf://owner/name@v2", "no revision v2"),
        ("hf://owner/name/model.safetensors@v2", "no revision v2"),
        ("hf://owner/gated", "gated: its owner has to give you access"),
        ("hf://owner/gated/model.pt", "gated"),
        ("hf://owner/two@v1", "2 files of weights: a.pt, b.pt. Pass hf://owner/two/a.pt@v1."),
        ("hf://owner/none", "no file of weights among README.md"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_told_in_a_line(hub, text, wrong):
    with pytest.raises(ModelError, match=wrong) as caught:
        find_weights(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["hf://owner/name", "hf://owner/name/a.pt", f"hf://owner/name/a.pt@{'0' * 40}"])
def test_without_a_network_what_is_not_in_the_cache_is_told(text, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(ModelError, match=r"is not in the cache .*http://127\.0\.0\.1:9 does not answer"):
        find_weights(text)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        find_weights(text)


# Folders


@pytest.fixture
def folder(tmp_path, weights) -> Path:
    path = tmp_path / "downloaded"
    path.mkdir()
    (path / "model.safetensors").write_bytes(weights)
    (path / "pytorch_model.bin").write_bytes(b"the same in another format")
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "README.md").write_text("hi")
    return path


def test_a_downloaded_folder_opens_as_it_lies(folder, network, data):
    loaded = load_model(folder, data)
    assert (loaded.name, loaded.spec["model"]) == ("downloaded", "small_cnn")
    assert any("says config.json" in note for note in loaded.notes)
    torch.testing.assert_close(outputs(loaded, data), expected(network, data))


def test_the_caller_overrides_config_json(folder, network, data):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"architecture": "resnet18"}))
    loaded = load_model(folder, data, model="small_cnn", normalize="none")
    torch.testing.assert_close(outputs(loaded, data), expected(network, data, None))
    with pytest.raises(ModelError, match="does not fit the model"):
        load_model(folder, data)


def cached(tmp_path, weights, link="../../blobs/abc") -> Path:
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / COMMITS["main"]
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMITS["main"])
    (repo / "blobs" / "abc").write_bytes(weights)
    (repo / "blobs" / "def").write_text(json.dumps(CONFIG))
    (snapshot / "model.safetensors").symlink_to(link)
    (snapshot / "config.json").symlink_to("../../blobs/def")
    return snapshot


def test_a_folder_of_the_hubs_cache_opens_though_its_files_are_links(tmp_path, weights, network, data, monkeypatch):
    snapshot = cached(tmp_path, weights)
    for path in (snapshot, snapshot.parent.parent):
        loaded = load_model(path, data)
        assert loaded.name == "name"
        torch.testing.assert_close(outputs(loaded, data), expected(network, data))
    monkeypatch.chdir(snapshot)
    assert load_model(".", data).name == "name"


@pytest.mark.parametrize("link", ["../../../../secret", "/etc/hostname", "../../refs/main"])
def test_a_link_that_leads_out_of_the_cache_is_refused(tmp_path, weights, link):
    (tmp_path / "secret").write_bytes(weights)
    with pytest.raises(RunError, match=r"leads out of|link to nothing"):
        find_weights(cached(tmp_path, weights, link))


def test_a_link_that_leads_out_of_a_folder_is_refused(folder, tmp_path, weights):
    (tmp_path / "secret").write_text(json.dumps(CONFIG))
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to("../secret")
        with pytest.raises(RunError, match="leads out of"):
            find_weights(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


def test_a_folder_of_the_transformers_library_says_what_to_do(folder, data):
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["ViTForImageClassification"], "model_type": "vit"})
    )
    with pytest.raises(ModelError, match=r"transformers library \(ViTForImageClassification\).*robustmail.evaluate"):
        load_model(folder, data)
    assert load_model(folder, data, model="small_cnn", normalize="none").spec["model"] == "small_cnn"


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["a.pt", "b.safetensors"], "2 files of weights: a.pt, b.safetensors. Pass .*/a.pt"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "split into several files"),
        (["README.md"], "no file of weights among README.md"),
        ([], "no files in it"),
    ],
)
def test_a_folder_with_no_weights_or_several_names_them(tmp_path, names, wrong):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=wrong):
        find_weights(folder)


def test_an_optimizer_beside_the_weights_is_no_weights(folder):
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        (folder / name).write_bytes(b"x")
    assert find_weights(folder).path.name == "model.safetensors"


HOSTILE = {
    "code": {"architecture": "../x.py:y"},
    "a name that would be downloaded": {"architecture": "hf-hub:evil/x"},
    "another such": {"architecture": "hf_hub:evil/x"},
    "no text": {"architecture": ["small_cnn"]},
    "a long name": {"architecture": "a" * 10**5},
    "an escape": {"architecture": "\x1b[2Jsmall_cnn"},
    "huge depth": {"architecture": "WideResNet-99999994-10"},
    "numbers as text": {"pretrained_cfg": CONFIG["pretrained_cfg"] | {"mean": ["0.5"] * 3}},
    "nonsense std": {"pretrained_cfg": CONFIG["pretrained_cfg"] | {"std": [0, -1, 1e9]}},
    "true": {"pretrained_cfg": CONFIG["pretrained_cfg"] | {"std": [True, True, True]}},
    "huge image": {"pretrained_cfg": CONFIG["pretrained_cfg"] | {"input_size": [3, 10**9, 10**9]}},
    "other channels": {"pretrained_cfg": CONFIG["pretrained_cfg"] | {"input_size": [4, 32, 32]}},
    "a list": {"pretrained_cfg": [1]},
}


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_inert(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    source = find_weights(folder)
    assert (source.model, source.normalize, source.transformers) == (None, None, None)
    assert all(note.isprintable() and len(note) < 300 for note in source.notes)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        "{" + '"a":{' * 100 + "}" * 101,
        "[]",
        "null",
        "",
        "\xff",
        '{"architecture": NaN}',
        " " * (2**20 + 1),
    ],
    ids=["deep", "deep objects", "a list", "null", "nothing", "no ASCII", "NaN", "huge"],
)
def test_a_config_that_is_no_object_is_said_and_not_used(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    source = find_weights(folder)
    assert (source.model, source.normalize) == (None, None)
    assert any(note.startswith("config.json is not used") for note in source.notes)


def test_a_timm_network_without_a_word_on_normalisation_gets_timms_as_a_suggestion(tmp_path, data):
    network = timm.create_model("resnet18", num_classes=10)
    save_file(network.state_dict(), tmp_path / "file.safetensors")
    with pytest.raises(ModelError, match=r"timm's weights of resnet18 have imagenet"):
        load_model(tmp_path / "file.safetensors", data, model="resnet18")
