"""Extra images: read from any file without a copy, checked against the data that they are mixed into."""

from __future__ import annotations

import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustmail import digits, mixed, npy, npz, subset
from robustmail.config.overrides import apply_overrides, parse_value
from robustmail.data import mapped_arrays
from robustmail.data.dataset import Extra, ImageData, Split
from robustmail.data.mixed import tested_source as source_of_tests
from robustmail.errors import DataError, RecipeError
from robustmail.fields import describe
from robustmail.runtime.untrusted import data_source
from tests.train.conftest import recipe

N, SIDE = 40, 6
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
Y = np.arange(N) % 10


@pytest.fixture
def original(tmp_path: Path) -> str:
    path = tmp_path / "original.npz"
    np.savez(path, x_train=X[:30], y_train=Y[:30], x_test=X[30:], y_test=Y[30:])
    return str(path)


def extra_file(folder: Path, form: str) -> Any:
    """The images X with labels Y in a file of some form, as `extra` takes it."""
    path = folder / f"extra.{form}"
    if form == "npz":
        np.savez(path, image=X, label=Y)
    elif form == "compressed.npz":
        np.savez_compressed(path, image=X, label=Y)
    elif form == "first.npz":
        np.savez(path, x_train=X.transpose(0, 3, 1, 2), y_train=Y)
    elif form == "fortran.npz":
        np.savez(path, image=np.asfortranarray(X), label=Y)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"data": X, "extrapolated_targets": Y, "model": "wrn"}, protocol=4))
    elif form == "old.pickle":
        path.write_bytes(pickle.dumps({"data": X, "extrapolated_targets": Y.astype(">i8")}, protocol=2))
    else:
        np.save(folder / "x.npy", X)
        np.save(folder / "y.npy", Y)
        return npy(str(folder / "x.npy"))
    return str(path)


FORMS = ["npz", "compressed.npz", "first.npz", "fortran.npz", "pickle", "old.pickle", "npy"]


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_file_are_taken_by_number_and_become_channels_first(tmp_path: Path, original: str, form: str):
    images = mixed(npz(original), extra=extra_file(tmp_path, form))()
    index = torch.tensor([3, 39, 0, 3])
    part = images.extra.take(index)
    assert part.x.is_contiguous()
    np.testing.assert_array_equal(part.x.numpy(), X[index].transpose(0, 3, 1, 2))
    assert part.y.tolist() == Y[index].tolist()


def test_several_files_are_numbered_one_after_another(tmp_path: Path, original: str):
    sources = (extra_file(tmp_path, "npz"), npz(extra_file(tmp_path, "compressed.npz")), extra_file(tmp_path, "npy"))
    extra = mixed(npz(original), extra=sources)().extra
    assert len(extra) == 3 * N
    index = torch.tensor([3 * N - 1, 0, N, N - 1, 2 * N, 2 * N - 1])
    np.testing.assert_array_equal(extra.take(index).x.numpy(), X[index % N].transpose(0, 3, 1, 2))
    assert torch.cat([block.x for block in extra.blocks(7)]).shape == (3 * N, 3, SIDE, SIDE)


def test_an_uncompressed_file_stays_on_disk_and_is_never_written_to(tmp_path: Path, original: str):
    path = Path(extra_file(tmp_path, "npz"))
    before = path.read_bytes()
    extra = mixed(npz(original), extra=str(path))().extra
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    extra.parts[0].x[0] = 0
    assert path.read_bytes() == before


def test_all_but_training_is_that_of_the_original_data(tmp_path: Path, original: str):
    alone, images = npz(original)(), mixed(npz(original), extra=extra_file(tmp_path, "npz"))()
    assert replace(images, extra=None).fingerprint == alone.fingerprint != images.fingerprint
    for name in ("name", "classes", "pad", "flip", "validation", "class_names"):
        assert getattr(images, name) == getattr(alone, name)
    assert "0.7 of each batch from 40 extra images" in images.mixture
    assert images.to("cpu").extra is images.extra


def test_another_data_set_is_mixed_in_by_its_training_images_alone(original: str):
    images = mixed(npz(original), extra=(subset(npz(original), train=7), npz(original)))()
    assert [len(part.y) for part in images.extra.parts] == [7, 30]


def test_a_fingerprint_tells_one_changed_byte_of_any_extra_image_and_not_its_layout(tmp_path: Path, original: str):
    def fingerprint(x: Any, y: Any) -> str:
        np.savez(tmp_path / "extra.npz", image=x, label=y)
        return mixed(npz(original), extra=str(tmp_path / "extra.npz"))().fingerprint

    x, y = X.copy(), Y.copy()
    x[-1, -1, -1, -1] ^= 1
    y[0] = 5
    assert len({fingerprint(X, Y), fingerprint(x, Y), fingerprint(X, y)}) == 3
    assert fingerprint(X, Y) == fingerprint(X, Y.astype(np.uint8))


