"""The state dicts in the content of a file: found, chosen, and cleaned of what wrappers added."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustmail.checkpoints.cleaning import BATCHNORM_STATISTICS, DEBRIS, is_plain
from robustmail.checkpoints.flat_networks import AVERAGES, networks_of
from robustmail.checkpoints.names import canonical, natural_key, one_line, strip_prefixes, words_of
from robustmail.checkpoints.pickle_values import Global, Unbuilt
from robustmail.errors import ModelError, did_you_mean

__all__ = ["ALL", "StateDicts", "choose_state_dict", "complete_average", "find_state_dicts"]


MAX_PLAIN_VALUES = 40
MAX_DEPTH = 8
"""levels within one another at which state dicts are searched"""

PREFERRED = ("state_dict", "model_state_dict", "model", "net", "network", "rmodel", "last", "weights", "params")
"""usual names of state dicts, in the order in which they are chosen; averages of the weights (EMA) go first, as in
timm"""
_NO_AVERAGES = {"unaveraged", "nonaveraged"}
"""words in names of weights beside which all others are averages"""
ALL = "all"
"""name of a flat state dict of several networks, undivided"""

_NO_WEIGHTS = ("optim", "sched", "scaler", "grad", "momentum", "rng")
"""in names of what is no network's weights"""
_QUIET = ("argparse.Namespace", "types.SimpleNamespace", "pathlib", "numpy", "collections", "datetime")
"""classes that are no news beside weights"""


@dataclass(frozen=True)
class StateDicts:
    """All state dicts in a file, each with its names in canonical order.

    tensors: by the path that leads to them: "" if the file is one state dict, else "state_dict", "model.ema" or
    "state_dict[0]". plain_values: what is beside them, such as epoch, accuracy and arguments, as short texts. divided:
    the paths of networks that are together in one flat state dict. notes: what was not built, in sentences.
    """

    tensors: dict[str, dict[str, Tensor]]
    plain_values: dict[str, str]
    divided: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def find_state_dicts(content: Any) -> StateDicts:
    """All state dicts in the content of a file; the moments of an optimizer do not count."""
    found = _Search()
    found.search(content, "", 0)
    return StateDicts(found.tensors, found.plain_values, frozenset(found.divided), tuple(found.notes[:_MAX_NOTES]))


_MAX_NOTES = 12


class _Search:
    """What was found so far in the content of a file."""

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.plain_values: dict[str, str] = {}
        self.divided: set[str] = set()
        self.notes: list[str] = []
        self.seen: set[int] = set()

    def search(self, value: Any, path: str, depth: int, is_attribute: bool = False) -> None:
        """Search a value, which is at `path` of the content. is_attribute: it belongs to an object not built, of which
        only weights are looked for."""
        own = value.state if isinstance(value, Unbuilt) else value
        if isinstance(own, Mapping) and "param_groups" in own and ("state" in own or own is not value):
            return
        tensors = _module_tensors(value) or _tensors(value)
        self.add(path, tensors)
        if isinstance(value, (Unbuilt, Global)) and not is_attribute:
            self.tell(value, path, bool(tensors))
        if isinstance(value, (Mapping, list, tuple)) and (id(value) in self.seen or depth > MAX_DEPTH):
            return  # the same weights may be there under two names, but nothing is followed twice
        self.seen.add(id(value))
        items: list[tuple[str, Any]] = []
        if isinstance(value, Mapping):
            items = [(str(key), v) for key, v in value.items() if str(key) not in tensors]
        elif isinstance(value, (list, tuple)) and len(value) <= 100:
            items = [(f"[{i}]", v) for i, v in enumerate(value)]
        elif path and not is_attribute and not isinstance(value, Global):
            _add_plain_value(self.plain_values, path, value)
        attributes = []
        if isinstance(value, Unbuilt) and not tensors:
            attributes = [(str(key), v) for key, v in value.state.items()]
        for is_of_object, pairs in ((is_attribute, items), (True, attributes)):
            for name, part in pairs:
                if not any(word in name.lower() for word in _NO_WEIGHTS):
                    step = name if name.startswith("[") or not path else f".{name}"
                    self.search(part, f"{path}{step}", depth + 1, is_of_object)

    def add(self, path: str, tensors: dict[str, Tensor]) -> None:
        networks = networks_of(tensors)
        named = {f"{path}.{group}" if path else group: part for group, part in networks.items()}
        self.divided |= set(named)
        whole = f"{path}.{ALL}" if path else ALL
        self.tensors |= {**named, whole: tensors} if named else {path: tensors} if tensors else {}

    def tell(self, value: Unbuilt | Global, path: str, is_read: bool) -> None:
        where, name = one_line(path) or "the file", one_line(value.name)
        if is_read:
            self.notes.append(f"{where}: a whole module of {name}; its tensors were read, its code was not run")
        elif not value.name.startswith(_QUIET):
            self.notes.append(f"{where}: an object of {name}, not built")
        if path and len(self.plain_values) < MAX_PLAIN_VALUES:
            shown = _attributes(value)
            text = shown if value.name.startswith(_QUIET) and shown else f"{name}, not built"
            self.plain_values[one_line(path)[:60]] = (text if not shown or text == shown else f"{text}: {shown}")[:300]


