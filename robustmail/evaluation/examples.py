"""The examples of an evaluation on the disk: one file, and while the evaluation is not complete the parts that follow.

A save writes what is new, as another part; the last one puts all of them into the one file. An image may be in several,
where a process was killed before the ledger spoke of it: then the last one counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustmail.data.dataset import tensor_hash
from robustmail.errors import RunError
from robustmail.evaluation.ledger import Ledger
from robustmail.runtime.files import atomic_write
from robustmail.runtime.untrusted import check_tensors

__all__ = ["PARTS", "WHOLE", "add_examples", "load_examples", "write_examples"]

WHOLE, PARTS = "examples.safetensors", "examples.parts"


def write_examples(folder: Path, ledger: Ledger, originals: Mapping[int, Tensor] | Tensor) -> None:
    """Write all examples as the one file, beside the clean images at their positions."""
    _write(folder / WHOLE, ledger, sorted(ledger.examples), originals)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def add_examples(folder: Path, ledger: Ledger, originals: Tensor, stored: dict[int, str], last: bool) -> None:
    """Write the examples that the folder does not have yet.

    folder: of the evaluation. ledger: with its examples. originals: clean images, [N, C, H, W]. stored: examples
    that the
    folder has, position -> hash; the new ones are added. last: write all into the one file.
    """
    new = sorted(ledger.examples.keys() - stored.keys())
    if last or not (folder / WHOLE).exists():
        write_examples(folder, ledger, originals)
    elif new:
        (folder / PARTS).mkdir(exist_ok=True)
        _write(folder / PARTS / f"{len(_parts(folder)) + 1:06}.safetensors", ledger, new, originals)
    stored.update({at: tensor_hash(ledger.examples[at]) for at in new})


def load_examples(folder: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """All examples of an evaluation: place in the data set -> (adversarial image, clean image).

    Raises RunError: a file is missing or damaged.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for path in (folder / WHOLE, *_parts(folder)):
        try:
            check_tensors(path)
            content = load_file(path)
            index, x, original = (content[name] for name in ("index", "x", "original"))
            if extra := sorted(set(content) - {"index", "x", "original"}):
                raise ValueError(f"holds {extra[0]!r}, which no evaluation writes")
            found |= zip(index.tolist(), zip(x, original, strict=True), strict=True)
        except Exception as error:  # missing, or damaged in any way
            raise RunError(str(path), f"damaged or missing ({type(error).__name__}: {error})") from error
    return found


def _parts(folder: Path) -> list[Path]:
    """In the order in which they were written. Raises RunError for a link to another folder."""
    if (folder / PARTS).is_symlink():
        raise RunError(str(folder / PARTS), "is a symbolic link", "Delete it.")
    return sorted((folder / PARTS).glob("*.safetensors"))


def _write(path: Path, ledger: Ledger, where: Sequence[int], originals: Mapping[int, Tensor] | Tensor) -> None:
    shape = ledger.examples[where[0]].shape if where else (0,)
    content = {
        "index": ledger.index[torch.tensor(where, dtype=torch.int64)],
        "x": torch.stack([ledger.examples[at].float() for at in where]) if where else torch.empty(0, *shape),
        "original": torch.stack([originals[at].cpu() for at in where]) if where else torch.empty(0, *shape),
    }
    atomic_write(path, lambda to: save_file({k: v.contiguous() for k, v in content.items()}, to))
