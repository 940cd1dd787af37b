"""Where images come from: every layout that is read, and every damage that is refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from robustmail import (
    ImageData,
    State,
    cifar10,
    cifar100,
    dataset,
    digits,
    fashion_mnist,
    fit,
    gtsrb,
    image_folder,
    load_data,
    load_recipe,
    mnist,
    npz,
    parquet,
    stl10,
    subset,
    svhn,
    tiny_imagenet,
    torchvision_dataset,
)
from robustmail.config.overrides import apply_overrides, parse_value
from robustmail.errors import DataError, RecipeError
from robustmail.fields import describe

KEYS = ("x_train", "y_train", "x_test", "y_test")


def pixels(*shape: int) -> np.ndarray:
    """Bytes that are all over the place, the same each time."""
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """Six training and four test images of 9x7 pixels in three classes, with some of them changed."""
    whole = {"x_train": pixels(6, 9, 7, 3), "y_train": np.arange(6) % 3, "x_test": pixels(4, 9, 7, 3)}
    return whole | {"y_test": np.array([0, 1, 2, 0])} | changes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.npz"


def refusal(source: Callable[[], ImageData]) -> str:
    """What a source that must fail with a DataError says: one line."""
    said = "nothing: it did not fail"
    try:
        source()
    except Exception as error:  # not pytest.raises, which keeps the frames and with them an open file
        said = f"{type(error).__name__}: {error}"
    kind, _, text = said.partition(": ")
    assert kind == "DataError", said
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        pytest.param(lambda x: x, lambda x: x.transpose(0, 3, 1, 2), id="NHWC"),
        pytest.param(lambda x: x.transpose(0, 3, 1, 2), lambda x: x.transpose(0, 3, 1, 2), id="NCHW"),
        pytest.param(lambda x: x[..., 0], lambda x: x[:, None, ..., 0], id="grey NHW"),
        pytest.param(lambda x: x[..., :1], lambda x: x[:, None, ..., 0], id="grey NHW1"),
    ],
)
def test_an_npz_of_any_layout_becomes_channels_first(path: Path, stored: Any, shown: Any) -> None:
    whole = arrays()
    np.savez(path, **whole | {key: stored(whole[key]) for key in ("x_train", "x_test")})
    images = npz(str(path))()
    for part, key in ((images.train, "x_train"), (images.test, "x_test")):
        np.testing.assert_array_equal(part.x.numpy(), shown(whole[key]))
    assert images.shape[1:] == (9, 7)
    assert images.train.x.is_contiguous()


def test_a_grey_npz_of_images_four_pixels_high_has_one_channel(path: Path) -> None:
    np.savez(path, **arrays(x_train=pixels(6, 4, 7), x_test=pixels(4, 4, 7)))
    assert npz(str(path))().shape == (1, 4, 7)


def test_labels_in_a_column_are_read_as_keras_ships_them(path: Path) -> None:
    column = np.array([[0], [1], [2], [0], [1], [2]], dtype=np.uint8)
    np.savez(path, **arrays(y_train=column, y_test=column[:4]))
    images = npz(str(path))()
    assert images.train.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.test.y.tolist() == [0, 1, 2, 0]
    assert images.train.y.dtype == torch.int64


def test_an_npz_takes_its_classes_from_the_training_labels_unless_told(path: Path) -> None:
    np.savez(path, **arrays())
    assert npz(str(path))().classes == 3
    images = npz(str(path), classes=7, validation=2, pad=1, flip=False)()
    assert (images.classes, images.validation, images.pad, images.flip) == (7, 2, 1, False)


def test_the_repositorys_own_slice_is_real_cifar10(slice_path: Path) -> None:
    images = npz(str(slice_path))()
    assert (len(images.train.y), len(images.test.y), images.shape, images.classes) == (160, 80, (3, 32, 32), 10)
    assert 100 < images.train.x.float().mean() < 140


@pytest.mark.parametrize(
    ("changes", "classes", "fragment"),
    [
        pytest.param({"x_train": pixels(6, 9, 7, 3) / 255}, None, "images are float64, expected uint8", id="floats"),
        pytest.param({"x_test": pixels(4, 9, 7, 3).astype(np.int32)}, None, "(test): images are int32", id="ints"),
        pytest.param({"y_train": np.arange(6) / 2}, None, "labels are float64, expected integers", id="float labels"),
        pytest.param({"y_train": np.array([0, 1, 0, 1, 0, 5])}, 2, "labels span 0 ... 5, outside the 2", id="label 5"),
        pytest.param({"y_train": np.array([0, 1, -1, 1, 0, 1])}, None, "labels span -1 ... 1", id="negative label"),
        pytest.param({"y_test": np.array([0, 1, 3, 1])}, None, "(test): labels span 0 ... 3", id="new class in test"),
        pytest.param({"y_train": np.arange(5)}, None, "6 images but labels of shape [5]", id="one label too few"),
        pytest.param({"y_train": np.eye(6, dtype=int)}, None, "but labels of shape [6, 6]", id="one-hot labels"),
        pytest.param({"x_train": pixels(6, 63)}, None, "images have shape [6, 63]", id="flat images"),
        pytest.param({"x_train": pixels(0, 9, 7, 3), "y_train": np.arange(0)}, None, "at least one image", id="empty"),
        pytest.param({"x_test": pixels(4, 8, 7, 3)}, None, "are [3, 9, 7], test images [3, 8, 7]", id="other size"),
        pytest.param({"x_train": np.array([{}] * 6, dtype=object)}, None, "not a readable npz", id="pickled objects"),
    ],
)
def test_an_npz_that_is_not_what_it_says_is_refused_by_name(
    path: Path, changes: dict[str, Any], classes: int | None, fragment: str
) -> None:
    np.savez(path, **arrays(**changes))
    said = refusal(npz(str(path), classes=classes))
    assert str(path) in said
    assert fragment in said


@pytest.mark.parametrize("missing", KEYS)
def test_an_npz_without_one_of_the_keys_says_which_and_what_it_has(path: Path, missing: str) -> None:
    np.savez(path, **{key: value for key, value in arrays().items() if key != missing}, images=np.zeros(1))
    said = refusal(npz(str(path)))
    to = "train" if missing in ("x_train", "y_train") else "test"
    has = ", ".join(key for key in KEYS if key != missing)
    assert said.startswith(f"npz({str(path)!r}): has {has}, images: no images with labels to {to} on.")


def npy(array: np.ndarray) -> bytes:
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


def archive(compressed: bool = False, **members: bytes) -> bytes:
    """A zip file of members as they are."""
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def whole(compressed: bool = False) -> bytes:
    return archive(compressed, **{f"{key}.npy": npy(value) for key, value in arrays().items()})


def spoilt_stream() -> bytes:
    """A compressed file whose first member is no deflate stream: block type 3 does not exist."""
    content = bytearray(whole(compressed=True))
    content[30 + len("x_train.npy")] |= 0b110
    return bytes(content)


UNREADABLE = {
    "empty": lambda: b"",
    "not a zip": lambda: b"PNG, or so they said" * 20,
    "truncated": lambda: whole()[: len(whole()) // 2],
    "one byte changed": lambda: whole().replace(arrays()["x_train"].tobytes()[:9], b"123456789"),
    "a lone array": lambda: npy(pixels(6, 9, 7, 3)),
    "spoilt compression": spoilt_stream,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_damaged_npz_is_refused_by_name(path: Path, content: Callable[[], bytes]) -> None:
    path.write_bytes(content())
    assert f"npz({str(path)!r}): not a readable npz file" in refusal(npz(str(path)))


def test_an_npz_whose_members_are_no_arrays_is_refused(path: Path) -> None:
    path.write_bytes(archive(**dict.fromkeys(KEYS, b"hello")))
    assert "images are |S5, expected uint8" in refusal(npz(str(path)))


def test_the_whole_file_that_the_damaged_ones_are_made_of_is_fine(path: Path) -> None:
    path.write_bytes(whole(compressed=True))
    assert npz(str(path))().shape == (3, 9, 7)


@pytest.mark.parametrize("name", ["mine.npz", "."], ids=["missing file", "a folder"])
def test_an_npz_that_is_not_there_is_refused_by_name(tmp_path: Path, name: str) -> None:
    assert refusal(npz(str(tmp_path / name))) == f"npz({str(tmp_path / name)!r}): no such file."


def test_the_digits_are_all_there_split_in_order_without_overlap() -> None:
    from sklearn.datasets import load_digits

    images = digits()()
    assert (images.shape, images.classes, images.validation) == ((1, 8, 8), 10, 150)
    assert (len(images.train.y), len(images.test.y)) == (1438, 359)
    together = torch.empty(1797, 1, 8, 8, dtype=torch.uint8)
    together[torch.arange(1797) % 5 != 4], together[4::5] = images.train.x, images.test.x
    raw, labels = load_digits(return_X_y=True)
    np.testing.assert_allclose(together.flatten(1).numpy(), raw / 16 * 255, atol=0.5)
    assert images.test.y.tolist() == labels[4::5].tolist()
    assert set(images.train.y.tolist()) == set(images.test.y.tolist()) == set(range(10))


def test_the_digits_are_the_same_each_time() -> None:
    assert digits()().fingerprint == digits(validation=9, pad=0)().fingerprint


def folder(root: Path, split: str, name: str, *images: np.ndarray) -> None:
    (root / split / name).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / split / name / f"{i}.png")


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
def test_folders_of_pngs_are_read_with_classes_in_the_order_of_their_names(tmp_path: Path, channels: int) -> None:
    extra = () if channels == 1 else (3,)
    cat, dog, cow = pixels(2, 6, 5, *extra), pixels(1, 6, 5, *extra), pixels(3, 6, 5, *extra)
    for name, images in {"dog": dog, "cow": cow, "cat": cat}.items():
        folder(tmp_path, "train", name, *images)
    folder(tmp_path, "test", "dog", dog[0])  # the test set need not have every class
    images = image_folder(str(tmp_path), validation=1, pad=2, flip=False)()
    expected = np.concatenate([cat, cow, dog]).reshape(6, 6, 5, channels).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.train.x.numpy(), expected)
    assert images.train.y.tolist() == [0, 0, 1, 1, 1, 2]
    assert images.test.y.tolist() == [2]
    assert (images.classes, images.validation, images.pad, images.flip) == (3, 1, 2, False)


def first_image(root: Path) -> Path:
    return root / "train" / "a" / "0.png"


SPOILT = {
    "a class of its own in test": (
        lambda root: folder(root, "test", "zebra", pixels(5, 5)),
        "test has classes that train lacks: zebra",
    ),
    "another size": (
        lambda root: folder(root, "train", "b", pixels(5, 6)),
        "images differ in size: [5, 5] and [5, 6], ",
    ),
    "no image": (lambda root: first_image(root).write_bytes(b"no image"), "train/a/0.png cannot be read"),
    "truncated image": (
        lambda root: first_image(root).write_bytes(first_image(root).read_bytes()[:60]),
        "train/a/0.png cannot be read",
    ),
    "empty class": (lambda root: first_image(root).unlink(), "train/a holds no image"),
    "no test folder": (
        lambda root: (root / "test").rename(root / "tset"),
        "has no folder test/ or val/. Make train/<class>/ and test/<class>/",
    ),
}


@pytest.mark.parametrize(("spoil", "fragment"), SPOILT.values(), ids=SPOILT)
def test_folders_that_do_not_fit_together_are_refused(
    tmp_path: Path, spoil: Callable[[Path], Any], fragment: str
) -> None:
    for split in ("train", "test"):
        folder(tmp_path, split, "a", pixels(5, 5))
        folder(tmp_path, split, "ab", pixels(5, 5))
    assert image_folder(str(tmp_path))().shape == (1, 5, 5)
    spoil(tmp_path)
    said = refusal(image_folder(str(tmp_path)))
    assert said.startswith(f"image_folder({str(tmp_path)!r}")
    assert fragment in said


# Torchvision's own loaders read small files in its on-disk format, with its checksums set to theirs.


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def dump(path: Path, content: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return md5(path)


def place_cifar10(root: Path, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int], Path]:
    kind, x, y = torchvision.datasets.CIFAR10, pixels(5, 3, 32, 32), [3, 1, 4, 9, 0]
    base = root / kind.base_folder
    rows = x.reshape(5, 3072)
    first = dump(base / "data_batch_1", {"data": rows[:2], "labels": y[:2]})
    second = dump(base / "data_batch_2", {"data": rows[2:4], "labels": y[2:4]})
    patch.setattr(kind, "train_list", [["data_batch_1", first], ["data_batch_2", second]])
    patch.setattr(kind, "test_list", [["test_batch", dump(base / "test_batch", {"data": rows[4:], "labels": y[4:]})]])
    names = dump(base / "batches.meta", {"label_names": [str(i) for i in range(10)]})
    patch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": names})
    return x, y, base / "data_batch_2"


def place_cifar100(root: Path, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int], Path]:
    kind, x, y = torchvision.datasets.CIFAR100, pixels(5, 3, 32, 32), [99, 1, 42, 7, 0]
    base = root / kind.base_folder
    rows = x.reshape(5, 3072)
    for split, part in {"train": slice(4), "test": slice(4, 5)}.items():
        content = {"data": rows[part], "fine_labels": y[part], "coarse_labels": [0] * len(y[part])}
        patch.setattr(kind, f"{split}_list", [[split, dump(base / split, content)]])
    names = dump(base / "meta", {"fine_label_names": [str(i) for i in range(100)]})
    patch.setattr(kind, "meta", {"filename": "meta", "key": "fine_label_names", "md5": names})
    return x, y, base / "train"


def place_svhn(root: Path, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int], Path]:
    from scipy.io import savemat

    kind, x, y = torchvision.datasets.SVHN, pixels(6, 3, 32, 32), [3, 0, 4, 9, 0, 7]
    split_list = {}
    for split, part in {"train": slice(4), "test": slice(4, 6)}.items():
        path = root / f"{split}_32x32.mat"
        tens = [[digit or 10] for digit in y[part]]  # SVHN writes the digit 0 as 10
        savemat(path, {"X": x[part].transpose(2, 3, 1, 0), "y": np.array(tens, dtype=np.uint8)})
        split_list[split] = ["http://example.com/x.mat", path.name, md5(path)]
    patch.setattr(kind, "split_list", split_list)
    return x, y, root / "train_32x32.mat"


def idx(array: np.ndarray) -> bytes:
    """MNIST's format: the type and number of dimensions, the dimensions, the bytes."""
    return struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def place_mnist(
    root: Path, patch: pytest.MonkeyPatch, kind: Any = torchvision.datasets.MNIST
) -> tuple[np.ndarray, list[int], Path]:
    x, y = pixels(5, 1, 28, 28), [3, 0, 4, 9, 7]
    raw = root / kind.__name__ / "raw"
    raw.mkdir(parents=True)
    resources = []
    for split, part in {"train": slice(4), "t10k": slice(4, 5)}.items():
        arrays = {"images-idx3": x[part, 0], "labels-idx1": np.array(y[part], dtype=np.uint8)}
        for name, array in arrays.items():
            path = raw / f"{split}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))
            resources.append((path.name, md5(path)))
    patch.setattr(kind, "resources", resources)
    return x, y, path