def _attributes(value: Unbuilt | Global) -> str:
    given = list({**value.state, **value}.items())[:12] if isinstance(value, Unbuilt) else []
    return ", ".join(f"{_short(key, 30)}={_short(part, 30)}" for key, part in given)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The named tensors of a mapping, if a matrix or a kernel is among them, as in every network."""
    if not isinstance(value, Mapping):
        return {}
    named = {key: t for key, t in value.items() if isinstance(key, str) and isinstance(t, Tensor)}
    return canonical(named) if any(t.ndim >= 2 for t in named.values()) else {}


def _module_tensors(value: Any) -> dict[str, Tensor]:
    """The state dict of a whole nn.Module that was pickled, read off its attributes; {} for anything else."""
    found: dict[str, Tensor] = {}
    todo = [("", value)]
    for prefix, module in todo:  # a module may be in several places, and in itself
        state = module.state if isinstance(module, Unbuilt) else {}
        own, buffers, inner = (state.get(name) for name in ("_parameters", "_buffers", "_modules"))
        if not (isinstance(own, dict) and isinstance(buffers, dict) and isinstance(inner, dict)):
            continue
        temporary = state.get("_non_persistent_buffers_set")
        kept = {key: t for key, t in buffers.items() if not isinstance(temporary, list) or key not in temporary}
        found |= {f"{prefix}{key}": t for key, t in {**own, **kept}.items() if isinstance(t, Tensor)}
        if prefix.count(".") < _MAX_MODULES and len(todo) < _MAX_TENSORS:
            todo += [(f"{prefix}{key}.", part) for key, part in inner.items()]
    return canonical(found)


_MAX_MODULES = 20
"""levels of modules within one another"""
_MAX_TENSORS = 50_000


# Several networks in one flat state dict


def _add_plain_value(plain_values: dict[str, str], path: str, value: Any) -> None:
    if len(plain_values) >= MAX_PLAIN_VALUES:
        return
    if isinstance(value, Tensor):
        text = f"{value.item():.6g}" if value.numel() == 1 and is_plain(value) else f"tensor {list(value.shape)}"
    else:
        text = _short(value, 60)
    plain_values[one_line(path)[:60]] = text[:300]


def _short(value: Any, limit: int) -> str:
    """A value as short text; the inside of a container, which may be endless, is not shown."""
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif value is None or isinstance(value, (bool, int, str, bytes)):
        text = str(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    elif hasattr(value, "item") and getattr(value, "size", 0) == 1:
        text = str(value)
    else:
        text = type(value).__name__
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def choose_state_dict(found: StateDicts, wanted: str | None, who: str) -> tuple[str, str]:
    """(path of the state dict to use, the reason for it).

    found: the state dicts of a file. wanted: the path or a part of it, if the user named one. who: the file, for
    errors.
    Raises ModelError: there is none, none is called `wanted`, or nothing says which of several it should be.
    """
    weights = sorted(found.tensors, key=lambda path: (natural_key(path), path))
    if not weights:
        held = f" ({'; '.join(found.notes[:3])})" if found.notes else ""
        todo = "Save the network's own: torch.save(model.state_dict(), 'weights.pt')."
        raise ModelError(who, f"has no weights: no named tensors with a kernel or a matrix among them{held}", todo)
    if wanted is not None:
        named = [p for p in weights if p == wanted] or [p for p in weights if wanted in p.replace("[", ".[").split(".")]
        if len(named) > 1:
            named = [p for p in named if p.rpartition(".")[2] == ALL] or named
        if len(named) != 1:
            wrong = f"has no weights called {wanted!r}" if not named else f"{wanted!r} may be {' or '.join(named[:5])}"
            raise ModelError(who, wrong, did_you_mean(wanted, list(weights)))
        return named[0], "asked for"
    weights = [path for path in weights if not (path.rpartition(".")[2] == ALL and found.divided)]
    if len(weights) == 1:
        return weights[0], "the only one"
    if averages := [path for path in weights if _is_average(path, found.tensors)]:
        known = (p for name in ("state_dict_ema", "model_ema") for p in averages if name in p)
        return next(known, averages[0]), "the average of the weights goes first"
    steps = {path: re.split(r"[.\[]", path) for path in weights}
    for name in PREFERRED:
        if path := next((path for path in weights if name in steps[path] and path not in found.divided), ""):
            return path, f"{name!r} is the usual name"
    if "" in weights:
        return "", "the file's own names go first"
    several = "several networks" if set(weights) <= found.divided else "several sets of weights"
    lasts = [path.rpartition(".")[2] for path in weights]
    short = lasts if len(set(lasts)) == len(lasts) else weights
    shown = [one_line(path) for path in short[:8]]
    todo = f"Choose one with {' or '.join(f'--weights {name}' for name in shown[:2])}"
    todo += f"; --weights {ALL} is for a network that holds them all." if found.divided else "."
    raise ModelError(who, f"has {several}: {', '.join(shown)}", todo)


def _is_average(path: str, weights: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a state dict is an average of weights: by its name, by torch's counter, or by the names of the others."""
    words = words_of(path)
    if words & AVERAGES or any(name.rpartition(".")[2] == "n_averaged" for name in weights[path]):
        return not words & _NO_AVERAGES
    return not words & _NO_AVERAGES and any(words_of(other) & _NO_AVERAGES for other in weights)


def complete_average(found: StateDicts, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(a state dict of a file, notes). An average of parameters only gets the BatchNorm statistics of the live network,
    the one other state dict in the file whose names are the same otherwise."""
    own = found.tensors[name]
    if not _is_average(name, found.tensors):
        return own, ()
    bare, prefixes = strip_prefixes({key: t for key, t in own.items() if key.rpartition(".")[2] not in DEBRIS})
    prefix = "".join(prefixes)
    for other, tensors in found.tensors.items():
        live, _ = strip_prefixes(tensors)
        missing = {key: t for key, t in live.items() if key not in bare}
        is_same = all(key in live and live[key].shape == t.shape for key, t in bare.items())
        if other != name and is_same and missing and all(key.endswith(BATCHNORM_STATISTICS) for key in missing):
            source = one_line(other) or "the file itself"
            note = f"{one_line(name)} has no BatchNorm statistics: those of {source} are taken"
            return canonical({**own, **{f"{prefix}{key}": t for key, t in missing.items()}}), (note,)
    return own, ()
