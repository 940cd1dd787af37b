"""The whole test set as one tensor: the adversarial image of every broken image, the clean one of all others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from robustmail.checkpoints import save
from robustmail.data.dataset import tensor_hash
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.evaluator import as_floats
from robustmail.evaluation.storage import StoredEvaluation
from robustmail.norms import distances, tolerance

__all__ = ["attacked_images", "write_tensor"]


def attacked_images(held: StoredEvaluation, data: TestSet) -> torch.Tensor:
    """[N, C, H, W] float32 in [0, 1], in the order of the data set, each within eps of its image.

    held: a whole evaluation. data: the images that were evaluated.
    Raises RunError, naming the row: an image is another one, or an example left its ball.
    """
    part, spec = data.first_at_most(held.results["spec"]["n"]).part, held.results["spec"]
    if held.results["shard"] or len(part.y) != len(held.ledger):
        wrong = f"has {len(held.ledger):,} rows, the data {len(part.y):,} images"
        raise RunError(str(held.folder), wrong, "Merge its shards, or pass the data that were evaluated.")
    images = torch.empty((len(part.y), *part.x.shape[1:]))
    for at in range(len(part.y)):
        who = f"{held.folder / 'ledger.csv'}, row {at + 1} (image {int(held.ledger.index[at])})"
        clean = as_floats(part.x[at : at + 1])
        if tensor_hash(clean[0]) != held.rows[at]["image"]:
            raise RunError(who, f"the image in {data.name} is another one")
        images[at] = held.ledger.examples[at] if at in held.ledger.examples else clean[0]
        is_inside = distances(clean, images[at : at + 1], spec["norm"]) <= spec["eps"] + tolerance(spec["eps"])
        if not (is_inside.all() and images[at].min() >= 0 and images[at].max() <= 1):
            raise RunError(who, "its example left its ball or [0, 1]")
    return images


def write_tensor(tensor: torch.Tensor, path: Path) -> str:
    """Write a tensor as `torch.load` reads it; returns the SHA-256 of the file."""
    save(tensor, path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
