"""A model without images: what the file says is taken, what it does not say is asked for, and no code is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from robustmail import from_pretrained
from robustmail.errors import ModelError, RunError
from robustmail.evaluation.pretrained import open_pretrained
from robustmail.models.classifier import Classifier, build
from tests.checkpoints.test_source import CONFIG, MEAN, STD, hub, network, weights  # noqa: F401  fixtures

IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FACTS = {"model": "small_cnn", "classes": 10, "channels": 3, "shape": [3, 32, 32], "normalize": [[*MEAN], [*STD]]}


@pytest.fixture
def run(network, tmp_path: Path) -> Path:  # noqa: F811
    """The folder of a run with a recipe that would run code."""
    folder = tmp_path / "net" / "0"
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "best.safetensors", {"robustmail": json.dumps(FACTS | {"epoch": 3})})
    (folder / "recipe.json").write_text("{}")
    (folder / "recipe.py").write_text("raise SystemExit('it ran')")
    return folder


def test_a_run_is_opened_with_its_normalisation_in_eval_mode(run, network):  # noqa: F811
    model = from_pretrained(run)
    assert isinstance(model, Classifier)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(IMAGES), Classifier(network, (MEAN, STD)).eval()(IMAGES))
    assert torch.equal(from_pretrained(str(run / "best.safetensors"))(IMAGES), model(IMAGES))
    opened = open_pretrained(run)
    assert (opened.name, opened.shape, len(opened.sha256)) == ("net/0", (3, 32, 32), 64)


def test_a_repository_of_the_hub_is_opened_by_its_config(hub, network):  # noqa: F811
    model = from_pretrained("hf://owner/name")
    torch.testing.assert_close(model(IMAGES), Classifier(network, (MEAN, STD)).eval()(IMAGES))
    opened = open_pretrained("hf://owner/name@v1")
    assert (opened.name, opened.shape) == ("name", (3, 32, 32))
    assert any("hf://owner/name/model.safetensors@1111" in note for note in opened.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not say which network it is, and there are no images to decide by. Pass --model"),
        ({"model": "small_cnn"}, "does not say how images are normalised. Pass --normalize"),
        ({"model": "small_cnn", "normalize": "cifar"}, "Did you mean 'cifar10'"),
        ({"model": "cifar_resnet18", "normalize": "none"}, "does not fit the model"),
    ],
)
def test_nothing_is_guessed(hub, options, message):  # noqa: F811
    with pytest.raises(ModelError, match=message):
        from_pretrained("hf://owner/bare", **options)


def test_what_the_file_does_not_say_the_caller_says(hub, network):  # noqa: F811
    model = from_pretrained("hf://owner/bare", "small_cnn", "half")
    torch.testing.assert_close(model(IMAGES), Classifier(network, ((0.5,), (0.5,))).eval()(IMAGES))


def test_a_network_that_is_code_beside_the_weights_is_not_run(run):
    facts = FACTS | {"model": "recipe.py:net"}
    tensors = {name: t.contiguous() for name, t in build("small_cnn", 10, 3).net.state_dict().items()}
    save_file(tensors, run / "best.safetensors", {"robustmail": json.dumps(facts)})
    with pytest.raises(ModelError, match="its network is net, which is code"):
        from_pretrained(run)


def test_a_folder_without_weights_and_one_of_transformers_are_refused(tmp_path, run):
    (run / "best.safetensors").unlink()
    with pytest.raises(RunError, match="without weights"):
        from_pretrained(run)
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    with pytest.raises(ModelError, match="of the transformers library"):
        from_pretrained(tmp_path)


def test_a_hub_file_without_robustmails_facts_has_the_classes_of_its_tensors(tmp_path):
    tensors = {name: t.contiguous() for name, t in build("small_cnn", 7, 3).net.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_classes": 7}))
    assert from_pretrained(tmp_path)(IMAGES).shape == (5, 7)