@pytest.mark.parametrize(
    ("x", "y", "fragment"),
    [
        pytest.param(X[:, :5], Y, r"extra images are \[3, 5, 6\], training images \[3, 6, 6\]", id="shape"),
        pytest.param(X[..., 0], Y, r"extra images are \[1, 6, 6\], training images \[3, 6, 6\]", id="channels"),
        pytest.param(X, Y + 1, r"labels span 1 ... 10, outside the 10 classes", id="classes"),
        pytest.param(X, Y[:-1], "40 images but labels of shape", id="a label too few"),
        pytest.param(X / 255, Y, "images are float64, expected uint8", id="floats"),
        pytest.param(X[:0], Y[:0], "at least one image", id="nothing"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, original: str, x: Any, y: Any, fragment: str):
    np.savez(tmp_path / "extra.npz", image=x, label=y)
    with pytest.raises(DataError, match=fragment) as caught:
        mixed(npz(original), extra=str(tmp_path / "extra.npz"))()
    assert "extra" in str(caught.value)


def test_another_number_of_classes_or_other_names_are_refused(tmp_path: Path, original: str):
    with pytest.raises(DataError, match=r"has 11 classes, .* has 10"):
        mixed(npz(original), extra=subset(npz(original, classes=11), train=5))()
    for k, names in enumerate(("abcdefghij", "abcdefghji")):
        arrays = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, "class_names": np.array(list(names))}
        np.savez(tmp_path / f"{k}.npz", **arrays)
    first, second = (npz(str(tmp_path / f"{k}.npz")) for k in (0, 1))
    assert mixed(first, extra=first)().extra
    with pytest.raises(DataError, match=r"calls class 8 'j', and .* calls it 'i'"):
        mixed(first, extra=second)()


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("inf")])
def test_a_share_outside_its_range_is_refused(share: float):
    with pytest.raises(RecipeError, match="share must lie in"):
        mixed(digits(), extra="a.npz", share=share)


def test_what_cannot_be_mixed_in_is_one_line(tmp_path: Path, original: str):
    with pytest.raises(RecipeError, match="nothing to mix in"):
        mixed(npz(original), extra=())
    with pytest.raises(DataError, match="no such file"):
        mixed(npz(original), extra=str(tmp_path / "missing.npz"))()
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="folder without parquet files"):
        mixed(npz(original), extra=str(tmp_path / "empty"))()
    inner = mixed(npz(original), extra=original)
    with pytest.raises(DataError, match="has extra images already"):
        mixed(inner, extra=original)()


class Runs:
    """What a pickle would run where it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("content", [
    {"data": Runs("touch ran"), "extrapolated_targets": Y}, {"data": X}, [X, Y], {"data": X, "extrapolated_targets": 1},
    {"data": X.astype(object), "extrapolated_targets": Y},
], ids=["code", "no labels", "a list", "a number", "objects"])  # fmt: skip
def test_a_pickle_runs_nothing_and_anything_but_the_arrays_is_refused(
    tmp_path: Path, original: str, content: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("extra.pickle").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DataError, match="pickle without the arrays data and extrapolated_targets"):
        mixed(npz(original), extra="extra.pickle")()
    assert not Path("ran").exists()


def test_a_truncated_file_is_refused_in_a_line(tmp_path: Path, original: str):
    for form in ("npz", "pickle"):
        path = Path(extra_file(tmp_path, form))
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(DataError, match="not a readable"):
            mixed(npz(original), extra=str(path))()
    path = Path(extra_file(tmp_path, "npz"))
    broken = path.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05")
    path.write_bytes(broken)
    with pytest.raises(DataError, match="not a readable npz file"), warnings.catch_warnings(action="error"):
        mixed(npz(original), extra=str(path))()


def test_a_compressed_file_that_is_larger_than_memory_is_refused_with_the_line_that_stores_it(
    tmp_path: Path, original: str, monkeypatch: pytest.MonkeyPatch
):
    path = extra_file(tmp_path, "compressed.npz")
    monkeypatch.setattr(mapped_arrays, "_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"image is compressed, and unpacks to .* GB.* zip -0"):
        mixed(npz(original), extra=path)()
    assert len(mixed(npz(original), extra=extra_file(tmp_path, "npz"))().extra) == N


@pytest.mark.parametrize("text", [
    "mixed(digits(), extra='1m.npz')", "mixed(digits(), extra=npz('1m.npz'), share=0.5)",
    "mixed(digits(), extra=('a.npz', npz('b.npz')), share=0.875)", "mixed(digits(), extra=['a.npz', 'b.npz'])",
])  # fmt: skip
def test_it_is_written_on_the_command_line_as_in_python(text: str):
    made = apply_overrides(recipe, [f"data={text}"]).data
    assert made == eval(text.replace("[", "(").replace("]", ")"), {"mixed": mixed, "digits": digits, "npz": npz})
    assert parse_value(describe(made)) == made
    changed = apply_overrides(recipe, [f"data={text}", "data.share=0.25", "data.extra=c.npz", "data.data.pad=2"]).data
    assert changed == mixed(digits(pad=2), extra="c.npz", share=0.25)


def test_a_model_is_tested_on_the_original_data_and_a_file_may_name_no_extra_file():
    made = mixed(digits(), extra="1m.npz")
    assert source_of_tests(made) == digits()
    assert source_of_tests(digits()) == digits()
    assert source_of_tests(subset(made, train=9)) == subset(digits(), train=9)
    assert source_of_tests(plain := subset(digits(), train=9)) is plain
    assert data_source(describe(made)) is None


def test_extra_images_of_other_channels_are_refused_where_image_data_are_made():
    part, other = (Split(torch.zeros(4, c, 3, 3, dtype=torch.uint8), torch.arange(4) % 2) for c in (1, 3))
    ImageData("mine", part, part, 2, extra=Extra((part,), 0.5))
    with pytest.raises(DataError, match=r"mine \(extra\): extra images are \[3, 3, 3\]"):
        ImageData("mine", part, part, 2, extra=Extra((part, other), 0.5))
