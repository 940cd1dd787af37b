"""Image folders: splits are splits, classes are classes, and what could be two things is refused in one line."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustmail import image_folder, load_data, subset
from robustmail.errors import DataError


def put(root: Path, *places: str, n: int = 1, size: int = 4, **options: Any) -> None:
    """n images in each of some folders; every pixel tells which image it is."""
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(np.full((size, size), 10 * i, np.uint8)).save(root / place / f"{i}.png", **options)


def read(path: Path) -> tuple[list[int], tuple[str, ...], str]:
    """(labels, classes, what is said)"""
    found = load_data(str(path))
    assert found.class_names is not None
    assert found.classes == len(found.class_names)
    return found.part.y.tolist(), found.class_names, "; ".join(found.notes)


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def annotate(root: Path, labels: dict[str, str]) -> None:
    lines = [f"{file}\t{wnid}\t0\t0\t3\t3\n" for file, wnid in labels.items()]
    (root / "val_annotations.txt").write_text("".join(lines))


def tiny_imagenet(root: Path) -> Path:
    """Tiny-ImageNet's layout: three classes, four labelled and two unlabelled images."""
    put(root, *(f"train/{wnid}/images" for wnid in ("n01", "n02", "n03")), n=2)
    put(root, "val/images", n=4)
    put(root, "test/images", n=2)
    (root / "wnids.txt").write_text("n03\nn01\nn02\n")
    (root / "words.txt").write_text("n01\tgoldfish\nn02\tsalamander\nn03\tbullfrog\n")
    (root / "train" / "n01" / "n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t3\t3\n")
    annotate(root / "val", {"0.png": "n03", "1.png": "n01", "2.png": "n03", "3.png": "n02"})
    return root


ANIMALS = ("goldfish", "salamander", "bullfrog")  # of words.txt
TRAIN, VAL, TEST = ("train", "Training"), ("val", "VALID", "validation"), ("test", "Testing")


@pytest.mark.parametrize(("train", "val", "test"), [*itertools.product(TRAIN, (*VAL, ""), (*TEST, ""))])
def test_splits_are_never_classes_and_the_test_split_is_evaluated_or_else_the_validation_split(
    tmp_path: Path, train: str, val: str, test: str
) -> None:
    for split, n in ((train, 3), (val, 2), (test, 1)):
        if split:
            put(tmp_path, f"{split}/cat", f"{split}/dog", n=n)
    evaluated = test or val
    if not evaluated:
        said = refusal(lambda: load_data(str(tmp_path)))
        assert said.endswith(f"has no labelled test/ or val/. Pass {tmp_path / train} to evaluate on it.")
        assert "has no folder test/ or val/" in refusal(image_folder(str(tmp_path)))
        return
    labels, classes, said = read(tmp_path)
    assert classes == ("cat", "dog")
    assert labels == ([0, 1] if test else [0, 1, 0, 1])
    assert f"{evaluated}/ is evaluated" in said
    images = image_folder(str(tmp_path))()
    assert (images.class_names, len(images.train.y), images.test.y.tolist()) == (classes, 6, labels)


