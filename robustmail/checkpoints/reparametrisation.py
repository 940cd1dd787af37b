"""Weights that are kept as factors: pruning's masks, weight norm and spectral norm, multiplied as in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["fold_reparametrisations"]


def fold_reparametrisations(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(the tensors with products in place of factors, notes, problems), the latter two in sentences.

    Known are torch.nn.utils' prune, weight_norm and spectral_norm, and the parametrizations of the latter two.
    """
    found, notes, problems = dict(tensors), dict[str, int](), list[str]()
    for name in tensors:
        for kind, factors, product in _ways(name):
            names = [factor for factor in factors if factor in found]
            if len(names) < len(factors) or not all(_is_dense(found[factor]) for factor in names):
                continue
            try:
                folded = product(*(found[factor].detach().float() for factor in names))
            except (RuntimeError, IndexError, ValueError) as error:
                problems.append(f"{name} is {kind} whose factors do not fit ({type(error).__name__})")
                continue
            for factor in names:
                del found[factor]
            found[_base(name)] = folded
            notes[kind] = notes.get(kind, 0) + 1
    rest = [name for name in found if ".parametrizations." in f".{name}"]
    problems += [f"{rest[0]} belongs to a parametrization that robustmail does not know"] if rest else []
    return found, [f"{count} weights are products of the factors of {kind}" for kind, count in notes.items()], problems


Way = tuple[str, tuple[str, ...], Callable[..., Tensor]]


def _ways(name: str) -> list[Way]:
    """What a tensor of this name may be the first factor of: (its kind, names of all factors, their product)."""
    base, end = _base(name), name.removeprefix(_base(name))
    if end == "_orig":
        return [
            ("pruning", (name, f"{base}_mask"), torch.mul),
            ("spectral norm", (name, f"{base}_u", f"{base}_v"), _spectral),
        ]
    if end == "_g":
        return [("weight norm", (name, f"{base}_v"), _weight_norm)]
    if ".parametrizations." in f".{name}" or name.startswith("parametrizations."):
        stem = name.rpartition(".")[0]
        if name.endswith(".original0"):
            return [("weight norm", (name, f"{stem}.original1"), _weight_norm)]
        if name.endswith(".original"):
            return [("spectral norm", (name, f"{stem}.0._u", f"{stem}.0._v"), _spectral)]
    return []


def _base(name: str) -> str:
    """The name of the weight that factors stand for."""
    parent, _, last = name.rpartition(".")
    if last.startswith("original") and "parametrizations" in parent.split("."):
        before, _, weight = parent.rpartition("parametrizations.")
        return f"{before}{weight}"
    for end in ("_orig", "_g"):
        if last.endswith(end):
            return name.removesuffix(end)
    return name


def _weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """g v / |v|, the norm over all dimensions in which g has one number."""
    if g.ndim == v.ndim:
        dims = [i for i in range(v.ndim) if g.shape[i] == 1]
        folded: Tensor = g * v / v.norm(2, dims, keepdim=True) if dims else g * v / v.abs()
        return folded
    if g.numel() != 1:
        raise ValueError("no weight norm")
    whole: Tensor = g * v / v.norm(2)
    return whole


def _spectral(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W / (u W v); W as a matrix whose rows are those of the dimension that u has."""
    for dim in range(weight.ndim):
        matrix = weight.movedim(dim, 0).flatten(1)
        if matrix.shape == (len(u), len(v)):
            return weight / torch.dot(u, torch.mv(matrix, v))
    raise ValueError("no spectral norm")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
