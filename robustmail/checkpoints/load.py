"""Weights into a network that the user names or builds; strictly, with the likely reason where they do not fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from robustmail.checkpoints.cleaning import MEANS, Normalisation, clean_state_dict, is_table
from robustmail.checkpoints.infer import build_named, class_counts, stem_channels
from robustmail.checkpoints.names import bare_names, natural_key
from robustmail.errors import ModelError, in_brief
from robustmail.models.classifier import check_name
from robustmail.text import plural

__all__ = ["build_network", "fits", "load_strict", "load_tensors", "normalisation_in"]

_COUNTER = "num_batches_tracked"
_CLASSES = ("classes", "num_classes", "n_classes", "nclasses", "num_class")
_CHANNELS = ("channels", "in_channels", "in_chans", "num_channels")


def load_strict(tensors: Mapping[str, Tensor], network: nn.Module, who: str) -> nn.Module:
    """Load a file's tensors into a network, in eval mode; whole prefixes are taken off or added where that fits.

    Pass a checkpoint's raw_tensors: normalisation that is a part of the network is loaded too, any other left out.
    Raises ModelError, with shapes on both sides and the likely reason.
    """
    return load_tensors(tensors, network, who)[0]


def load_tensors(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    who: str,
    ignore_unused: bool = False,
    head: Iterable[str] = (),
) -> tuple[nn.Module, tuple[str, ...]]:
    """(the network of `load_strict`, what was left out, in sentences).

    Tables that the network computes by itself are left out. No tensor of the network is ever left as it was, but of
    `head`.
    ignore_unused: leave out whatever else of the file the network has no place for.
    head: names of the network's tensors that stay as they are where the file has them for another number of classes.
    Raises as `load_strict`.
    """
    own = network.state_dict()
    variants = list(_variants(tensors, own))
    computed = {name for name, _ in network.named_buffers()} - set(own)
    for is_left_out in (_nothing, partial(_is_computed, computed), _anything)[: 3 if ignore_unused else 2]:
        for variant in variants:
            extra = [name for name in variant if name not in own and is_left_out(name, variant[name], variant)]
            fresh = [name for name in head if name in variant and _has_other_rows(variant[name], own[name])]
            chosen = {name: tensor for name, tensor in variant.items() if name not in extra}
            chosen |= {name: own[name] for name in fresh}
            if not _misfits(chosen, own):
                _assign(network, chosen, own, who)
                notes = [*_left_out(extra, is_left_out is _anything)]
                if fresh:
                    rows = len(variant[fresh[0]]), len(own[fresh[0]])
                    notes.append(f"the file has {rows[0]} classes, the model {rows[1]}: {', '.join(fresh)} start fresh")
                return network.eval(), tuple(notes)
    nearest = max(variants, key=lambda variant: len(set(variant) & set(own)))
    raise _misfit(nearest, own, who, network)


def fits(tensors: Mapping[str, Tensor], network: nn.Module) -> bool:
    """Whether tensors have exactly the names and shapes of a network's."""
    return not _misfits(tensors, network.state_dict())


def _has_other_rows(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape != own.shape and tensor.ndim == own.ndim and tensor.shape[1:] == own.shape[1:]


def _nothing(name: str, tensor: Tensor, beside: Mapping[str, Tensor]) -> bool:
    return False


def _anything(name: str, tensor: Tensor, beside: Mapping[str, Tensor]) -> bool:
    return True


def _is_computed(computed: set[str], name: str, tensor: Tensor, beside: Mapping[str, Tensor]) -> bool:
    return name in computed or is_table(name, tensor, beside)


def _assign(network: nn.Module, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], who: str) -> None:
    counters = {name: torch.zeros_like(t) for name, t in own.items() if name.endswith(_COUNTER)}
    try:
        network.load_state_dict({**counters, **tensors}, strict=True)
    except (Exception, SystemExit) as error:  # a method of somebody's own
        raise ModelError(who, f"the model's load_state_dict raised {in_brief(error)}") from error


