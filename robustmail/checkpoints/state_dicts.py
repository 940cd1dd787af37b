"""The state dicts in the content of a file: found, chosen, and cleaned of what wrappers added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustmail.checkpoints.reparametrisation import fold_reparametrisations
from robustmail.checkpoints.unpickler import Global, Unbuilt
from robustmail.errors import ModelError, did_you_mean

__all__ = [
    "ALL",
    "MEANS",
    "CleanStateDict",
    "StateDicts",
    "Normalisation",
    "bare_names",
    "canonical",
    "check_numbers",
    "choose_state_dict",
    "clean_state_dict",
    "complete_average",
    "find_state_dicts",
    "is_table",
    "natural_key",
    "strip_prefixes",
]

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

MAX_PLAIN_VALUES = 40
MAX_DEPTH = 8
"""levels within one another at which state dicts are searched"""

PREFERRED = ("state_dict", "model_state_dict", "model", "net", "network", "rmodel", "last", "weights", "params")
"""usual names of state dicts, in the order in which they are chosen; averages of the weights (EMA) go first, as in
timm"""
AVERAGES = {"ema", "swa", "avg", "average", "averaged", "shadow", "polyak"}
"""words in names of averages of the weights"""
_NO_AVERAGES = {"unaveraged", "nonaveraged"}
"""words in names of weights beside which all others are averages"""
_ROLES = {"student", "teacher", "generator", "discriminator", "netg", "netd", "model", "net", "network", "target",
          "online", *AVERAGES}  # fmt: skip
"""words in names of whole networks, where one flat state dict has several"""
_BESIDES = {
    "criterion",
    "criterions",
    "loss",
    "losses",
    "metric",
    "metrics",
    "acc",
    "accuracy",
    "confmat",
    "fid",
    "lpips",
}
"""words in names of what training keeps beside a network"""
ALL = "all"
"""name of a flat state dict of several networks, undivided"""

_NO_WEIGHTS = ("optim", "sched", "scaler", "grad", "momentum", "rng")
"""in names of what is no network's weights"""
_TABLES = {"relative_position_index", "relative_coords_table", "attn_mask", "position_ids", "inv_freq",
           "attention_bias_idxs"}  # fmt: skip
"""last parts of the names of tables that networks compute when they are built"""
_QUIET = ("argparse.Namespace", "types.SimpleNamespace", "pathlib", "numpy", "collections", "datetime")
"""classes that are no news beside weights"""
MEANS = {
    "mean": ("std", "sigma"), "mu": ("sigma", "std"), "new_mean": ("new_std",), "_mean": ("_std", "_sigma"),
    "means": ("stds", "std", "sds"), "pixel_mean": ("pixel_std",), "image_mean": ("image_std",),
    "norm_mean": ("norm_std",), "data_mean": ("data_std",), "input_mean": ("input_std",), "mean_": ("std_",),
}  # fmt: skip
"""names of a mean among a module's tensors or attributes, and of the standard deviation beside it"""
_DEBRIS = {"total_ops": "thop's counters", "total_params": "thop's counters", "n_averaged": "the average's counter"}


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


@dataclass(frozen=True)
class CleanStateDict:
    """A state dict as a bare network would have it.

    tensors: float32 (counters stay integers), names without prefixes of wrappers, without mean and std of the images.
    prefixes: that were removed. normalize: (mean, std) that were removed. notes: what else was changed, in sentences.
    problems: why the weights cannot be used, in sentences.
    """

    tensors: dict[str, Tensor]
    prefixes: tuple[str, ...] = ()
    normalize: Normalisation | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


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
        networks = _networks(tensors)
        named = {f"{path}.{group}" if path else group: part for group, part in networks.items()}
        self.divided |= set(named)
        whole = f"{path}.{ALL}" if path else ALL
        self.tensors |= {**named, whole: tensors} if named else {path: tensors} if tensors else {}

    def tell(self, value: Unbuilt | Global, path: str, is_read: bool) -> None:
        where, name = _line(path) or "the file", _line(value.name)
        if is_read:
            self.notes.append(f"{where}: a whole module of {name}; its tensors were read, its code was not run")
        elif not value.name.startswith(_QUIET):
            self.notes.append(f"{where}: an object of {name}, not built")
        if path and len(self.plain_values) < MAX_PLAIN_VALUES:
            shown = _attributes(value)
            text = shown if value.name.startswith(_QUIET) and shown else f"{name}, not built"
            self.plain_values[_line(path)[:60]] = (text if not shown or text == shown else f"{text}: {shown}")[:300]