def place_fashion_mnist(root: Path, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int], Path]:
    return place_mnist(root, patch, torchvision.datasets.FashionMNIST)


def place_stl10(root: Path, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int], Path]:
    kind, x, y = torchvision.datasets.STL10, pixels(5, 3, 96, 96), [3, 0, 4, 9, 7]
    base = root / kind.base_folder
    base.mkdir(parents=True)
    (base / "class_names.txt").write_text("\n".join(map(str, range(10))))
    for split, part in {"train": slice(4), "test": slice(4, 5)}.items():
        (base / f"{split}_X.bin").write_bytes(x[part].transpose(0, 1, 3, 2).tobytes())  # column by column
        (base / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in y[part]))
        patch.setattr(kind, f"{split}_list", [[f.name, md5(f)] for f in sorted(base.glob(f"{split}_*"))])
    return x, y, base / "test_X.bin"


PLACES = pytest.mark.parametrize(
    ("source", "place", "classes"),
    [(cifar10, place_cifar10, 10), (cifar100, place_cifar100, 100), (svhn, place_svhn, 10), (mnist, place_mnist, 10),
     (fashion_mnist, place_fashion_mnist, 10), (stl10, place_stl10, 10)],
    ids=["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist", "stl10"],
)  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network; the addresses that were asked for."""
    asked: list[str] = []

    def urlopen(request: Any, *_: Any, **__: Any) -> Any:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


@PLACES
def test_torchvisions_files_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str], source: Any, place: Any, classes: int
) -> None:
    x, y, _ = place(tmp_path, monkeypatch)
    images = source(str(tmp_path), pad=3, validation=2)()
    np.testing.assert_array_equal(torch.cat([images.train.x, images.test.x]).numpy(), x)
    assert [*images.train.y.tolist(), *images.test.y.tolist()] == y
    assert len(images.train.y) == 4
    assert (images.classes, images.pad, images.validation) == (classes, 3, 2)
    assert images.flip == (source not in (svhn, mnist))  # a mirrored 2 is no 2
    assert images.class_names is not None
    assert source is fashion_mnist or images.class_names == tuple(map(str, range(classes)))
    assert offline == []


@PLACES
@pytest.mark.parametrize("damaged", [False, True], ids=["nothing there", "wrong checksum"])
def test_without_a_network_missing_or_damaged_files_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str], source: Any, place: Any, classes: int,
    damaged: bool,
) -> None:  # fmt: skip
    if damaged:
        _, _, file = place(tmp_path, monkeypatch)
        file.write_bytes(file.read_bytes()[:-100])
    said = refusal(source(str(tmp_path)))
    assert said.startswith(f"{source.__name__}({str(tmp_path)!r}): cannot be read or downloaded")
    assert "name resolution" in said
    assert "Connect to the network, put torchvision's" in said
    assert str(tmp_path) in said.split("put torchvision's")[1]
    assert offline


def test_a_damaged_file_that_torchvision_does_not_fetch_again_says_to_delete_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str]
) -> None:
    place_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(b"")
    said = refusal(cifar10(str(tmp_path)))
    assert "damaged: Dataset metadata file not found or corrupted" in said
    assert f"Delete torchvision's CIFAR10 files in {tmp_path}." in said


def test_a_subset_is_the_first_training_images_and_every_test_image():
    whole, part = digits(validation=20)(), subset(digits(validation=20), train=100)()
    assert torch.equal(part.train.x, whole.train.x[:100])
    assert torch.equal(part.train.y, whole.train.y[:100])
    assert torch.equal(part.test.x, whole.test.x)
    assert (part.name, part.validation, part.pad) == ("digits(), first 100", 20, 1)
    with pytest.raises(DataError, match=r"subset \(given train=9999\): digits\(\) has 1438 images"):
        subset(digits(), train=9999)()
    with pytest.raises(RecipeError, match="train must be at least 1"):
        subset(digits(), train=0)


def test_the_source_inside_a_subset_is_an_override_away():
    recipe = load_recipe("quickstart").but(data=subset(digits(), train=100))
    assert apply_overrides(recipe, ["data.of.validation=7", "data.train=50"]).data == subset(
        digits(validation=7), train=50
    )
    assert parse_value(describe(recipe.data)) == recipe.data


LAYOUTS = pytest.mark.parametrize(
    ("place", "inner", "source"),
    [(place_cifar10, "cifar-10-batches-py", "cifar10"), (place_cifar100, "cifar-100-python", "cifar100"),
     (place_svhn, "test_32x32.mat", "svhn"), (place_stl10, "stl10_binary", "stl10")],
)  # fmt: skip


@LAYOUTS
def test_torchvisions_folders_are_known_by_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str], place: Any, inner: str, source: str
) -> None:
    x, _, file = place(tmp_path, monkeypatch)
    for path in (tmp_path, tmp_path / inner):
        found = load_data(str(path))
        assert found.notes == (f"read as {source}('{tmp_path}')",)
        np.testing.assert_array_equal(found.part.x.numpy(), x[len(x) - len(found.part.y) :])
    file.write_bytes(file.read_bytes()[:-100])
    said = refusal(lambda: load_data(str(tmp_path / inner)))
    assert f"Delete torchvision's {source.upper()} files in {tmp_path}." in said
    assert offline == [], "a path is no reason to download anything"


def test_a_pickle_in_cifars_folder_is_not_opened_unless_it_is_cifars(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "pwned",)

    for name in ("data_batch_1", "test_batch", "batches.meta"):
        dump(tmp_path / "cifar-10-batches-py" / name, Evil())
    for path in (tmp_path, tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py" / "test_batch"):
        refusal(lambda path=path: load_data(str(path)))
    assert not (tmp_path / "pwned").exists()


def test_a_folder_with_several_of_torchvisions_data_sets_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_cifar10(tmp_path, monkeypatch)
    place_stl10(tmp_path, monkeypatch)
    assert f"has the data of cifar10, stl10. Pass one of them: \"cifar10('{tmp_path}')\"." in refusal(
        lambda: load_data(str(tmp_path))
    )


def place_gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for path, side in {
        "GTSRB/Training/00000/0": 20,
        "GTSRB/Training/00001/0": 40,
        "GTSRB/Final_Test/Images/0": 64,
    }.items():
        (base / path).parent.mkdir(parents=True)
        Image.fromarray(pixels(side, side + 4, 3)).save(base / f"{path}.ppm")
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n0.ppm;64;1\n")


def test_traffic_signs_of_any_size_are_resized(tmp_path: Path) -> None:
    place_gtsrb(tmp_path)
    images = gtsrb(str(tmp_path), size=16)()
    assert (images.shape, images.classes, images.pad, images.flip) == ((3, 16, 16), 43, 2, False)
    assert (images.train.y.tolist(), images.test.y.tolist()) == ([0, 1], [1])
    expected = Image.fromarray(pixels(64, 68, 3)).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images.test.x[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert load_data(str(tmp_path)).part.x.shape == (1, 3, 32, 32)
    with pytest.raises(RecipeError, match="size must be at least 1"):
        gtsrb(size=0)


def test_any_data_set_of_torchvision_goes_by_its_name(tmp_path: Path) -> None:
    place_gtsrb(tmp_path)
    said = refusal(torchvision_dataset("GTSRB", str(tmp_path)))
    assert "images differ in size: [20, 24] and [40, 44]. Pass size=, such as size=224." in said
    images = torchvision_dataset("GTSRB", str(tmp_path), size=16)()
    assert (images.shape, images.classes, images.pad, images.flip) == ((3, 16, 16), 2, 2, False)


def test_the_subsets_of_emnist_are_named(tmp_path: Path, offline: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"EMNIST has several subsets\. Name one with split="):
        torchvision_dataset("EMNIST", str(tmp_path))()
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in {"train": 4, "test": 2}.items():
        (raw / f"emnist-letters-{split}-images-idx3-ubyte").write_bytes(idx(pixels(n, 28, 28)))
        (raw / f"emnist-letters-{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(1, n + 1, dtype=np.uint8)))
    for subset_ in ("byclass", "bymerge", "balanced", "digits", "mnist"):  # torchvision asks for all of them
        for split in ("train", "test"):
            for kind in ("images-idx3", "labels-idx1"):
                (raw / f"emnist-{subset_}-{split}-{kind}-ubyte").write_bytes(b"")
    images = torchvision_dataset("EMNIST", str(tmp_path), split="letters")()
    assert (images.shape, images.train.y.tolist()) == ((1, 28, 28), [1, 2, 3, 4])
    assert images.class_names is not None
    assert images.class_names[:3] == ("N/A", "a", "b")


WRONG_SETS = {
    "Food1O1": "Did you mean 'Food101'?",
    "cifar10": "Did you mean 'CIFAR10'?",
    "ImageFolder": "Write image_folder('DIR').",
}


@pytest.mark.parametrize(("name", "todo"), WRONG_SETS.items())
def test_a_data_set_that_torchvision_has_not_is_refused_with_the_nearest(name: str, todo: str) -> None:
    with pytest.raises(RecipeError) as caught:
        torchvision_dataset(name)
    assert str(caught.value).endswith(f"torchvision has no data set {name!r}. {todo}")


OTHER_SETS = {
    "EuroSAT": "EuroSAT has no training and test images of its own. Split it yourself, and pass robustmail.dataset",
    "Kinetics": "Kinetics has more than training and test images",
    "Places365": "Places365 has more than training and test images (Unknown value 'train' for argument split.",
    "QMNIST": "cannot be read or downloaded",
    "Flowers102": "cannot be read or downloaded",
    "ImageNet": "torchvision cannot read ImageNet (The archive ILSVRC2012_devkit_t12.tar.gz is not present",
}


@pytest.mark.parametrize(("name", "fragment"), OTHER_SETS.items())
def test_sets_of_other_kinds_say_what_they_are_and_leave_nothing(
    tmp_path: Path, offline: list[str], name: str, fragment: str
) -> None:
    assert fragment in refusal(torchvision_dataset(name, str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content", [b"", b"junk" * 50, idx(pixels(4, 28, 28))[:-9]], ids=["empty", "junk", "truncated"]
)
def test_damaged_files_of_mnist_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str], content: bytes
) -> None:
    place_mnist(tmp_path, monkeypatch)
    mnist(str(tmp_path))()  # which unpacks them
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    said = refusal(mnist(str(tmp_path)))
    assert said.startswith(f"mnist({str(tmp_path)!r}): damaged: ")
    assert said.endswith(f"Delete torchvision's MNIST files in {tmp_path}.")


def test_files_are_padded_by_an_eighth_and_mirrored_only_if_told(path: Path, tmp_path: Path) -> None:
    np.savez(path, **arrays(x_train=pixels(6, 16, 24, 3), x_test=pixels(4, 16, 24, 3)))
    images = npz(str(path))()
    assert (images.pad, images.flip) == (2, False)
    assert images.augmentation == "random crops of images padded by 2 pixels, never mirrored"
    images = npz(str(path), flip=True, pad=0)()
    assert images.augmentation == "no crops, mirrored at random"
    for source in (image_folder("x"), parquet("x"), torchvision_dataset("Food101"), dataset(None, None)):
        assert (source.pad, source.flip) == (None, False)
    assert (tiny_imagenet("x").pad, tiny_imagenet("x").flip) == (8, True)


class Digits(torch.utils.data.Dataset[Any]):
    """scikit-learn's digits as a data set of Python, with names."""

    classes = tuple(f"number {i}" for i in range(10))

    def __init__(self, test: bool = False) -> None:
        self.part = digits()().test if test else digits()().train.first(200)

    def __len__(self) -> int:
        return len(self.part.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.part.x[i].float() / 255, int(self.part.y[i])


def test_data_in_python_are_trained_on_as_they_are() -> None:
    train, test = Digits(), Digits(test=True)
    loader = torch.utils.data.DataLoader(train, batch_size=7, shuffle=True)
    for given in ((train.part.x, train.part.y.tolist()), train, loader):
        images = dataset(given, test, validation=20)()
        assert torch.equal(images.train.x, train.part.x), "ToTensor is undone to the byte"
        assert torch.equal(images.test.y, test.part.y)
        assert (images.classes, images.pad, images.flip, images.validation) == (10, 1, False, 20)
        assert images.class_names == (None if isinstance(given, tuple) else Digits.classes)


def test_a_recipe_with_data_in_python_is_described_changed_and_run() -> None:
    recipe = load_recipe("quickstart").but(
        data=dataset(Digits(), Digits(test=True), validation=20), epochs=1, burn_in=0
    )
    recipe = apply_overrides(recipe, ["data.flip=True", "data.pad=0"])
    expected = "dataset(train=<Digits of 200>, test=<Digits of 359>, validation=20, pad=0, flip=True, classes=None)"
    assert describe(recipe.data) == expected
    started = next(iter(fit(recipe, State.fresh(recipe))))
    assert started.augmentation == "no crops, mirrored at random"


def test_floats_between_two_bytes_are_not_trained_on() -> None:
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8)
    assert "dataset (train): images are floats between the 256 levels of a byte" in refusal(dataset((x, y), (x, y)))
