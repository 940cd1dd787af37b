"""Networks that have a name, ours and timm's, with the constructor arguments that fit the shapes."""

from __future__ import annotations

import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.checkpoints.cleaning import clean_state_dict
from robustmail.checkpoints.infer.layers import Proposal
from robustmail.checkpoints.infer.timm_index import models_with_names
from robustmail.checkpoints.names import natural_key
from robustmail.models.classifier import is_in_timm
from robustmail.models.timm_model import read_timm_model

__all__ = ["build", "build_named", "class_counts", "convert_names", "proposals", "stem_channels"]

_OUR_WIDTHS = {"cifar_resnet18": 64, "cifar_preact_resnet18": 64, "cifar_wrn28_10": 10, "small_cnn": 32}
"""our networks, one of each architecture: the width that its name stands for"""
_TIMM_HEADS = ("head.fc.weight", "head.weight", "fc.weight", "classifier.weight", "head.l.weight",
               "classifier.fc.weight", "last_linear.weight")  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]
_COUNTER = "num_batches_tracked"
_CHEAP = 10**6
"""parameters of a network that may be allocated in any case"""
_MAX_TIMM_MODELS = 5
"""of timm's models with the same names of tensors: so many are built and compared"""


def proposals(tensors: Mapping[str, Tensor]) -> Iterator[Proposal]:
    """Our registered networks and timm's whose tensors have exactly these names and shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if arguments := _our_arguments(shapes):
        for name in _OUR_WIDTHS:
            yield from _fitting(name, [arguments[name]], tensors, shapes, "")
    for name in models_with_names(shapes)[:_MAX_TIMM_MODELS]:
        yield from _fitting(name, _timm_arguments(shapes), tensors, shapes, "timm ")


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network of timm or ours by name. arguments: of its constructor, which may raise anything."""
    import timm

    from robustmail.models import resnet, small, wide_resnet  # noqa: F401  registers ours

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: nn.Module = timm.create_model(name, **arguments)
    return network


def build_named(name: str, tensors: Mapping[str, Tensor], classes: list[int], channels: int) -> nn.Module:
    """A new network of timm, ours or RobustBench's, with random weights: the tensors are only compared, not loaded.

    Of several networks that the name stands for it is the one whose tensors have these names and shapes, or, if none
    has, most of these names. Number of classes, input and patch size are those at which the tensors fit, if there are
    such.
    name: of the model. tensors: of the checkpoint. classes: that the network's output may have, likeliest first.
    channels: of the network's input.
    Raises any exception of its constructor.
    """
    from robustmail.models.robustbench import architectures  # imports timm

    shapes = {key: tuple(tensor.shape) for key, tensor in clean_state_dict(tensors).tensors.items()}
    makers: list[Callable[[], nn.Module]] = []
    for n in classes:
        ends = {"num_classes": n, "in_chans": channels}
        if is_in_timm(name):
            makers += [partial(build, name, {**arguments, **ends}) for arguments in (*_timm_arguments(shapes), {})]
        makers += [partial(value, n, channels)] if (value := read_timm_model(name)) else []
        makers += [partial(network.build, n, channels, shapes) for network in architectures(name)]
    overlaps: list[int] = []
    for make in makers:
        own = _shapes_of(make)
        if own == _without_counters(shapes):
            return make()
        overlaps.append(len(set(own) & set(shapes)))
    make = makers[overlaps.index(max(overlaps))]
    # `classes` may be any number that a file claims: a network far larger than the file stays without memory.
    size = sum(math.prod(shape) for shape in _shapes_of(make).values())
    if size <= 4 * _parameters(tensors) + _CHEAP:
        return make()
    with torch.device("meta"):
        return make()


def _shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a network's tensors, without allocating them; {} if its constructor fails."""
    try:
        with torch.device("meta"):
            network = make()
    except Exception:  # an argument that it does not take, or it computes with its parameters
        return {}
    return _without_counters({key: tuple(t.shape) for key, t in network.state_dict().items()})


def _without_counters(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.endswith(_COUNTER)}


_POSITION_TABLES = ("pos_embed", "position_bias", "rel_pos", "pos_emb")