def _left_out(extra: list[str], is_asked: bool) -> Iterator[str]:
    if extra:
        what = "not used by the network" if is_asked else "tables and masks, which the network computes by itself"
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        yield f"left out, {what}: {', '.join(sorted(extra, key=natural_key)[:3])}{more}"


def build_network(
    model: str | Callable[..., Any],
    tensors: Mapping[str, Tensor],
    classes: int | None = None,
    channels: int | None = None,
) -> nn.Module:
    """A fresh network: timm's or ours by name, or what a factory returns that takes () or (classes, channels).

    Classes and channels are read off the tensors where they are not given. Raises ModelError: no such model, or a
    factory that raises or returns no nn.Module.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in clean_state_dict(tensors).tensors.items()}
    counts = [classes] if classes else class_counts(shapes) or [10]
    channels = channels or stem_channels(shapes) or 3
    if not isinstance(model, str):
        return _called(model, counts[0], channels)
    check_name(model)
    try:
        return build_named(model, tensors, counts, channels)
    except Exception as error:  # a constructor may fail in any way
        wrong = f"cannot be built for {counts[0]} classes and {channels} channels ({in_brief(error)})"
        raise ModelError(f"model={model}", wrong) from error


def normalisation_in(network: nn.Module) -> Normalisation | None:
    """(mean, std) of a layer inside the network that normalises images, torchvision's Normalize for one; or None."""
    for module in network.modules():
        if isinstance(module, _NormBase):
            continue
        for mean_name, partners in MEANS.items():
            mean = _few(getattr(module, mean_name, None))
            stds = (_few(getattr(module, name, None)) for name in partners)
            std = next((found for found in stds if found and all(s > 0 for s in found)), None)
            if mean and std:
                return mean, std
    return None


def _few(value: Any) -> tuple[float, ...] | None:
    """One to four numbers, whatever they are kept in."""
    try:
        numbers = torch.as_tensor(value).double().flatten() if isinstance(value, (Tensor, list, tuple)) else None
    except (ValueError, TypeError, RuntimeError):
        return None
    if numbers is None or not 1 <= len(numbers) <= 4 or not bool(torch.isfinite(numbers).all()):
        return None
    return tuple(float(f"{number:.7g}") for number in numbers.tolist())


# Names


def _variants(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors under the names they may have had: as they are, with fewer and with more components in front; with
    and without the wrappers that the network has within."""
    wrapped = dict(zip(bare_names(own), own, strict=True))
    for base in (dict(tensors), clean_state_dict(tensors).tensors):
        names, values = list(base), list(base.values())
        yield {wrapped.get(name, name): tensor for name, tensor in zip(bare_names(names), values, strict=True)}
        while names:
            yield dict(zip(names, values, strict=True))
            heads = {name.partition(".")[0] for name in names}
            rest = [name.partition(".")[2] for name in names]
            if len(heads) != 1 or not all(rest):
                break
            names = rest
        prefix = ""
        names = list(own)
        while len(heads := {name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
            prefix += f"{heads.pop()}."
            names = [name.partition(".")[2] for name in names]
            yield {f"{prefix}{name}": tensor for name, tensor in base.items()}


def _misfits(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names that only one side has, or with another shape; a counter of batches may be absent."""
    either = {*tensors, *(name for name in own if not name.endswith(_COUNTER))}
    return [n for n in either if n not in tensors or n not in own or tensors[n].shape != own[n].shape]


def _misfit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], who: str, network: nn.Module) -> ModelError:
    wrong = sorted(_misfits(tensors, own), key=natural_key)
    other = [name for name in wrong if name in tensors and name in own]
    extra = [name for name in wrong if name not in own]
    missing = [name for name in wrong if name not in tensors]
    shown = [f"{n} is {_shape(tensors[n])} in the file, {_shape(own[n])} in the model" for n in other]
    shown += [f"{n} {_shape(tensors[n])} is only in the file" for n in extra]
    shown += [f"{n} {_shape(own[n])} is only in the model" for n in missing]
    computed = {name for name, _ in network.named_buffers()}
    unused = [name for name in extra if not _is_computed(computed, name, tensors[name], tensors)]
    if unused and len(unused) == len(wrong):
        todo = "Pass --ignore-unused to leave them out, or the network that has them."
        kept = f"{', '.join(shown[:3])}{f' and {len(unused) - 3} more' if len(unused) > 3 else ''}"
        return ModelError(who, f"has {plural(len(unused), 'tensor')} more than the model: {kept}", todo)
    counts = f"{len(other)} tensors of another shape, {len(extra)} only in the file, {len(missing)} only in the model"
    picked = [*shown[:1], *shown[1:][-2:]] if len(other) < len(wrong) else shown[:3]
    return ModelError(
        who, f"does not fit the model: {counts}: {'; '.join(picked)}", _reason(tensors, own, other, extra, missing)
    )