def _attributes(value: Unbuilt | Global) -> str:
    given = list({**value.state, **value}.items())[:12] if isinstance(value, Unbuilt) else []
    return ", ".join(f"{_short(key, 30)}={_short(part, 30)}" for key, part in given)


def _line(text: str) -> str:
    return ascii(text)[1:-1]


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


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order of their names, which is the same for every file and process."""
    return dict(sorted(tensors.items(), key=lambda item: (natural_key(item[0]), item[0])))


# Several networks in one flat state dict


def _groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by the first parts of their names, below what all of them share; names stay whole."""
    bare, _ = strip_prefixes(tensors)
    groups: dict[str, dict[str, Tensor]] = {}
    for short, (name, tensor) in zip(bare, tensors.items(), strict=True):
        groups.setdefault(short.partition(".")[0] if "." in short else "", {})[name] = tensor
    return groups


def _networks(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The networks in a flat state dict, by their first names, where there are several: {} for one."""
    ignored = {"attacker", *_BESIDES}  # MadryLab's attacker holds a copy of the network
    groups = {name: part for name, part in _groups(tensors).items() if name and not _words(name) & ignored}
    networks = {name: part for name, part in groups.items() if _is_whole(part) or _plays_a_role(name, part)}
    return networks if len(networks) > 1 else {}


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a network's first kernel, which takes images, is there, and matrices behind it."""
    kernels, shapes = _kernels(tensors), [tuple(t.shape) for t in _kernels(tensors)]
    first = [shape[1] for shape in shapes if len(shape) == 4]
    takes_images = 3 in first or first.count(1) == 1  # more kernels of one channel are depthwise convolutions
    return takes_images and len(kernels) >= 3 and any(len(shape) == 2 for shape in shapes)


def _plays_a_role(name: str, tensors: Mapping[str, Tensor]) -> bool:
    return bool(_words(name) & _ROLES) and len(_kernels(tensors)) > 1


def _kernels(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.ndim >= 2]


def _words(path: str) -> set[str]:
    """The words in a name, in lower case: model_ema, modelEMA and model.ema have model and ema."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", path)}


def _drop_besides(tensors: dict[str, Tensor], notes: list[str]) -> None:
    """Remove weights of losses and states of metrics, which training keeps beside its network."""
    groups = _groups(tensors)
    networks = [name for name, part in groups.items() if _kernels(part) and not _words(name) & _BESIDES]
    for name, part in groups.items():
        is_beside = bool(_words(name) & _BESIDES) or (len(networks) == 1 and name not in networks and _is_vector(part))
        if name and networks and is_beside:
            for key in part:
                del tensors[key]
            first = _line(next(iter(part)))
            notes.append(f"{first}{f' and {len(part) - 1} more' if len(part) > 1 else ''} left out, beside the network")


def _is_vector(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are no layer's: neither a norm's weight and bias nor a scale."""
    lasts = {name.rpartition(".")[2] for name in tensors}
    words = set().union(*map(_words, tensors))
    return not ({"weight", "bias"} <= lasts or lasts & {"running_mean", "mean", "std"}
                or words & {"norm", "bn", "ln", "scale", "gamma", "temperature", "temp"})  # fmt: skip


def _add_plain_value(plain_values: dict[str, str], path: str, value: Any) -> None:
    if len(plain_values) >= MAX_PLAIN_VALUES:
        return
    if isinstance(value, Tensor):
        text = f"{value.item():.6g}" if value.numel() == 1 and _plain(value) else f"tensor {list(value.shape)}"
    else:
        text = _short(value, 60)
    plain_values[_line(path)[:60]] = text[:300]


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
    shown = [_line(path) for path in short[:8]]
    todo = f"Choose one with {' or '.join(f'--weights {name}' for name in shown[:2])}"
    todo += f"; --weights {ALL} is for a network that holds them all." if found.divided else "."
    raise ModelError(who, f"has {several}: {', '.join(shown)}", todo)


def _is_average(path: str, weights: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a state dict is an average of weights: by its name, by torch's counter, or by the names of the others."""
    words = _words(path)
    if words & AVERAGES or any(name.rpartition(".")[2] == "n_averaged" for name in weights[path]):
        return not words & _NO_AVERAGES
    return not words & _NO_AVERAGES and any(_words(other) & _NO_AVERAGES for other in weights)


def complete_average(found: StateDicts, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(a state dict of a file, notes). An average of parameters only gets the BatchNorm statistics of the live network,
    the one other state dict in the file whose names are the same otherwise."""
    own = found.tensors[name]
    if not _is_average(name, found.tensors):
        return own, ()
    bare, prefixes = strip_prefixes({key: t for key, t in own.items() if key.rpartition(".")[2] not in _DEBRIS})
    prefix = "".join(prefixes)
    for other, tensors in found.tensors.items():
        live, _ = strip_prefixes(tensors)
        missing = {key: t for key, t in live.items() if key not in bare}
        is_same = all(key in live and live[key].shape == t.shape for key, t in bare.items())
        if other != name and is_same and missing and all(key.endswith(_STATISTICS) for key in missing):
            note = f"{_line(name)} has no BatchNorm statistics: those of {_line(other) or 'the file itself'} are taken"
            return canonical({**own, **{f"{prefix}{key}": t for key, t in missing.items()}}), (note,)
    return own, ()


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def clean_state_dict(raw: Mapping[str, Tensor]) -> CleanStateDict:
    """Remove normalisation, prefixes and duplicates that wrappers added to a state dict, and convert it to float32."""
    notes: list[str] = []
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    tables: list[str] = []
    folded, folding, unknown = fold_reparametrisations(raw)
    problems += unknown
    for name, tensor in canonical(folded).items():
        last = name.rsplit(".", 1)[-1]
        if last in _DEBRIS:
            notes.append(f"{_DEBRIS[last]} ({name}) left out")
        elif _is_counter(name, tensor):
            notes.append(f"a counter ({name}) left out")
        elif is_table(name, tensor, folded):
            tables.append(name)
        elif problem := _problem(tensor):
            problems.append(f"{name} {problem}")
        else:
            tensors[name] = _as_float32(tensor)
    notes = [*_brief(notes, "left out"), *folding]
    if tables:
        more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        notes.append(f"tables and masks left out, which a network computes by itself: {tables[0]}{more}")
    kinds = {
        str(t.dtype).removeprefix("torch.") for t in raw.values() if isinstance(t, Tensor) and t.is_floating_point()
    }
    if kinds - {"float32"}:
        notes.append(f"weights are {' and '.join(sorted(kinds - {'float32'}))}, read as float32")
    normalize = _take_normalisation(tensors, notes)
    _drop_duplicates(tensors, notes)
    _drop_besides(tensors, notes)
    tensors, prefixes = strip_prefixes(tensors)
    tensors, _ = strip_prefixes(dict(zip(bare_names(tensors), tensors.values(), strict=True)))
    problems += check_numbers(tensors)
    return CleanStateDict(canonical(tensors), prefixes, normalize, tuple(notes), tuple(problems))


def _is_counter(name: str, tensor: Tensor) -> bool:
    is_whole = tensor.dtype in (torch.int64, torch.int32) and tensor.numel() == 1 and tensor.ndim < 2
    return is_whole and not name.endswith(_STATISTICS)


def is_table(name: str, tensor: Tensor, beside: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a table of indices or a mask, rather than weights: one that networks make for themselves, or
    integers that are no quantised kernel. beside: the tensors of the same file."""
    parent, _, last = name.rpartition(".")
    if last in _TABLES:
        return True
    if tensor.is_quantized or tensor.is_floating_point() or tensor.is_complex() or tensor.ndim < 2:
        return False
    scales = ("scale", "scales", "weight_scale", "zero_point", "SCB", "absmax", "qzeros")
    has_scales = any(f"{parent}.{word}" in beside or f"{name}_{word}" in beside for word in scales)
    return tensor.dtype in _DTYPES and not (
        tensor.dtype in (torch.int8, torch.uint8) and (last == "weight" or has_scales)
    )


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


def _brief(notes: list[str], what: str) -> list[str]:
    return notes if len(notes) < 3 else [notes[0], f"{len(notes) - 1} more of the kind {what}"]


def _problem(tensor: Tensor) -> str:
    """Why a tensor cannot be the weights of a network, or ""."""
    if tensor.device.type != "cpu":
        return "has no numbers in the file"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"is {str(tensor.layout).removeprefix('torch.')}, not dense"
    if tensor.is_quantized or tensor.is_complex() or tensor.dtype not in _DTYPES:
        return f"is {str(tensor.dtype).removeprefix('torch.')}: only floating-point weights can be evaluated"
    if not tensor.is_floating_point() and tensor.ndim >= 2:  # no table, says is_table
        return f"is {str(tensor.dtype).removeprefix('torch.')}: quantised weights cannot be evaluated"
    if tensor.numel() > 2**20 and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {list(tensor.shape)} over {tensor.untyped_storage().nbytes():,} bytes"
    if not tensor.numel():
        return f"is of shape {list(tensor.shape)}, without a number in it"
    return ""


_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool}  # fmt: skip


def _plain(tensor: Tensor) -> bool:
    return not _problem(tensor)


def _as_float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float().contiguous() if tensor.is_floating_point() else tensor.contiguous()


def check_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each tensor with NaN or infinity, or a negative variance."""
    problems = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            problems.append(f"{name} has {count:,} of {tensor.numel():,} numbers that are NaN or infinite")
        elif name.endswith("running_var") and bool((tensor < 0).any()):
            problems.append(f"{name} has negative variances")
    return problems


def _take_normalisation(tensors: dict[str, Tensor], notes: list[str]) -> Normalisation | None:
    """Remove means and standard deviations of images from `tensors`; return the pair nearest the root that is plausible
    for images in [0, 1]."""
    pairs: list[tuple[str, Normalisation]] = []
    for key in sorted(tensors, key=lambda k: (k.count("."), k)):
        parent, _, last = key.rpartition(".")
        for std_name in MEANS.get(last, ()):
            partner = f"{parent}.{std_name}" if parent else std_name
            if key in tensors and partner in tensors and _is_few(tensors[key]) and _is_few(tensors[partner]):
                mean, std = (tuple(map(_digits, tensors.pop(k).double().flatten().tolist())) for k in (key, partner))
                pairs.append((key, (mean, std)))
    usable = [(key, pair) for key, pair in pairs if _is_plausible(*pair)]
    for key, (mean, std) in pairs:
        if not _is_plausible(mean, std):
            notes.append(f"{key} {_numbers(mean)} and std {_numbers(std)} are not those of images in [0, 1]: not used")
    if len({pair for _, pair in usable}) > 1:
        notes.append(f"{len(usable)} normalisations differ; the one at {usable[0][0]} is used")
    return usable[0][1] if usable else None


def _is_few(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() in (1, 2, 3, 4) and tensor.numel() in (1, *tensor.shape)


def _is_plausible(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    return len({len(mean), len(std)} - {1}) <= 1 and all(0 <= m <= 1 for m in mean) and all(1e-3 < s <= 2 for s in std)


def _digits(number: float) -> float:
    """The shortest number that float32 cannot tell from `number`: 0.4914 for the stored 0.49140000343."""
    return float(f"{number:.7g}")


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _drop_duplicates(tensors: dict[str, Tensor], notes: list[str]) -> None:
    """Remove the second copy of a network that MadryLab's wrapper holds as attacker.model.*, beside model.*."""
    dropped = 0
    for name in list(tensors):
        head, mark, tail = name.partition("attacker.model.")
        original = f"{head}model.{tail}"
        if (
            mark
            and (not head or head.endswith("."))
            and original in tensors
            and _same(tensors[name], tensors[original])
        ):
            del tensors[name]
            dropped += 1
    if dropped:
        notes.append(f"{dropped} tensors under attacker.model. are copies and left out")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (bool(torch.equal(a, b)) or bool(torch.equal(a.nan_to_num(), b.nan_to_num())))


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
