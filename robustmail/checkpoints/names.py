"""Names of tensors: their order, their prefixes and their words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["one_line", "words_of", "bare_names", "canonical", "natural_key", "strip_prefixes"]


def one_line(text: str) -> str:
    """The text with everything escaped that is not printable ASCII."""
    return ascii(text)[1:-1]


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order of their names, which is the same for every file and process."""
    return dict(sorted(tensors.items(), key=lambda item: (natural_key(item[0]), item[0])))


def words_of(path: str) -> set[str]:
    """The words in a name, in lower case: model_ema, modelEMA and model.ema have model and ema."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", path)}


def bare_names(names: Iterable[str]) -> list[str]:
    """Names without the `module` of nn.DataParallel and the `_orig_mod` of torch.compile, wherever all names that begin
    alike go on with it."""
    parts = [name.split(".") for name in names]
    depth = 0
    while any(len(part) > depth + 1 for part in parts):
        following: dict[tuple[str, ...], set[str]] = {}
        for part in parts:
            following.setdefault(tuple(part[:depth]), set()).add(part[depth] if len(part) > depth + 1 else "")
        wrapped = {parent for parent, heads in following.items() if heads in ({"module"}, {"_orig_mod"})}
        if wrapped:
            parts = [part[:depth] + part[depth + 1 :] if tuple(part[:depth]) in wrapped else part for part in parts]
        else:
            depth += 1
    bare = [".".join(part) for part in parts]
    return bare if len(set(bare)) == len(bare) else list(names)


def strip_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors, the prefixes removed): first parts that all names share are removed while a module's name is
    left."""
    names, prefixes = list(tensors), []
    while True:
        heads = {name.partition(".")[0] for name in names}
        rest = [name.partition(".")[2] for name in names]
        if len(heads) != 1 or not all("." in r.strip(".") for r in rest):
            break
        prefixes.append(f"{heads.pop()}.")
        names = rest
    return dict(zip(names, tensors.values(), strict=True)), tuple(prefixes)


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """A key for `sorted` that puts conv2 before conv10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d{1,9})", name) if part]
