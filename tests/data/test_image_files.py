"""Image files: resized as torchvision does, decoded only when they are needed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Resize

from robustmail import evaluate, load_data
from robustmail.data.image_files import Preprocess, StreamedSplit, data_fingerprint
from robustmail.errors import DataError
from robustmail.evaluation.data_loading import open_data, pretrained_preprocess
from robustmail.models.pretrained import pretrained_config


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of four JPEG files, each of another size."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "photos" / f"c{i % 3}" / f"{i:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40 + 3 * i, 50 + i), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


def test_pixels_are_those_of_torchvisions_resize_and_centre_crop(photos: Path) -> None:
    found = load_data(str(photos), preprocess=Preprocess(36, 32)).part
    transform = Compose([Resize(36), CenterCrop(32)])
    paths = [photos / f"c{i % 3}" / f"{i:02}.JPEG" for i in (0, 1, 2)]  # in turn, the first of each class
    for path, image in zip(paths, found.x[:3], strict=True):
        expected = np.asarray(transform(Image.open(path).convert("RGB")))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_images_of_different_sizes_are_resized_as_the_model_was_pretrained_and_that_is_said(photos: Path) -> None:
    found = open_data(str(photos)).checked(*pretrained_preprocess(pretrained_config("resnet50")))
    assert found.part.x.shape == (12, 3, 224, 224)
    assert found.notes[0] == "images: shorter side resized to 235 (bicubic), centre 224 x 224"
    with pytest.raises(DataError, match=r"images differ in size.*Pass --resize 256 --crop 224"):
        open_data(str(photos)).checked(*pretrained_preprocess(pretrained_config("small_cnn")))


@pytest.mark.parametrize(("model", "side"), [("vit_tiny_patch16_224", 224), ("resnet50", 48)])
def test_images_of_one_size_are_resized_only_for_a_network_that_takes_no_other(
    tmp_path: Path, model: str, side: int
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / name / "0.png")
    assert open_data(str(tmp_path)).checked(*pretrained_preprocess(pretrained_config(model))).part.x.shape[2:] == (
        side,
        side,
    )


def test_only_the_images_that_are_asked_for_are_opened(photos: Path) -> None:
    for path in photos.rglob("*.JPEG"):
        if int(path.stem) >= 6:
            path.write_bytes(b"no image")
    found = load_data(str(photos), 6, Preprocess(32, 32))
    assert found.part.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.part.loaded().x.shape == (6, 3, 32, 32)
    with pytest.raises(DataError, match=r"06\.JPEG cannot be read"):
        load_data(str(photos), 7, Preprocess(32, 32))


def test_images_on_disk_and_in_memory_are_the_same_data(photos: Path) -> None:
    found = load_data(str(photos), preprocess=Preprocess(32, 32)).part
    assert isinstance(found, StreamedSplit)
    whole = found.loaded()
    assert data_fingerprint(found) == data_fingerprint(whole)
    some = torch.tensor([7, 2, 2])
    assert torch.equal(found.take(some).loaded().x, whole.take(some).x)
    assert torch.equal(found.first(5).x[1:3], whole.x[1:3])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    rows = [evaluate(model, data, "nat,pgd10", eps=0.03).ledger for data in (found, whole)]
    assert torch.equal(rows[0].margin, rows[1].margin)
    assert rows[0].broken_by == rows[1].broken_by


def test_the_whole_set_decides_on_the_channels_and_not_what_is_taken_from_it(tmp_path: Path) -> None:
    for name, image in {"a/0": np.zeros((4, 4), np.uint8), "a/1": np.zeros((4, 4), np.uint8),
                        "b/0": np.full((4, 4, 3), 9, np.uint8)}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    part = load_data(str(tmp_path)).part
    for some in (part.first(1), part.take(torch.tensor([0, 2])), part.take(torch.tensor([True, False, False]))):
        assert some.x.shape == (len(some.y), 3, 4, 4) == some.loaded().x.shape


@pytest.mark.parametrize(("preprocess", "wrong"), [
    ({"crop": 64}, r"smaller than the crop of 64.*--resize"),
    ({"resize": 0}, r"--resize 0: expected 1"),
    ({"resize": 32, "crop": 64}, "the crop is larger than the resized image"),
    ({"resize": 32, "interpolation": "bicubik"}, "Did you mean .bicubic"),
])  # fmt: skip
def test_a_preprocessing_that_cannot_be_is_refused(photos: Path, preprocess: dict, wrong: str) -> None:
    with pytest.raises(DataError, match=wrong):
        load_data(str(photos), preprocess=Preprocess(**preprocess)).part.loaded()


def test_arrays_are_not_resized(slice_path: Path) -> None:
    for text in (str(slice_path), "digits()"):
        with pytest.raises(DataError, match=r"--resize and --crop are for.*--model file.py:factory"):
            load_data(text, preprocess=Preprocess(64))