def _reason(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], other: list[str], extra: list[str], missing: list[str]
) -> str:
    same = len(set(tensors) & set(own))
    if same < len(own) / 2:
        return "It is of another architecture, or its names differ: see `robustmail inspect FILE`."
    if not extra and not missing:
        heads = [name for name in other if name.endswith(("weight", "bias"))]
        last = {name.rpartition(".")[0] for name in heads}
        if len(last) == 1 and own[heads[0]].ndim in (1, 2) and len(heads) == len(other):
            return f"The file has {len(tensors[heads[0]])} classes, the model {len(own[heads[0]])}."
        if len(other) == 1 and own[other[0]].ndim == 4:
            return "The first convolution takes other channels, or has another kernel."
        return "It is of another width."
    ends = _ends(list(tensors)), _ends(list(own))
    for stage in sorted(ends[0].keys() & ends[1].keys(), key=natural_key):
        if ends[0][stage] != ends[1][stage]:
            deep, end = ends[0][stage], ends[1][stage]
            return f"It is of another depth: the file's {stage} ends at {stage}.{deep}, the model's at {stage}.{end}."
    return "It is of another architecture: see `robustmail inspect FILE`."


def _ends(names: list[str]) -> dict[str, int]:
    """The last number in each numbered sequence: {"layer3": 5}."""
    ends: dict[str, int] = {}
    for name in names:
        for match in re.finditer(r"\.(\d{1,6})(?=\.)", name):
            stage = name[: match.start()]
            ends[stage] = max(ends.get(stage, 0), int(match[1]))
    return ends


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


# Factories


def _called(factory: Callable[..., Any], classes: int, channels: int) -> nn.Module:
    name = getattr(factory, "__name__", type(factory).__name__)
    args, knobs = _arguments(factory, f"model={name}", classes, channels)
    try:
        network = factory(*args, **knobs)
    except (Exception, SystemExit) as error:  # somebody's code
        raise ModelError(f"model={name}", f"raised {in_brief(error)}", "It is called to build the network.") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"model={name}", f"returned {type(network).__name__}, not an nn.Module")
    return network


def _arguments(factory: Callable[..., Any], who: str, classes: int, channels: int) -> tuple[list[int], dict[str, int]]:
    """What a factory wants: (), (classes, channels), or these by the names people give them."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return [], {}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in kinds and p.default is p.empty]
    knobs = {
        p.name: classes if p.name in _CLASSES else channels
        for p in parameters
        if p.kind is not inspect.Parameter.POSITIONAL_ONLY and p.name in (*_CLASSES, *_CHANNELS)
    }
    if len(needed) == 2 and not {p.name for p in needed} & set(knobs):
        return [classes, channels], {}
    if any(p.name not in knobs for p in needed):
        raise ModelError(
            who, f"needs {', '.join(p.name for p in needed)}", "It is called as () or (classes, channels)."
        )
    return [], knobs
