"""Examples on disk: written one after another, read one by one."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from robustmail.evaluation.stored_images import StoredImages, write_images


def test_a_file_written_image_by_image_is_a_safetensors_file(tmp_path: Path) -> None:
    x, original = torch.rand(5, 3, 4, 6), torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    index = torch.tensor([9, 2, 7, 1, 0])
    write_images(tmp_path / "a.safetensors", index, {"original": lambda row: original[row], "x": lambda row: x[row]})
    found = load_file(tmp_path / "a.safetensors")
    assert sorted(found) == ["index", "original", "x"]
    for name, expected in {"index": index, "original": original, "x": x}.items():
        assert torch.equal(found[name], expected)
    stored = StoredImages("x", {int(i): (tmp_path / "a.safetensors", row) for row, i in enumerate(index)})
    assert torch.equal(stored[7], x[2])
    more = stored | {3: x[0]}
    assert (len(stored), len(more), 3 in more, list(more)[-1]) == (5, 6, True, 3)
    assert torch.equal(more.renumbered(lambda i: i + 10)[13], x[0])


def test_a_file_without_images_is_one_too(tmp_path: Path) -> None:
    write_images(tmp_path / "a.safetensors", torch.empty(0, dtype=torch.int64), {"x": lambda row: torch.empty(row)})
    assert load_file(tmp_path / "a.safetensors")["x"].shape == (0, 0)
