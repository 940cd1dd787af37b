"""Which of several files holds the weights, by the names that the Hugging Face hub and timm give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from robustmail.errors import ModelError
from robustmail.runtime.untrusted import printable

__all__ = ["CONFIG", "SUFFIXES", "USUAL", "only_weights"]

CONFIG = "config.json"
USUAL = ("model.safetensors", "pytorch_model.bin")
"""the same weights in two formats, the preferred one first"""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".npz", ".tar", ".gz")
_OTHER = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args)[\w-]*\.\w+|examples\.safetensors")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+|.*\.index\.json")
MAX_SHOWN = 8


def only_weights(names: Iterable[str], who: str, example: Callable[[str], str]) -> str:
    """The one file of weights among files, of which model.safetensors and pytorch_model.bin count as one.

    names: of the files, with "/" between folders. who: the folder, for errors. example: how the caller names
    one of the files.
    Raises ModelError: there is none, there are several, or the weights are split into several files.
    """
    names = sorted(names)
    weights = [n for n in names if n.lower().endswith(SUFFIXES) and not _OTHER.fullmatch(PurePosixPath(n).name)]
    shards = [name for name in names if _SHARD.fullmatch(name)]
    weights = [name for name in weights if name not in shards]
    if len(weights) > 1 and set(weights) <= set(USUAL):
        weights = [USUAL[0]]
    if len(weights) == 1:
        return weights[0]
    if weights:
        shown = _shown(weights)
        raise ModelError(who, f"has {len(weights)} files of weights: {shown}", f"Pass {example(weights[0])}.")
    if shards:
        todo = "Where you load it, save them in one: torch.save(model.state_dict(), 'weights.pt')."
        raise ModelError(who, f"its weights are split into several files: {_shown(shards)}", todo)
    what = f"no file of weights among {_shown(names)}" if names else "no files in it"
    raise ModelError(who, what, f"Weights end in {', '.join(SUFFIXES[:5])}.")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(printable(name)[:80] for name in names[:MAX_SHOWN]) + more
