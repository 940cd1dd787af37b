"""Networks that have a name: ours and timm's, with the knobs that the shapes give."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.checkpoints.infer.layers import Proposal
from robustmail.checkpoints.infer.timm_index import candidates
from robustmail.checkpoints.state_dicts import clean_state_dict

__all__ = ["build", "named", "proposals"]

_OURS = {"cifar_resnet18": 64, "cifar_preact_resnet18": 64, "cifar_wrn28_10": 10, "small_cnn": 32}
"""our networks, one for each class, with the width of that name"""
Shapes = Mapping[str, tuple[int, ...]]
_COUNTER = "num_batches_tracked"
LITTLE = 10**6
"""numbers that cost nothing"""
_TRIED = 5
"""models of timm with the same names that are built and compared"""


def proposals(tensors: Mapping[str, Tensor], size: int | None) -> Iterator[Proposal]:
    """Our registered networks and timm's whose names and shapes are those of the tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if knobs := _our_knobs(shapes):
        for name in _OURS:
            yield from _fitting(name, [knobs[name]], tensors, shapes, "")
    for name in candidates(shapes)[:_TRIED]:
        yield from _fitting(name, _timm_knobs(shapes), tensors, shapes, "timm ")


def build(name: str, knobs: Mapping[str, Any]) -> nn.Module:
    """A network of timm or ours. Raises whatever its constructor raises."""
    import timm

    from robustmail.models import resnet, small, wide_resnet  # noqa: F401  registers ours

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: nn.Module = timm.create_model(name, **knobs)
    return network


def named(name: str, tensors: Mapping[str, Tensor], classes: int, channels: int) -> nn.Module:
    """A fresh network of that name, with the input and patch size, width and depth at which the tensors fit, if any do.

    Raises whatever its constructor raises.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in clean_state_dict(tensors).tensors.items()}
    ends = {"num_classes": classes, "in_chans": channels}
    for knobs in _timm_knobs(shapes):
        if next(_fitting(name, [{**knobs, **ends}], tensors, shapes, ""), None):
            return build(name, {**knobs, **ends})
    try:
        with torch.device("meta"):
            sketch = build(name, ends)
    except Exception:  # some need numbers at once
        return build(name, ends)
    # One that a file's own numbers make huge is compared by its shapes alone, and never allocated.
    return sketch if _numbers(sketch.state_dict()) > 4 * _numbers(tensors) + LITTLE else build(name, ends)


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _fitting(
    name: str, knobs: list[dict[str, Any]], tensors: Mapping[str, Tensor], shapes: Shapes, who: str
) -> Iterator[Proposal]:
    """The first set of knobs with which the network has exactly these names and shapes."""
    wanted = {key: shape for key, shape in shapes.items() if not key.endswith(_COUNTER)}
    for chosen in knobs:
        try:
            with torch.device("meta"):
                network = build(name, chosen)
        except Exception:  # a knob that this model does not have
            continue
        there = {key: tuple(t.shape) for key, t in network.state_dict().items() if not key.endswith(_COUNTER)}
        if there == wanted:
            yield Proposal(
                _title(name, chosen, who), chosen["in_chans"], chosen.get("img_size") or _fixed_size(network), (),
                partial(_loaded, name, chosen, tensors),
            )  # fmt: skip
            return


def _title(name: str, knobs: Mapping[str, Any], who: str) -> str:
    if who or name not in _OURS or "width" not in knobs:
        extra = [f"{key}={knobs[key]}" for key in ("img_size", "patch_size", "window_size") if key in knobs]
        return f"{who}{name}" + (f" ({', '.join(extra)})" if extra else "")
    if name == "cifar_wrn28_10":
        return f"WRN-{knobs['depth']}-{knobs['width']} (cifar_wrn, {knobs['num_classes']} classes)"
    usual = _OURS[name]
    width = "" if knobs["width"] == usual else f"width {knobs['width']}, "
    titles = {"cifar_resnet18": "ResNet-18 (CIFAR stem, ", "cifar_preact_resnet18": "PreActResNet-18 (CIFAR stem, "}
    return f"{titles.get(name, f'{name} (')}{width}{knobs['num_classes']} classes)"


def _fixed_size(network: nn.Module) -> int | None:
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int(size[0]) if isinstance(size, tuple) else None


def _loaded(name: str, knobs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    network = build(name, knobs)
    counters = {key: t for key, t in network.state_dict().items() if key.endswith(_COUNTER)}
    network.load_state_dict({**counters, **tensors}, strict=True, assign=True)
    return network


def _our_knobs(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Width and depth that our networks would need, by name; nothing where the ends are named otherwise."""
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


def _timm_knobs(shapes: Shapes) -> list[dict[str, Any]]:
    """Knobs in the order in which they are tried: classes and channels, then input and patch size, then windows."""
    matrices = [shape for shape in shapes.values() if len(shape) in (2, 4)]
    kernels = [shape for shape in matrices if len(shape) == 4]
    heads = [shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight")]
    if not heads or not kernels or heads[-1][0] > 100_000:
        return []
    embedded = shapes.get("patch_embed.proj.weight", ())
    stem = embedded if len(embedded) == 4 else kernels[0]
    classes = next(
        (shapes[name][0] for name in ("head.fc.weight", "head.weight", "fc.weight", "classifier.weight",
                                      "head.l.weight", "classifier.fc.weight", "last_linear.weight")
         if len(shapes.get(name, ())) == 2),
        heads[-1][0],
    )  # fmt: skip
    ends = {"num_classes": classes, "in_chans": stem[1]}
    tokens = shapes.get("pos_embed", ())
    tries: list[dict[str, Any]] = [ends]
    if len(embedded) == 4 and len(tokens) == 3 and embedded[2] == embedded[3]:
        for extra in (1, 0, 2):
            side = round(max(tokens[1] - extra, 0) ** 0.5)
            if side and side * side == tokens[1] - extra:
                tries.append({**ends, "img_size": side * embedded[2], "patch_size": embedded[2]})
    elif len(embedded) == 4:
        table = next((s for name, s in shapes.items() if name.endswith("relative_position_bias_table")), ())
        window = round(table[0] ** 0.5 + 1) // 2 if len(table) == 2 else 0
        for image in (32, 64, 224):
            tries.append({**ends, "img_size": image, "patch_size": embedded[2]})
            if window:
                tries.append({**ends, "img_size": image, "patch_size": embedded[2], "window_size": window})
    elif stem[2] in (1, 2, 4):
        tries.append({**ends, "patch_size": stem[2]})
    return tries
