"""A network of timm with knobs of its constructor is a value of a recipe, and a text that files may hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from robustmail import AT, PGD, SGD, State, fit, timm_model
from robustmail.config.overrides import apply_overrides
from robustmail.errors import ModelError, RecipeError
from robustmail.evaluation.model_loading import load_model
from robustmail.fields import describe, flatten
from robustmail.models.classifier import Classifier, build, check_forward, check_name, is_network
from robustmail.models.precision import choose_precision, compute_models
from robustmail.models.timm_model import read_timm_model
from robustmail.records import StepFinished
from robustmail.train.run import preflight, run
from tests.train.conftest import recipe

VIT = timm_model("vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2)
CONVNEXT = timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=[8, 8, 8, 8], patch_size=1)
SHORT = recipe.but(
    epochs=2, batch=700, attack=PGD(eps=0.1, alpha=0.1, steps=1), objective=AT(), optimizer=SGD(lr=0.05),
    weighter=None, margin=None, burn_in=0, validate="nat", evaluate=("nat",),
)  # fmt: skip


def test_its_knobs_are_fields_that_are_printed_compared_and_changed() -> None:
    small = timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4)
    assert describe(small) == "timm_model('vit_tiny_patch16_224', img_size=32, patch_size=4)"
    assert small == timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4)
    assert small != timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8)
    assert small != timm_model("vit_small_patch16_224", img_size=32, patch_size=4)
    assert hash(CONVNEXT) == hash(timm_model("convnext_atto", depths=[1] * 4, dims=(8,) * 4, patch_size=1))
    assert dataclasses.replace(small, patch_size=2)(7, 1).patch_embed.proj.weight.shape == (192, 1, 2, 2)
    made = apply_overrides(recipe, ['model=timm_model("vit_tiny_patch16_224", img_size=32)', "model.img_size=16"])
    assert made.model == timm_model("vit_tiny_patch16_224", img_size=16)
    assert flatten(made)["model"] == "timm_model('vit_tiny_patch16_224')"
    assert flatten(made)["model.img_size"] == "16"


@pytest.mark.parametrize(
    ("knobs", "wrong"),
    [
        ({"pretrained": True}, "pretrained is not a knob here. Data set classes and channels; init names weights."),
        ({"checkpoint_path": "x.pth"}, "checkpoint_path is not a knob here"),
        ({"pretrained_cfg_overlay": 1}, "pretrained_cfg_overlay is not a knob here"),
        ({"num_classes": 3}, "num_classes is not a knob here"),
        ({"features_only": True}, "features_only is not a knob here"),
        ({"norm_layer": nn.LayerNorm}, "knobs are numbers, texts"),
        ({"drop_rate": float("nan")}, "knobs are numbers, texts"),
        ({"args": {"a": 1}}, "knobs are numbers, texts"),
    ],
)
def test_a_knob_that_loads_wraps_or_is_no_literal_is_refused(knobs: dict[str, object], wrong: str) -> None:
    with pytest.raises(RecipeError) as caught:
        timm_model("vit_tiny_patch16_224", **knobs)
    assert wrong in str(caught.value)


def test_an_unknown_name_or_knob_is_refused_with_the_nearest_before_anything_is_loaded() -> None:
    with pytest.raises(ModelError, match=r"timm has no such model. Did you mean 'vit_tiny_patch16_224'\?"):
        timm_model("vit_tini_patch16_224")
    for name in ("hf-hub:timm/resnet18", "local-dir:/tmp/x", "timm/resnet18"):
        with pytest.raises(ModelError, match="timm has no such model"):
            timm_model(name)
    misspelt = timm_model("vit_tiny_patch16_224", img_sise=32)
    for attempt in (lambda: preflight(recipe.but(model=misspelt)), lambda: build(misspelt, 10, 3)):
        with pytest.raises(ModelError, match=r"VisionTransformer has no knob 'img_sise'. Did you mean 'img_size'\?"):
            attempt()


@pytest.mark.parametrize("value", [VIT, CONVNEXT, timm_model("resnet18"), timm_model("cifar_wrn10_1", drop_rate=1 / 3)])
def test_its_text_is_read_back_as_the_same_value_and_names_a_network(value: object) -> None:
    assert read_timm_model(value.text) == value
    assert is_network(value.text)
    check_name(value.text)
    with torch.device("meta"):
        by_text, by_value = build(value.text, 7, 1), build(value, 7, 1)
    assert str(by_text) == str(by_value)


@pytest.mark.parametrize(
    "text",
    [
        "timm_model('resnet18', pretrained=True)",
        "timm_model('resnet18', checkpoint_path='x')",
        "timm_model('resnet18', act_layer='../x')",
        "timm_model('resnet18', act_layer='http://x')",
        "timm_model('resnet18', drop_rate=1e9)",
        "timm_model('vit_tiny_patch16_224', depth=100000)",
        "timm_model('vit_tiny_patch16_224', depth=10**3)",
        "timm_model('hf-hub:a/b')",
        "timm_model('/etc/passwd')",
        "timm_model('resnet18', **{'pretrained': True})",
        "timm_model(*['resnet18'])",
        "timm_model('resnet18', drop_rate=open('x'))",
        "timm_model('resnet18', drop_rate=(lambda: 1)())",
        "timm_model(timm_model('resnet18'))",
        "timm_model('resnet18').check()",
        "timm_model('resnet18'); import os",
        "timm_model('resnet18', 3)",
        "timm_model()",
        "timm_model(",
        "timm_model('resnet18'" + ", drop_rate=0" * 40 + ")",
        "timm_models('resnet18')",
        "os.system('true')",
    ],
)
def test_a_text_that_is_no_built_in_name_with_literals_names_no_network(text: str) -> None:
    assert read_timm_model(text) is None
    assert not is_network(text)
    with pytest.raises(ModelError):
        check_name(text)


def test_a_network_for_another_size_of_images_is_met_with_what_to_write() -> None:
    model = build("vit_tiny_patch16_224", 10, 3)
    with pytest.raises(ModelError) as caught:
        check_forward(model, "vit_tiny_patch16_224", torch.rand(2, 3, 32, 32), 10)
    assert """Write model='timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4)'.""" in str(caught.value)
    with torch.device("meta"):
        model = build(timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4), 10, 3)
        check_forward(model, "it", torch.rand(2, 3, 32, 32), 10)


@pytest.mark.long
@pytest.mark.parametrize("model", [VIT, CONVNEXT], ids=["ViT", "ConvNeXt"])
def test_it_trains_resumes_to_the_same_bits_and_is_opened_again(
    tmp_path: Path, digit_images: object, model: object
) -> None:
    made = SHORT.but(model=model)
    whole, parts = State.fresh(made, tmp_path / "whole"), State.fresh(made, tmp_path / "parts")
    losses = [record.loss for record in fit(made, whole) if isinstance(record, StepFinished)]
    assert len(losses) == 4
    for record in fit(made, parts):
        if isinstance(record, StepFinished) and record.epoch == 1:
            parts.save()
            break
    again = State.fresh(made, tmp_path / "parts")
    again.load()
    list(fit(made, again))
    files = [(tmp_path / folder / "last.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]
    loaded = load_model(tmp_path / "whole" / "last.safetensors", digit_images)
    assert loaded.spec["model"] == model.text
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), whole.model.eval()(x))


def test_a_run_of_it_ends_in_an_evaluation_of_its_folder(tmp_path: Path, digit_images: object) -> None:
    made = SHORT.but(model=VIT, epochs=1)
    list(run(made, tmp_path / "run", "vit"))
    assert load_model(tmp_path / "run", digit_images).spec["model"] == VIT.text


def test_depthwise_convolutions_are_not_put_into_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustmail.models.precision._bf16_hardware", lambda device: (True, "AMX"))
    sample = torch.rand(2, 3, 32, 32)
    grouped = Classifier(timm_model("convnext_atto", depths=(1,) * 4, dims=(40,) * 4, patch_size=2)(10, 3))
    assert choose_precision("auto", grouped, sample).name == "fp32"
    vit = Classifier(timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2)(10, 3))
    choice = choose_precision("auto", vit, sample)
    assert choice.name == "bf16"
    compute = compute_models(vit, choice, "eval", sample)
    assert "attacks see the model in autocast" in compute.description, "a ViT has nothing to fold"
    assert compute.attack(sample).dtype == torch.float32
