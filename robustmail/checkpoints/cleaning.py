"""A state dict as found in a file, cleaned: without wrappers, tables, counters and duplicates, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustmail.checkpoints.flat_networks import drop_besides
from robustmail.checkpoints.names import bare_names, canonical, strip_prefixes
from robustmail.checkpoints.reparametrisation import fold_reparametrisations

__all__ = [
    "CleanStateDict", "MEANS", "Normalisation", "DEBRIS", "BATCHNORM_STATISTICS", "is_plain", "check_numbers",
    "clean_state_dict", "is_table",
]  # fmt: skip

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


_TABLES = {"relative_position_index", "relative_coords_table", "attn_mask", "position_ids", "inv_freq",
           "attention_bias_idxs"}  # fmt: skip
"""last parts of the names of tables that networks compute when they are built"""


MEANS = {
    "mean": ("std", "sigma"), "mu": ("sigma", "std"), "new_mean": ("new_std",), "_mean": ("_std", "_sigma"),
    "means": ("stds", "std", "sds"), "pixel_mean": ("pixel_std",), "image_mean": ("image_std",),
    "norm_mean": ("norm_std",), "data_mean": ("data_std",), "input_mean": ("input_std",), "mean_": ("std_",),
}  # fmt: skip
"""names of a mean among a module's tensors or attributes, and of the standard deviation beside it"""


DEBRIS = {"total_ops": "thop's counters", "total_params": "thop's counters", "n_averaged": "the average's counter"}


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


BATCHNORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
        if last in DEBRIS:
            notes.append(f"{DEBRIS[last]} ({name}) left out")
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
    drop_besides(tensors, notes)
    tensors, prefixes = strip_prefixes(tensors)
    tensors, _ = strip_prefixes(dict(zip(bare_names(tensors), tensors.values(), strict=True)))
    problems += check_numbers(tensors)
    return CleanStateDict(canonical(tensors), prefixes, normalize, tuple(notes), tuple(problems))


def _is_counter(name: str, tensor: Tensor) -> bool:
    is_whole = tensor.dtype in (torch.int64, torch.int32) and tensor.numel() == 1 and tensor.ndim < 2
    return is_whole and not name.endswith(BATCHNORM_STATISTICS)


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


def is_plain(tensor: Tensor) -> bool:
    """Whether it is dense and of a type that a network may have."""
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
