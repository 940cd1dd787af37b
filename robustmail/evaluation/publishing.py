"""Which files of an evaluation may be uploaded: our own, whole and consistent, and without secrets."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from robustmail.errors import RunError
from robustmail.evaluation.examples import WHOLE
from robustmail.evaluation.storage import StoredEvaluation
from robustmail.runtime.secrets import find_secret
from robustmail.runtime.untrusted import beside, check_inside, check_tensors, quoted

__all__ = ["check_secrets", "files_to_publish"]

EVALUATION = ("results.json", "ledger.csv", WHOLE)
"""in `evaluation/` of the repository"""


def files_to_publish(held: StoredEvaluation, checkpoint: Path | None) -> dict[str, Path]:
    """{name in the repository: file}: the weights, then what `verify` reads, in `evaluation/`.

    held: read with its seals checked. checkpoint: the weights, where they are not in the folder.
    Raises RunError: the evaluation is not finished, the weights are missing, other ones or no safetensors file, or a
    file holds a secret.
    """
    folder, recorded = held.folder, held.results["weights"]
    if not held.results["complete"] or held.results["shard"]:
        wrong = "is a shard" if held.results["shard"] else "is not finished"
        raise RunError(str(folder), wrong, "Upload a whole evaluation.")
    weights = checkpoint or beside(folder, recorded["file"])
    if weights is None:
        wrong = f"does not hold its weights, {recorded['file'] or 'a model in memory'}"
        todo = f"Add {quoted('--checkpoint', recorded['file'] or 'FILE')} if these are what you mean."
        raise RunError(str(folder), wrong, todo)
    _check_weights(weights, recorded["sha256"])
    files = {weights.name: weights} | {f"evaluation/{name}": folder / name for name in EVALUATION}
    for path in files.values():
        if path != checkpoint:
            check_inside(path)
        check_secrets(str(path), _text(path))
    return files


def check_secrets(who: str, text: str) -> None:
    """Refuse a text with a token, key or password in it (raises RunError)."""
    if (kind := find_secret(text)) is not None:
        raise RunError(who, f"holds {kind}, so nothing is uploaded", "Evaluate again without it on the command line.")


def _check_weights(path: Path, sha256: str | None) -> None:
    if path.suffix != ".safetensors":
        wrong = "is no safetensors file, and other formats can hold more than weights"
        raise RunError(str(path), wrong, "Save the tensors with safetensors.torch.save_file, and evaluate that file.")
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(str(path), f"cannot be read ({error.strerror})") from error
    if found != sha256:
        raise RunError(str(path), "is not the file that was evaluated: its bytes differ")


def _text(path: Path) -> str:
    """What a file says in words: of a safetensors file the header."""
    if path.suffix != ".safetensors":
        return path.read_text(encoding="utf-8")
    check_tensors(path.resolve())
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size).decode("utf-8", "replace")