def test_tiny_imagenet_is_read_with_the_labels_of_its_file(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    for path in (tmp_path, tmp_path / "val"):
        found = load_data(str(path))
        assert found.class_names == ANIMALS
        shown = dict(zip((found.part.x[:][:, 0, 0, 0] // 10).tolist(), found.part.y.tolist(), strict=True))
        assert shown == {0: 2, 1: 0, 2: 2, 3: 1}, "each image has its own label"
        assert "labels are those of" in "; ".join(found.notes)
    assert "test/ has no labels and is left out" in read(tmp_path)[2]
    assert "left out: 1 file of other kinds" in read(tmp_path / "train")[2]
    images = image_folder(str(tmp_path))()
    assert (images.classes, len(images.train.y), len(images.test.y)) == (3, 6, 4)
    assert "all images are of one class" in refusal(lambda: load_data(str(tmp_path / "test")))
    shutil.rmtree(tmp_path / "test")
    assert len(read(tmp_path)[0]) == 4
    shutil.rmtree(tmp_path / "train")
    annotate(tmp_path / "val", dict.fromkeys(("0.png", "1.png", "2.png", "3.png"), "n02"))
    assert read(tmp_path)[:2] == ([1, 1, 1, 1], ANIMALS), "wnids.txt knows all classes"
    (tmp_path / "wnids.txt").unlink()
    assert "all images are of one class" in refusal(lambda: load_data(str(tmp_path)))


def test_tiny_imagenets_validation_images_may_have_been_sorted_into_folders(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "val" / "images")
    put(tmp_path, "val/n01/images", "val/n03/images")
    (tmp_path / "val" / "images").mkdir()
    assert read(tmp_path)[:2] == read(tmp_path / "val")[:2] == ([0, 2], ANIMALS)


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [({"0.png": "n01", "1.png": "n02"}, "has no line for 2.png"),
     ({f"{i}.png": f"n0{1 + i % 3}" for i in range(5)}, "speaks of 4.png, which is not there"),
     ({"../../x.png": "n01"} | {f"{i}.png": "n02" for i in range(4)}, "speaks of ../../x.png, which is not there"),
     ({f"{i}.png": f"n0{1 + i % 4}" for i in range(4)}, "has classes that train lacks: n04")],
)  # fmt: skip
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path, labels: dict[str, str], wrong: str) -> None:
    annotate(tiny_imagenet(tmp_path) / "val", labels)
    assert wrong in refusal(lambda: load_data(str(tmp_path)))


def test_classes_keep_their_numbers_where_a_split_lacks_some(tmp_path: Path) -> None:
    put(tmp_path, "train/ant", "train/bee", "train/cat")
    put(tmp_path, "val/bee", "val/cat")
    (tmp_path / "val" / "ant").mkdir()
    for path in (tmp_path, tmp_path / "val"):
        assert read(path)[:2] == ([1, 2], ("ant", "bee", "cat"))
    assert "classes are numbered as in train/ beside it" in read(tmp_path / "val")[2]
    put(tmp_path, "val/dog")
    for path in (tmp_path, tmp_path / "val"):
        assert "val has classes that train lacks: dog" in refusal(lambda path=path: load_data(str(path)))
    assert "val has classes that train lacks: dog" in refusal(image_folder(str(tmp_path)))


def test_a_folder_called_test_is_taken_for_itself_where_another_train_lies_beside_it(tmp_path: Path) -> None:
    put(tmp_path, "test/cat", "test/dog")
    put(tmp_path, "train", "train2")
    assert read(tmp_path / "test")[:2] == ([0, 1], ("cat", "dog"))
    put(tmp_path, "train/left", "train/right")
    assert read(tmp_path / "test")[:2] == ([0, 1], ("cat", "dog"))


def test_wrappers_hidden_folders_and_folders_within_a_class_are_seen_through(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    put(pets, "pets/cat", "pets/dog/images", ".git", "__MACOSX/pets/cat", "pets/.ipynb_checkpoints",
        "pets/cat/.ipynb_checkpoints")  # fmt: skip
    (pets / "pets" / "cat" / "._0.png").write_bytes(b"what a Mac leaves beside every file")
    assert read(pets)[:2] == ([0, 1], ("cat", "dog"))
    put(tmp_path, "outer/tiny/train/cat", "outer/tiny/train/dog", "outer/tiny/val/cat", "outer/tiny/val/dog")
    assert read(tmp_path / "outer")[:2] == ([0, 1], ("cat", "dog"))
    assert image_folder(str(tmp_path / "outer"))().class_names == ("cat", "dog")


def test_linked_folders_are_followed_and_a_link_that_leads_back_is_not(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/felis", "data/dog")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "felis")
    (tmp_path / "data" / "dog" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dog" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert "broken.png is no file" in refusal(lambda: load_data(str(tmp_path / "data")))
    (tmp_path / "data" / "dog" / "broken.png").unlink()
    assert read(tmp_path / "data")[:2] == ([0, 1], ("cat", "dog"))
    (tmp_path / "test").symlink_to(tmp_path / "data")
    put(tmp_path, "train/cat", "train/dog", "train/ant")
    assert read(tmp_path / "test")[:2] == ([1, 2], ("ant", "cat", "dog"))


AMBIGUOUS = {
    "one class": (["only/cat"], "all images are of one class"),
    "one class of several kinds": (["only/cat/siamese", "only/cat/manx"], "only/cat if manx, siamese are the classes"),
    "no class": (["only"], "has images, but no folder for each class"),
    "splits without labels": (["only/train", "only/test"], "has images, but no folder for each class"),
    "splits within classes": (["only/cat/train", "only/cat/test", "only/dog/train"], "may be classes or splits"),
    "a split beside images": (["only/cat", "only/cat/test", "only/dog"], "may be classes or splits"),
    "classes within classes": (["only/pets/cat", "only/pets/dog", "only/wild/fox"], "may be classes or splits"),
    "a split or a class": (["only/cat", "only/dog", "only/test"], "test/ may be a split, or a class beside cat/"),
    "two folders for one split": (["only/val/a", "only/Valid/a"], "two folders for one split, Valid/ and val/"),
}


@pytest.mark.parametrize(("places", "wrong"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_be_two_things_is_refused(tmp_path: Path, places: list[str], wrong: str) -> None:
    put(tmp_path, *places)
    assert wrong in refusal(lambda: load_data(str(tmp_path / "only")))


def test_within_a_split_train_is_a_class_like_any_other(tmp_path: Path) -> None:
    put(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in ("apple", "train", "worm")))
    for path in (tmp_path, tmp_path / "test"):
        assert read(path)[:2] == ([0, 1, 2], ("apple", "train", "worm"))


def test_what_lies_beside_is_left_out_and_told_and_an_empty_class_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog")
    put(tmp_path, ".", n=2)
    (tmp_path / "README.txt").write_text("pets")
    (tmp_path / "dog" / "1.gif").write_bytes(b"GIF89a")
    said = read(tmp_path)[2]
    assert "left out: 2 images beside the folders, such as 0.png" in said
    assert f"left out: 1 file of other kinds, such as {tmp_path / 'dog' / '1.gif'}" in said
    (tmp_path / "cow").mkdir()
    assert f"{tmp_path / 'cow'} holds no image" in refusal(lambda: load_data(str(tmp_path)))


def test_classes_that_are_numbers_are_in_the_order_of_texts_and_that_is_told(tmp_path: Path) -> None:
    put(tmp_path, *map(str, range(11)))
    _, classes, said = read(tmp_path)
    assert classes[:4] == ("0", "1", "10", "2")
    assert "in the order of their names as text, as torchvision's ImageFolder has it: 0, 1, 10, 2" in said
    put(tmp_path, *(f"few/{i}" for i in range(5)))
    assert "order" not in read(tmp_path / "few")[2]


def test_images_are_the_bytes_that_torchvision_reads(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    colours = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    picture.save(tmp_path / "cat" / "rgb.png")
    picture.convert("L").save(tmp_path / "cat" / "grey.png")
    picture.quantize(8).save(tmp_path / "cat" / "palette.png", transparency=b"\x00\x80")
    picture.convert("RGBA").save(tmp_path / "dog" / "alpha.png")
    picture.convert("CMYK").save(tmp_path / "dog" / "cmyk.jpg")
    picture.convert("1").save(tmp_path / "dog" / "two.png")
    picture.save(tmp_path / "dog" / "turned.jpg", exif=exif)
    found = load_data(str(tmp_path))
    with pytest.warns(UserWarning, match="Transparency"):
        theirs = sorted((np.asarray(image).transpose(2, 0, 1).tobytes(), y) for image, y in ImageFolder(tmp_path))
    ours = sorted((image.numpy().tobytes(), int(y)) for image, y in zip(*found.part, strict=True))
    assert ours == theirs
    assert len(theirs) == 7
    assert f"EXIF would turn 1 image, such as {tmp_path / 'dog' / 'turned.jpg'}" in "; ".join(found.notes)


def spoil_bits(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(path)


def spoil_end(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:60])


def spoil_program(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("spoil", [spoil_bits, spoil_end, spoil_program, lambda path: path.write_bytes(b"text")],
                         ids=["16 bits", "truncated", "PostScript", "text"])  # fmt: skip
def test_an_image_that_would_be_misread_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    put(tmp_path, "cat", "dog")
    spoil(tmp_path / "dog" / "0.png")
    said = refusal(lambda: load_data(str(tmp_path)).part.loaded())
    assert f"{tmp_path / 'dog' / '0.png'}" in said
    is_told = re.search(r"pixels of mode I(;16)?\. Save it with 8 bits", said) is not None  # older Pillows call it I
    assert ("cannot be read" in said) != is_told


def test_what_is_no_file_and_folders_without_end_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "dog" / "1.png")
    assert f"{tmp_path / 'dog' / '1.png'} is no file" in refusal(lambda: load_data(str(tmp_path)))
    (tmp_path / "dog" / "1.png").unlink()
    (tmp_path / "dog" / "/".join("d" * 60)).mkdir(parents=True)
    assert "has folders within folders, 50 deep" in refusal(lambda: load_data(str(tmp_path)))


def test_labels_in_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").unlink()
    os.mkfifo(tmp_path / "val" / "val_annotations.txt")
    assert "val_annotations.txt is no file" in refusal(lambda: load_data(str(tmp_path / "val")))


def test_images_of_different_sizes_are_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, "cat")
    put(tmp_path, "dog", size=5)
    said = f"[4, 4] and [5, 5], {tmp_path / 'cat' / '0.png'} and {tmp_path / 'dog' / '0.png'}. Pass --resize"
    assert said in refusal(lambda: load_data(str(tmp_path)))


def test_the_first_images_are_of_every_class_in_evaluation_in_a_run_and_in_a_subset(tmp_path: Path) -> None:
    put(tmp_path, "train/a", "train/b", "train/c", "test/a", "test/b", "test/c", n=4)
    source = image_folder(str(tmp_path), validation=1)
    assert source().test.y[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert load_data(str(tmp_path)).part.y[:3].tolist() == [0, 1, 2]
    assert source().train.y.tolist() == sorted(source().train.y.tolist()), "training images are as they always were"
    assert subset(source, 6)().train.y.tolist() == [0, 1, 2, 0, 1, 2]


def test_grey_images_in_one_split_go_with_coloured_ones_in_the_other(tmp_path: Path) -> None:
    put(tmp_path, "train/a", "train/b", "test/a", "test/b")
    assert image_folder(str(tmp_path))().shape == (1, 4, 4)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "train" / "a" / "colour.png")
    assert image_folder(str(tmp_path))().shape == (3, 4, 4)


@pytest.mark.parametrize("inner", [".", "images"])
@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_a_csv_file_labels_the_images_beside_it(tmp_path: Path, inner: str, name: str) -> None:
    put(tmp_path, inner, n=3)
    rows = {"0.png": "dog", "images/1.png" if inner == "images" else "1.png": "cat", "2.png": "dog"}
    text = "\ufeffFile_Name,box,Label\n" + "".join(f"{file},0,{label}\n" for file, label in rows.items())
    (tmp_path / name).write_text(text)
    labels, classes, said = read(tmp_path)
    assert (labels, classes) == ([0, 1, 1], ("cat", "dog"))
    assert f"labels are those of {tmp_path / name}" in said


def test_whole_numbers_in_a_csv_file_are_the_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/images", "test/images", n=3)
    for split in ("train", "test"):
        (tmp_path / split / "labels.csv").write_text("file,label\n0.png,10\n1.png,2\n2.png,10\n")
    images = image_folder(str(tmp_path), validation=1)()
    assert (images.classes, sorted(images.train.y.tolist())) == (11, [2, 10, 10])
    assert read(tmp_path)[1] == tuple(map(str, range(11)))


WRONG_CSV = {
    "other columns": ("a,b\n0.png,cat\n", "has the columns a, b. It needs file and label."),
    "semicolons": ("file;label\n0.png;cat\n", "has the columns file;label. It needs file and label."),
    "empty": ("", "has the columns none"),
    "a row too few": ("file,label\n0.png,cat\n1.png,dog\n", "has no line for 2.png"),
    "no class": ("file,label\n0.png,cat\n1.png\n2.png,dog\n", "'1.png' has no class"),
    "a path": ("file,label\n0.png,cat\n1.png,dog\n../2.png,dog\n", "speaks of ../2.png, which is not there"),
    "twice": ("file,label\n0.png,cat\n1.png,dog\n2.png,dog\n0.png,dog\n", "has '0.png' twice"),
}


@pytest.mark.parametrize(("text", "fragment"), WRONG_CSV.values(), ids=WRONG_CSV)
def test_a_csv_file_that_does_not_label_every_image_once_is_refused(tmp_path: Path, text: str, fragment: str) -> None:
    put(tmp_path, "images", n=3)
    (tmp_path / "labels.csv").write_text(text)
    said = refusal(lambda: load_data(str(tmp_path)))
    assert f"{tmp_path / 'labels.csv'}" in said
    assert fragment in said


@pytest.mark.parametrize("name", ["train.csv", "test/labels.txt"])
def test_a_table_that_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, "test", n=2)
    (tmp_path / name.replace("train", "test")).write_text("id,label\n0.png,cat\n1.png,dog\n")
    said = refusal(lambda: load_data(str(tmp_path / "test")))
    place = tmp_path / name.replace("train", "test")
    assert f"{place} is not read: make it {tmp_path / 'test' / 'labels.csv'} with columns file and label" in said


def test_a_picture_of_several_frames_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a", "b")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("1.png", "1.webp", "1.tiff"):
        path = tmp_path / "a" / name
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert f"{path}: an image has 2 frames. Save one of them." in refusal(lambda: load_data(str(tmp_path)))
        path.unlink()


def test_two_classes_of_one_word_keep_their_numbers(tmp_path: Path) -> None:
    put(tmp_path, *(f"val/{wnid}" for wnid in ("n01", "n02", "n03")))
    (tmp_path / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane, machine\nn03\tcat\n")
    assert read(tmp_path)[1] == ("crane (n01)", "crane (n02)", "cat")
    (tmp_path / "words.txt").write_text("n01\tcrane\n")
    assert read(tmp_path)[1] == ("n01", "n02", "n03"), "names of some are none"
