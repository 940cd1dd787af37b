"""npz, npy and parquet files as people have them: each is read as it is meant, or refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustmail import load_data, npy, npz, parquet
from robustmail.errors import DataError

N = 12
X = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
Y = np.arange(N) % 3
SHOWN = torch.from_numpy(X).permute(0, 3, 1, 2)
NAMES = ("cat", "dog", "bird")


def refusal(work: Callable[[], Any]) -> str:
    """What a DataError says, in one line."""
    with pytest.raises(DataError) as caught:
        work()
    said = str(caught.value)
    assert "\n" not in said
    return said


PAIRS = [
    ("x_test", "y_test"), ("x", "y"), ("images", "labels"), ("data", "targets"), ("image", "label"), ("data", "labels"),
    ("arr_0", "arr_1"), ("X", "Y"), ("Image", "LABEL"), ("test_images", "test_labels"), ("img", "fine_labels"),
    ("val_images", "val_labels"), ("X-test", "y.test"),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_images_and_labels_of_an_npz_go_by_many_names_in_any_letter_case(tmp_path: Path, pair: tuple[str, str]) -> None:
    np.savez(tmp_path / "a.npz", **dict(zip(pair, (X, Y), strict=True)))
    found = load_data(str(tmp_path / "a.npz"))
    assert torch.equal(found.part.x, SHOWN)
    assert found.part.y.tolist() == Y.tolist()


def test_of_several_splits_the_test_images_are_evaluated_and_the_training_images_trained_on(tmp_path: Path) -> None:
    path = str(tmp_path / "medmnist.npz")
    parts = {"train": slice(6), "val": slice(6, 9), "test": slice(9, 12)}
    labels = {f"{name}_labels": Y[part, None] for name, part in parts.items()}
    np.savez(path, **{f"{name}_images": X[part] for name, part in parts.items()}, **labels)
    assert torch.equal(load_data(path).part.x, SHOWN[9:])
    images = npz(path)()
    assert torch.equal(images.train.x, SHOWN[:6])
    assert torch.equal(images.test.x, SHOWN[9:])


def test_a_lone_pair_trains_with_another_file_to_test_on(tmp_path: Path) -> None:
    train, test = str(tmp_path / "1m.npz"), str(tmp_path / "test.npz")
    np.savez(train, image=X, label=Y)
    np.savez(test, x=X[:6], y=Y[:6])
    images = npz(train, test=test)()
    assert (len(images.train.y), len(images.test.y)) == (N, 6)
    assert "has image, label: no images with labels to test on. Pass npz('1m.npz', test='FILE')." in refusal(npz(train))
    assert len(load_data(f"npz({train!r}, test={test!r})").part.y) == 6
    assert len(load_data(f"npz({train!r})").part.y) == N, "to evaluate on, it need not have a test part"


@pytest.mark.parametrize("key", ["class_names", "classes", "label_names"])
def test_an_npz_may_name_its_classes(tmp_path: Path, key: str) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(path, x_train=X, y_train=Y, x_test=X, y_test=Y, **{key: np.array(NAMES)})
    assert load_data(path).class_names == npz(path)().class_names == NAMES
    np.savez(path, x=X, y=Y, **{key: np.array(NAMES[:2])})
    assert "has the label 2, and names of 2 classes" in refusal(lambda: load_data(path))


def test_numbers_that_are_called_classes_name_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y, classes=np.arange(3))
    assert load_data(str(tmp_path / "a.npz")).class_names is None


def test_labels_that_count_from_one_are_told_and_not_trained_on(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(path, x=X, y=Y + 1)
    assert load_data(path).notes == ("no image is of class 0: labels are to count from 0, and span 1 ... 3",)
    said = refusal(npz(path, test=path))
    assert "labels count from 1 to 3, and are to count from 0. Subtract 1, or pass classes=4" in said
    assert npz(path, test=path, classes=4)().classes == 4


def test_images_that_are_channels_first_and_last_are_read_as_first_and_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 9, 3), np.uint8), y=np.arange(4))
    found = load_data(str(tmp_path / "a.npz"))
    assert found.part.x.shape == (4, 3, 9, 3)
    assert found.notes == ("images are read as [N, C, H, W], 3 channels of 9 x 3 pixels",)


def a_zip(**members: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def an_npz(**arrays: Any) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def an_npy(array: Any, **knobs: Any) -> bytes:
    np.save(buffer := io.BytesIO(), array, **knobs)
    return buffer.getvalue()


REFUSED = {
    "two that may be images": (an_npz(images=X, data=X, y=Y), "two arrays that may be the images, images and data"),
    "no labels": (an_npz(images=X), "has images. Its keys must be x_test and y_test, or image and label"),
    "training images alone": (an_npz(x_train=X, y_train=Y), "has no test images but x_train, y_train"),
    "one-hot": (an_npz(x=X, y=np.eye(3)[Y]), "labels of shape [12, 3], expected integers. Save y.argmax(1)"),
    "float labels": (an_npz(x=X, y=Y * 1.0), "labels are float64, expected integers. Save whole numbers"),
    "wide integers": (an_npz(x=X.astype(int), y=Y), "images are int64, expected uint8. Save them as x.astype('uint8')"),
    "0 to 255": (an_npz(x=X * 1.0, y=Y), "outside [0, 1]. Undo the normalisation, or divide by 255"),
    "objects": (an_npz(x=np.array([None] * N), y=Y), "an array of it holds Python objects"),
    "gzip": (gzip.compress(an_npz(x=X, y=Y)), "it is a gzip-compressed file. Unpack it with gunzip"),
    "pickle": (pickle.dumps({"data": X}, 4), "it is a pickle. A pickle may run any code"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "It is an HDF5 file."),
    "zip of pictures": (a_zip(cat="x"), "is a zip archive with cat. Unpack it, and pass the folder"),
    "torch": (a_zip(**{"m/data.pkl": "x"}), "is a file of torch with m/data.pkl. Save its arrays with numpy.savez"),
}


@pytest.mark.parametrize(("content", "fragment"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_labelled_npz_is_refused_with_what_it_is(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    said = refusal(lambda: load_data(str(path)))
    assert said.startswith(f"{path}: ")
    assert fragment in said


# npy


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("x_test", "y_test"), ("X", "Y"), ("test_images", "test_labels"), ("fog", "labels"),
     ("cats", "cats_labels"), ("pictures", "cifar_labels")],
)  # fmt: skip
def test_the_labels_of_an_npy_file_lie_beside_it(tmp_path: Path, images: str, labels: str) -> None:
    np.save(tmp_path / f"{images}.npy", X)
    np.save(tmp_path / f"{labels}.npy", Y)
    found = load_data(str(tmp_path / f"{images}.npy"))
    assert torch.equal(found.part.x, SHOWN)
    assert found.part.y.tolist() == Y.tolist()


def test_the_nearest_name_is_that_of_the_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x_test.npy", X)
    np.save(tmp_path / "labels.npy", Y[::-1])
    np.save(tmp_path / "y_test.npy", Y)
    assert load_data(str(tmp_path / "x_test.npy")).part.y.tolist() == Y.tolist()


def test_two_npy_files_may_be_named_also_to_train_on(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.npy"), str(tmp_path / "b.npy")
    np.save(a, X)
    np.save(b, Y)
    assert load_data(f"npy({a!r}, {b!r})").part.y.tolist() == Y.tolist()
    images = npy(a, b, a, b)()
    assert (images.classes, len(images.train.y), images.pad, images.flip) == (3, N, 1, False)
    assert "no images with labels to test on. Pass npy('a.npy', test_images='FILE')" in refusal(npy(a, b))
    assert "no labels lie beside it (labels.npy, y.npy, a_labels.npy)" in refusal(lambda: load_data(a))
    assert "no such file" in refusal(npy(a, str(tmp_path / "none.npy"), a, b))


DAMAGED_NPY = {
    "truncated": (an_npy(X)[:300], "announces 2,304 bytes and has"),
    "a header that is cut": (an_npy(X)[:9], "not a readable npy file"),
    "huge": (an_npy(X).replace(b"(12, 8, 8, 3), ", b"(99999999, 99),"), "announces 9,899,999,901 bytes"),
    "objects": (an_npy(np.array([None] * N)), "holds Python objects, a pickle. Save plain arrays"),
    "gzip": (gzip.compress(an_npy(X)), "not a readable npy file: it is a gzip-compressed file. Unpack it with gunzip"),
    "empty": (b"", "not a readable npy file"),
}


@pytest.mark.parametrize(("content", "fragment"), DAMAGED_NPY.values(), ids=DAMAGED_NPY)
def test_a_damaged_npy_is_refused(tmp_path: Path, content: bytes, fragment: str) -> None:
    np.save(tmp_path / "y.npy", Y)
    (tmp_path / "x.npy").write_bytes(content)
    said = refusal(lambda: load_data(str(tmp_path / "x.npy")))
    assert said.startswith(f"{tmp_path / 'x.npy'}: ")
    assert fragment in said


def test_a_folder_of_arrays_says_which_file_to_pass(tmp_path: Path) -> None:
    for name in ("fog", "labels", "snow"):
        np.save(tmp_path / f"{name}.npy", X)
    said = refusal(lambda: load_data(str(tmp_path)))
    assert f"is a folder of arrays: fog.npy, labels.npy, snow.npy. Pass one file of images: {tmp_path}/fog.npy." in said


def test_a_folder_of_mnists_own_files_says_where_they_go(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"")
    assert "Move its files into ROOT/MNIST/raw and pass mnist('ROOT')" in refusal(lambda: load_data(str(tmp_path)))


# Parquet


def encoded(image: np.ndarray[Any, Any]) -> bytes:
    Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def shard(path: Path, part: slice = slice(N), image: str = "image", label: str = "label", **changes: Any) -> None:
    """A parquet file as Hugging Face writes it; changes: columns, metadata=None, or the images' bytes alone."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells: list[Any] = [{"bytes": encoded(x), "path": None} for x in X[part]]
    columns = {image: cells, label: Y[part].tolist()} | changes.pop("columns", {})
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": NAMES}}
    metadata = changes.pop("metadata", {"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("inner", [".", "data", "plain_text"])
def test_shards_of_parquet_are_read_with_the_names_of_their_classes(tmp_path: Path, inner: str) -> None:
    shard(tmp_path / inner / "train-00000-of-00002.parquet", slice(5))
    shard(tmp_path / inner / "train-00001-of-00002.parquet", slice(5, 9))
    shard(tmp_path / inner / "test-00000-of-00001.parquet", slice(9, 12))
    found, images = load_data(str(tmp_path)), parquet(str(tmp_path))()
    assert torch.equal(found.part.x, SHOWN[9:])
    assert torch.equal(images.train.x, SHOWN[:9])
    assert torch.equal(images.test.x, SHOWN[9:])
    assert found.class_names == images.class_names == NAMES


def test_parquet_files_may_lie_in_folders_of_splits(tmp_path: Path) -> None:
    for split, part in {"train": slice(9), "test": slice(9, 12)}.items():
        shard(tmp_path / "default" / split / "0000.parquet", part, "img", "fine_label")
    assert load_data(str(tmp_path)).part.y.tolist() == Y[9:].tolist()
    assert len(parquet(str(tmp_path))().train.y) == 9


def test_one_parquet_file_is_evaluated_and_trained_on_beside_another(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    shard(path, columns={"image": [encoded(x) for x in X]}, metadata=None)
    found = load_data(str(path))
    assert torch.equal(found.part.x, SHOWN)
    assert found.class_names is None
    assert len(parquet(str(path), test=str(path))().test.y) == N
    assert "Pass parquet('a.parquet', test='FILE')" in refusal(parquet(str(path)))


def test_columns_of_other_names_are_found_by_their_type_and_otherwise_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.parquet", image="picture", label="kind")
    assert load_data(str(tmp_path / "a.parquet")).class_names == NAMES
    shard(tmp_path / "a.parquet", image="picture", label="kind", metadata=None)
    said = refusal(lambda: load_data(str(tmp_path / "a.parquet")))
    assert "no column is called image: there are picture, kind. Rename it" in said


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "paths": ({"image": [{"bytes": None, "path": "/etc/passwd"}] * N}, "(row 0): has a path in place of an image"),
    "lists": ({"image": [[1, 2]] * N}, "(row 0): has no image but a list"),
    "junk": ({"image": [b"junk"] * N}, "(row 0): the image cannot be read (no JPEG, PNG or the like)"),
    "PostScript": ({"image": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"] * N}, "no JPEG, PNG or the like"),
    "sizes": ({"image": [encoded(x[: 4 + i % 2]) for i, x in enumerate(X)]}, "images differ in size: [4, 8], [5, 8]"),
    "texts": ({"label": ["cat"] * N}, "a label is 'cat'. Labels are 0, 1, 2"),
    "truths": ({"label": [True] * N}, "a label is True. Labels are 0, 1, 2"),
    "nothing": ({"label": [0] * (N - 1) + [None]}, "a label is None. Labels are 0, 1, 2"),
    "unlabelled": ({"label": [-1] * N}, "has the label -1. Labels are 0, 1, 2, ...; -1 is what images without one"),
    "a class too many": ({"label": [3] * N}, "has the label 3, and names of 3 classes"),
}


@pytest.mark.parametrize(("columns", "fragment"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_are_no_labelled_images_are_refused(tmp_path: Path, columns: dict[str, Any], fragment: str) -> None:
    shard(tmp_path / "a.parquet", columns=columns)
    assert fragment in refusal(lambda: load_data(str(tmp_path / "a.parquet")))


def test_a_missing_shard_or_a_damaged_one_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "test-00000-of-00002.parquet")
    assert "has 1 of the 2 files test-*.parquet. Download the others." in refusal(lambda: load_data(str(tmp_path)))
    path = tmp_path / "a.parquet"
    path.write_bytes((tmp_path / "test-00000-of-00002.parquet").read_bytes()[:-9])
    assert f"{path}: not a readable parquet file" in refusal(lambda: load_data(str(path)))
    (tmp_path / "test-00000-of-00002.parquet").rename(tmp_path / "test.parquet")
    assert f"{path} is of no split" in refusal(lambda: load_data(str(tmp_path)))


def test_folders_of_several_data_sets_are_refused(tmp_path: Path) -> None:
    for name in ("mnist", "fashion"):
        shard(tmp_path / name / "test-0.parquet")
    said = refusal(lambda: load_data(str(tmp_path)))
    assert f"has parquet files in fashion, mnist. Pass one of them: {tmp_path}/fashion." in said


def test_training_shards_alone_are_no_test_images(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00001.parquet")
    assert "has no test images but train. Pass one of its files." in refusal(lambda: load_data(str(tmp_path)))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 9)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "Install it: pip install 'robustmail[parquet]'." in refusal(lambda: load_data(str(tmp_path / "a.parquet")))
