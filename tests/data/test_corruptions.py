"""The layouts of CIFAR-10-C and ImageNet-C."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from robustmail.data.corruptions import COMMON, find_corruptions, generate_corruptions
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import DataError

Y = np.array([3, 1, 0])


def clean(names: tuple[str, ...] | None = None) -> TestSet:
    return TestSet("some", Split(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.from_numpy(Y)), 4, names)


def arrays(folder: Path, *names: str, labels: np.ndarray | None = None) -> Path:
    """Files whose images have the severity as the value of every pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "labels.npy", np.tile(Y, 5) if labels is None else labels)
    images = np.repeat(np.arange(1, 6, dtype=np.uint8), 3)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    for name in names:
        np.save(folder / f"{name}.npy", images)
    return folder


def folders(root: Path, *places: str, classes: tuple[str, ...] = ("a", "b", "c", "d")) -> Path:
    for place in places:
        for k, name in enumerate(classes):
            path = root / place / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(path)
    return root


@pytest.mark.parametrize("labels", [None, Y], ids=["of all severities", "of one severity"])
def test_an_array_holds_its_severities_one_after_another(tmp_path: Path, labels: np.ndarray | None) -> None:
    sets = find_corruptions(arrays(tmp_path / "CIFAR-10-C", "spatter", "fog", labels=labels).parent, clean())
    assert [(s.corruption, s.severity) for s in sets] == [(n, s) for n in ("fog", "spatter") for s in range(1, 6)]
    for found in sets:
        part = found.load().part
        assert part.x.unique().tolist() == [found.severity]
        assert part.y.tolist() == Y.tolist()


@pytest.mark.parametrize("root", [".", "weather/fog"], ids=["with categories", "one corruption alone"])
def test_folders_are_read_by_corruption_and_severity(tmp_path: Path, root: str) -> None:
    folders(tmp_path, "weather/fog/1", "weather/fog/5", "noise/shot_noise/3")
    sets = find_corruptions(tmp_path / root, clean())
    expected = [("shot_noise", 3), ("fog", 1), ("fog", 5)] if root == "." else [("fog", 1), ("fog", 5)]
    assert [(s.corruption, s.severity) for s in sets] == expected
    part = sets[0].load().part
    assert part.y.tolist() == part.x[:][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_the_clean_images_fix_the_numbers_of_the_classes(tmp_path: Path) -> None:
    folders(tmp_path, "fog/1", classes=("b", "d"))
    found = find_corruptions(tmp_path, clean(("a", "b", "c", "d")))
    assert found[0].load().part.y.tolist() == [1, 3]
    with pytest.raises(DataError, match="2 classes of 4, whose numbers are in doubt"):
        find_corruptions(tmp_path, clean())[0].load()


@pytest.mark.parametrize(("labels", "wrong"), [
    (np.arange(15), "do not repeat 5 times"), (np.zeros(4, np.int64), "15 images, but labels of shape"),
    (np.zeros((15, 2), np.int64), "15 images, but labels of shape"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: np.ndarray, wrong: str) -> None:
    with pytest.raises(DataError, match=wrong):
        find_corruptions(arrays(tmp_path, "fog", labels=labels), clean())


def test_other_folders_are_refused_with_what_is_in_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        find_corruptions(tmp_path / "none", clean())
    (tmp_path / "cat").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds cat, notes.txt, but no corruptions. Expected labels.npy"):
        find_corruptions(tmp_path, clean())
    np.save(tmp_path / "labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"labels.npy: cannot be read"):
        find_corruptions(tmp_path, clean())


def test_made_corruptions_need_their_package_and_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(DataError, match=r"pip install 'robustmail\[corruptions\]'"):
        generate_corruptions(clean(), 0)

    def corrupt(image: np.ndarray, severity: int, name: str) -> np.ndarray:
        del name
        return image + np.uint8(severity) + np.random.randint(0, 9, image.shape, dtype=np.uint8)

    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt))
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(njit=lambda function: function))
    before = np.random.get_state()[1].copy()
    sets = [generate_corruptions(clean(), seed) for seed in (0, 0, 1)]
    assert [(s.corruption, s.severity) for s in sets[0]] == [(n, s) for n in COMMON for s in range(1, 6)]
    first, again, other = (part[7].load().part.x for part in sets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert np.array_equal(before, np.random.get_state()[1])
