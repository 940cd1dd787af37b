"""Several networks in one flat state dict, and what training keeps beside its network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from robustmail.checkpoints.names import one_line, strip_prefixes, words_of

__all__ = ["AVERAGES", "drop_besides", "networks_of"]

AVERAGES = {"ema", "swa", "avg", "average", "averaged", "shadow", "polyak"}
"""words in names of averages of the weights"""


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


def _groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by the first parts of their names, below what all of them share; names stay whole."""
    bare, _ = strip_prefixes(tensors)
    groups: dict[str, dict[str, Tensor]] = {}
    for short, (name, tensor) in zip(bare, tensors.items(), strict=True):
        groups.setdefault(short.partition(".")[0] if "." in short else "", {})[name] = tensor
    return groups


def networks_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The networks in a flat state dict, by their first names, where there are several: {} for one."""
    ignored = {"attacker", *_BESIDES}  # MadryLab's attacker holds a copy of the network
    groups = {name: part for name, part in _groups(tensors).items() if name and not words_of(name) & ignored}
    networks = {name: part for name, part in groups.items() if _is_whole(part) or _plays_a_role(name, part)}
    return networks if len(networks) > 1 else {}


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a network's first kernel, which takes images, is there, and matrices behind it."""
    kernels, shapes = _kernels(tensors), [tuple(t.shape) for t in _kernels(tensors)]
    first = [shape[1] for shape in shapes if len(shape) == 4]
    takes_images = 3 in first or first.count(1) == 1  # more kernels of one channel are depthwise convolutions
    return takes_images and len(kernels) >= 3 and any(len(shape) == 2 for shape in shapes)


def _plays_a_role(name: str, tensors: Mapping[str, Tensor]) -> bool:
    return bool(words_of(name) & _ROLES) and len(_kernels(tensors)) > 1


def _kernels(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.ndim >= 2]


def drop_besides(tensors: dict[str, Tensor], notes: list[str]) -> None:
    """Remove weights of losses and states of metrics, which training keeps beside its network."""
    groups = _groups(tensors)
    networks = [name for name, part in groups.items() if _kernels(part) and not words_of(name) & _BESIDES]
    for name, part in groups.items():
        is_beside = bool(words_of(name) & _BESIDES) or (
            len(networks) == 1 and name not in networks and _is_vector(part)
        )
        if name and networks and is_beside:
            for key in part:
                del tensors[key]
            first = one_line(next(iter(part)))
            notes.append(f"{first}{f' and {len(part) - 1} more' if len(part) > 1 else ''} left out, beside the network")


def _is_vector(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are no layer's: neither a norm's weight and bias nor a scale."""
    lasts = {name.rpartition(".")[2] for name in tensors}
    words = set().union(*map(words_of, tensors))
    return not ({"weight", "bias"} <= lasts or lasts & {"running_mean", "mean", "std"}
                or words & {"norm", "bn", "ln", "scale", "gamma", "temperature", "temp"})  # fmt: skip
