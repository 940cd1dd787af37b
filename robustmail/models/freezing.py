"""Parameters that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustmail.errors import ModelError, did_you_mean
from robustmail.models.classifier import Classifier

__all__ = ["freeze", "trained_parameters"]

MAX_SHOWN = 4  # names in an error


def freeze(model: Classifier, patterns: Sequence[str]) -> None:
    """Freeze the parameters of a model's network whose names match one of the patterns, as in fnmatch: layer1.*.

    They get no gradient. A BatchNorm whose parameters are all frozen stays in eval mode, so that its running statistics
    stay, too. Names are those of `model.net.named_parameters()`, and case counts.
    Raises ModelError: a pattern that matches nothing, with the nearest name; or nothing is left to train.
    """
    if not patterns:
        return
    named = dict(model.net.named_parameters())
    for pattern in patterns:
        matched = [p for name, p in named.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise ModelError(f"freeze={pattern!r}", "matches no parameter", _nearest(pattern, list(named)))
        for p in matched:
            p.requires_grad_(False)
    if not trained_parameters(model):
        raise ModelError(f"freeze={','.join(patterns)}", "freezes every parameter", "Leave one to train.")
    norms = [module for module in model.net.modules() if isinstance(module, _BatchNorm)]
    model.frozen_norms = tuple(norm for norm in norms if _is_frozen(norm))
    model.train(model.training)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimiser gets: those that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and all of them are frozen."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """What to write instead: the nearest of all names and of the patterns of all modules, and what names look like."""
    parts = [name.split(".") for name in names]
    modules = {".".join([*part[:i], "*"]) for part in parts for i in range(1, len(part))}
    near = did_you_mean(pattern, [*names, *modules])
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{near if near.startswith('Did') else ''} Its names are {', '.join(names[:MAX_SHOWN])}{more}."
