"""The examples of an evaluation on the disk: one file, and while the evaluation is not complete the parts that follow.

A save writes what is new, as another part; the last one puts all of them into the one file. An image may be in several,
where a process was killed before the ledger spoke of it: then the last one counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from robustmail.data.dataset import tensor_hash
from robustmail.data.image_files import ImageFiles
from robustmail.errors import RunError
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.stored_images import StoredImages, write_images
from robustmail.runtime.files import atomic_write
from robustmail.runtime.untrusted import check_tensors

__all__ = ["PARTS", "WHOLE", "add_examples", "load_examples", "write_examples"]

WHOLE, PARTS = "examples.safetensors", "examples.parts"


def write_examples(folder: Path, ledger: Ledger, originals: Mapping[int, Tensor] | Tensor | ImageFiles) -> None:
    """Write all examples as the one file, beside the clean images at their positions."""
    ledger.examples = StoredImages("x", _write(folder / WHOLE, ledger, sorted(ledger.examples), originals))
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def add_examples(
    folder: Path, ledger: Ledger, originals: Tensor | ImageFiles, stored: dict[int, str], last: bool
) -> None:
    """Write the examples that the folder does not have yet; the ledger then holds none of them in memory.

    folder: of the evaluation. ledger: with its examples. originals: clean images, [N, C, H, W]. stored: examples that
    the folder has, position -> hash; the new ones are added. last: write all into the one file.
    """
    new = sorted(ledger.examples.keys() - stored.keys())
    stored.update({at: tensor_hash(ledger.examples[at]) for at in new})
    if last or not (folder / WHOLE).exists():
        write_examples(folder, ledger, originals)
    elif new:
        (folder / PARTS).mkdir(exist_ok=True)
        places = _write(folder / PARTS / f"{len(_parts(folder)) + 1:06}.safetensors", ledger, new, originals)
        before = ledger.examples.places if isinstance(ledger.examples, StoredImages) else {}
        ledger.examples = StoredImages("x", {**before, **places})


def load_examples(folder: Path) -> dict[int, tuple[Path, int]]:
    """Where all examples of an evaluation are: place in the data set -> (file, row).

    Raises RunError: a file is missing or damaged.
    """
    found: dict[int, tuple[Path, int]] = {}
    for path in (folder / WHOLE, *_parts(folder)):
        try:
            check_tensors(path)
            with safe_open(path, framework="pt") as file:
                if extra := sorted(set(file.keys()) - {"index", "x", "original"}):
                    raise ValueError(f"holds {extra[0]!r}, which no evaluation writes")
                index = file.get_tensor("index").tolist()
                if any(file.get_slice(name).get_shape()[0] != len(index) for name in ("x", "original")):
                    raise ValueError("its tensors differ in length")
            found |= {place: (path, row) for row, place in enumerate(index)}
        except Exception as error:  # missing, or damaged in any way
            raise RunError(str(path), f"damaged or missing ({type(error).__name__}: {error})") from error
    return found


def _parts(folder: Path) -> list[Path]:
    """In the order in which they were written. Raises RunError for a link to another folder."""
    if (folder / PARTS).is_symlink():
        raise RunError(str(folder / PARTS), "is a symbolic link", "Delete it.")
    return sorted((folder / PARTS).glob("*.safetensors"))


def _write(
    path: Path, ledger: Ledger, where: Sequence[int], originals: Mapping[int, Tensor] | Tensor | ImageFiles
) -> dict[int, tuple[Path, int]]:
    """Write the examples at positions `where`; returns position -> (file, row)."""
    index = ledger.index[torch.tensor(where, dtype=torch.int64)]
    images = {
        "original": lambda row: originals[where[row]],
        "x": lambda row: ledger.examples[where[row]].float(),
    }
    atomic_write(path, lambda to: write_images(to, index, images))
    return {at: (path, row) for row, at in enumerate(where)}