def convert_names(name: str, tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names of today's timm, by the conversion that timm has for older files of this model.

    {} if it has none, fails, or would change numbers: position tables are resized for another image size.
    name: of a model of timm. network: of that model.
    """
    from timm.models import model_entrypoint

    try:
        module = sys.modules[model_entrypoint(name).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
        if convert is None:
            return {}
        given = {key: tensor.clone() for key, tensor in tensors.items()}
        needs_network = len(inspect.signature(convert).parameters) > 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = convert(given, network) if needs_network else convert(given)
        found = {key: tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception:  # it expects certain names and shapes
        return {}
    tables = [key for key in found if key in tensors and any(word in key for word in _POSITION_TABLES)]
    resized = [key for key in tables if found[key].numel() != tensors[key].numel()]
    return {} if resized or _parameters(found) > _parameters(tensors) else found


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _fitting(
    name: str, options: list[dict[str, Any]], tensors: Mapping[str, Tensor], shapes: Shapes, library: str
) -> Iterator[Proposal]:
    """The network with the first arguments of `options` that give it exactly these names and shapes."""
    wanted = _without_counters(shapes)
    for arguments in options:
        try:
            with torch.device("meta"):
                network = build(name, arguments)
        except Exception:  # an argument that this model does not take
            continue
        own = {key: tuple(t.shape) for key, t in network.state_dict().items()}
        if _without_counters(own) == wanted:
            size = arguments.get("img_size") or _fixed_size(network)
            load = partial(_loaded, name, arguments, tensors)
            yield Proposal(_title(name, arguments, library), arguments["in_chans"], size, (), load)
            return


def _title(name: str, arguments: Mapping[str, Any], library: str) -> str:
    if library or name not in _OUR_WIDTHS or "width" not in arguments:
        extra = [f"{key}={arguments[key]}" for key in ("img_size", "patch_size", "window_size") if key in arguments]
        return f"{library}{name}" + (f" ({', '.join(extra)})" if extra else "")
    if name == "cifar_wrn28_10":
        return f"WRN-{arguments['depth']}-{arguments['width']} (cifar_wrn, {arguments['num_classes']} classes)"
    usual = _OUR_WIDTHS[name]
    width = "" if arguments["width"] == usual else f"width {arguments['width']}, "
    titles = {"cifar_resnet18": "ResNet-18 (CIFAR stem, ", "cifar_preact_resnet18": "PreActResNet-18 (CIFAR stem, "}
    return f"{titles.get(name, f'{name} (')}{width}{arguments['num_classes']} classes)"


def _fixed_size(network: nn.Module) -> int | None:
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int(size[0]) if isinstance(size, tuple) else None


def _loaded(name: str, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    network = build(name, arguments)
    counters = {key: t for key, t in network.state_dict().items() if key.endswith(_COUNTER)}
    network.load_state_dict({**counters, **tensors}, strict=True, assign=True)
    return network


def _our_arguments(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Constructor arguments that would fit, by the names of our networks; {} if first and last layer have other
    names."""
    stem, head = shapes.get("conv1.weight", ()), shapes.get("linear.weight", ())
    if len(stem) != 4 or len(head) != 2:
        return {}
    ends = {"num_classes": head[0], "in_chans": stem[1]}
    if head[0] > 100_000 or stem[0] > 4096 or head[1] > 65536:
        return {}
    blocks = sum(key.startswith("block1.") and key.endswith(".conv1.weight") for key in shapes)
    return {
        "cifar_resnet18": {**ends, "width": stem[0]},
        "cifar_preact_resnet18": {**ends, "width": stem[0]},
        "cifar_wrn28_10": {**ends, "depth": 6 * min(max(blocks, 1), 100) + 4, "width": max(head[1] // 64, 1)},
        "small_cnn": {**ends, "width": stem[0]},
    }


def class_counts(shapes: Shapes) -> list[int]:
    """How many classes a network with these tensors may have, likeliest first: the rows of a head, which has a usual
    name and comes last among its like, or else of any matrix."""
    heads = [name for name, shape in shapes.items() if name.endswith("weight") and _is_matrix(shape)]
    last_first = sorted(heads, key=lambda name: (natural_key(name), name), reverse=True)
    usual = [name for name in last_first if any(map(_HEAD.fullmatch, name.split(".")[:2]))]
    outside = [name for name in usual if name in _TIMM_HEADS]
    return list(dict.fromkeys(shapes[name][0] for name in (*outside, *usual, *last_first)))[:_MAX_CLASS_COUNTS]


_HEAD = re.compile(r"(heads?|fc|classifier|linear|last_linear|logits|output|out|pred|prediction|cls|dense)_?\d*")
_MAX_CLASS_COUNTS = 8


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))


def stem_channels(shapes: Shapes) -> int | None:
    """The channels that a network with these tensors takes, by its first kernel; None without kernels."""
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    return kernels[_stem(kernels)][1] if kernels else None


def _stem(kernels: Shapes) -> str:
    """The name of a network's first kernel, among all: it takes three channels, or has a usual name."""

    def rank(name: str) -> tuple[Any, ...]:
        channels = kernels[name][1]
        is_usual = any(word in name for word in ("stem", "conv1", "conv_1", "patch_embed"))
        return abs(channels - 3) if 1 < channels < 5 else 9, not is_usual, natural_key(name), name

    return min(kernels, key=rank)


def _timm_arguments(shapes: Shapes) -> list[dict[str, Any]]:
    """Constructor arguments in the order in which they are tried: classes and channels, then input and patch size, then
    windows."""
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    classes = class_counts(shapes)
    if not classes or not kernels or classes[0] > 100_000:
        return []
    embedded = shapes.get("patch_embed.proj.weight", ())
    stem = embedded if len(embedded) == 4 else kernels[_stem(kernels)]
    ends = {"num_classes": classes[0], "in_chans": stem[1]}
    tokens = shapes.get("pos_embed", ())
    options: list[dict[str, Any]] = [ends]
    if len(embedded) == 4 and len(tokens) == 3 and embedded[2] == embedded[3]:
        for extra in (1, 0, 2):
            side = round(max(tokens[1] - extra, 0) ** 0.5)
            if side and side * side == tokens[1] - extra:
                options.append({**ends, "img_size": side * embedded[2], "patch_size": embedded[2]})
    elif len(embedded) == 4:
        table = next((s for name, s in shapes.items() if name.endswith("relative_position_bias_table")), ())
        window = round(table[0] ** 0.5 + 1) // 2 if len(table) == 2 else 0
        for image in (32, 64, 224):
            options.append({**ends, "img_size": image, "patch_size": embedded[2]})
            if window:
                options.append({**ends, "img_size": image, "patch_size": embedded[2], "window_size": window})
    elif stem[2] in (1, 2, 4):
        options.append({**ends, "patch_size": stem[2]})
    return options
