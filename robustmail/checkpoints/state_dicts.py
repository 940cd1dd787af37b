"""The state dicts in the content of a file: found, chosen, and cleaned of what wrappers added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustmail.errors import ModelError, did_you_mean

__all__ = [
    "MEANS",
    "CleanStateDict",
    "StateDicts",
    "Normalisation",
    "check_numbers",
    "choose_state_dict",
    "clean_state_dict",
    "find_state_dicts",
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

_NO_WEIGHTS = ("optim", "sched", "scaler", "grad", "momentum", "rng")
"""in names of what is no network's weights"""
MEANS = {
    "mean": ("std", "sigma"), "mu": ("sigma", "std"), "new_mean": ("new_std",), "_mean": ("_std", "_sigma"),
    "means": ("stds", "std", "sds"), "pixel_mean": ("pixel_std",), "image_mean": ("image_std",),
    "norm_mean": ("norm_std",), "data_mean": ("data_std",), "input_mean": ("input_std",), "mean_": ("std_",),
}  # fmt: skip
"""names of a mean among a module's tensors or attributes, and of the standard deviation beside it"""
_DEBRIS = {"total_ops": "thop's counters", "total_params": "thop's counters", "n_averaged": "the average's counter"}


@dataclass(frozen=True)
class StateDicts:
    """All state dicts in a file.

    tensors: by the path that leads to them: "" if the file is one state dict, else "state_dict", "model.ema" or
    "state_dict[0]". plain_values: what is beside them, such as epoch, accuracy and arguments, as short texts.
    """

    tensors: dict[str, dict[str, Tensor]]
    plain_values: dict[str, str]


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
    state_dicts: dict[str, dict[str, Tensor]] = {}
    plain_values: dict[str, str] = {}
    seen: set[int] = set()

    def search(value: Any, path: str, depth: int) -> None:
        if isinstance(value, Mapping) and "state" in value and "param_groups" in value:
            return
        tensors = _tensors(value)
        if tensors:
            state_dicts[path] = tensors
        if isinstance(value, (Mapping, list, tuple)) and (id(value) in seen or depth > MAX_DEPTH):
            return  # the same weights may be there under two names, but nothing is followed twice
        seen.add(id(value))
        items: Iterable[tuple[str, Any]] = ()
        if isinstance(value, Mapping):
            items = ((f"{path}.{key}" if path else str(key), v) for key, v in value.items() if str(key) not in tensors)
        elif isinstance(value, (list, tuple)) and len(value) <= 100:
            items = ((f"{path}[{i}]", v) for i, v in enumerate(value))
        elif path:
            _add_plain_value(plain_values, path, value)
        for name, part in items:
            if not any(word in name.lower() for word in _NO_WEIGHTS):
                search(part, name, depth + 1)

    search(content, "", 0)
    return StateDicts(state_dicts, plain_values)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The named tensors of a mapping, if a matrix or a kernel is among them, as in every network."""
    if not isinstance(value, Mapping):
        return {}
    named = {key: t for key, t in value.items() if isinstance(key, str) and isinstance(t, Tensor)}
    return named if any(t.ndim >= 2 for t in named.values()) else {}


def _add_plain_value(plain_values: dict[str, str], path: str, value: Any) -> None:
    if len(plain_values) >= MAX_PLAIN_VALUES:
        return
    if isinstance(value, Tensor):
        text = f"{value.item():.6g}" if value.numel() == 1 and _plain(value) else f"tensor {list(value.shape)}"
    elif hasattr(value, "__dict__") and not callable(value):
        text = ", ".join(f"{k}={_short(v, 30)}" for k, v in list(vars(value).items())[:12])
    else:
        text = _short(value, 60)
    plain_values[ascii(path)[1:-1][:60]] = text[:300]


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


def choose_state_dict(weights: Mapping[str, Any], wanted: str | None, who: str) -> tuple[str, str]:
    """(path of the state dict to use, the reason for it).

    weights: the state dicts by path. wanted: the path or a part of it, if the user named one. who: the file, for
    errors.
    Raises ModelError: there is none, none is called `wanted`, or nothing says which of several it should be.
    """
    if not weights:
        todo = "Save the network's own: torch.save(model.state_dict(), 'weights.pt')."
        raise ModelError(who, "has no weights: no named tensors with a kernel or a matrix among them", todo)
    if wanted is not None:
        named = [p for p in weights if p == wanted] or [p for p in weights if wanted in p.replace("[", ".[").split(".")]
        if len(named) != 1:
            wrong = f"has no weights called {wanted!r}" if not named else f"{wanted!r} may be {' or '.join(named[:5])}"
            raise ModelError(who, wrong, did_you_mean(wanted, list(weights)))
        return named[0], "asked for"
    if len(weights) == 1:
        return next(iter(weights)), "the only one"
    averages = [path for path in weights if "ema" in re.split(r"[^a-z]+", path.lower())]
    if averages:
        known = (p for name in ("state_dict_ema", "model_ema") for p in averages if name in p)
        return next(known, averages[0]), "the average of the weights goes first"
    steps = {path: re.split(r"[.\[]", path) for path in weights}
    for name in PREFERRED:
        if path := next((path for path, parts in steps.items() if name in parts), ""):
            return path, f"{name!r} is the usual name"
    if "" in weights:
        return "", "the file's own names go first"
    raise ModelError(
        who, f"has several sets of weights: {', '.join(list(weights)[:8])}", "Choose one with --weights NAME."
    )


def clean_state_dict(raw: Mapping[str, Tensor]) -> CleanStateDict:
    """Remove normalisation, prefixes and duplicates that wrappers added to a state dict, and convert it to float32."""
    notes: list[str] = []
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        last = name.rsplit(".", 1)[-1]
        if last in _DEBRIS:
            notes.append(f"{_DEBRIS[last]} ({name}) left out")
        elif problem := _problem(tensor):
            problems.append(f"{name} {problem}")
        else:
            tensors[name] = _as_float32(tensor)
    notes = _brief(notes, "left out")
    kinds = {
        str(t.dtype).removeprefix("torch.") for t in raw.values() if isinstance(t, Tensor) and t.is_floating_point()
    }
    if kinds - {"float32"}:
        notes.append(f"weights are {' and '.join(sorted(kinds - {'float32'}))}, read as float32")
    normalize = _take_normalisation(tensors, notes)
    _drop_duplicates(tensors, notes)
    tensors, prefixes = strip_prefixes(tensors)
    problems += check_numbers(tensors)
    return CleanStateDict(tensors, prefixes, normalize, tuple(notes), tuple(problems))


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
    if not tensor.is_floating_point() and tensor.ndim >= 2:
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
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d{1,9})", name) if part]
