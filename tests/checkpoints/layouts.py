"""The layouts in which people keep weights, each around the same network, and what opens them in a process of its own.

`python -m tests.checkpoints.layouts FOLDER` opens every file of a folder and prints its logits' hash as JSON.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.checkpoints import load_strict, open_checkpoint
from robustmail.checkpoints.infer.search import _proposals
from tests.checkpoints import networks as n

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
Tensors = dict[str, Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return n.seasoned(n.ResNet(n.Basic, (4, 8, 8)))


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def other(tensors: Tensors) -> Tensors:
    """A network of the same shapes that nobody should read."""
    return {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def pair(mean: str, std: str) -> Tensors:
    return {mean: torch.tensor(MEAN).view(1, 3, 1, 1), std: torch.tensor(STD).view(1, 3, 1, 1)}


def madry(w: Tensors) -> Tensors:
    return {**pair("module.normalizer.new_mean", "module.normalizer.new_std"),
            **pair("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std"),
            **under("module.model.", w), **under("module.attacker.model.", w)}  # fmt: skip


def is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def averaged(w: Tensors) -> Tensors:
    return {"n_averaged": torch.tensor(7), **under("module.", w)}


FLAT: dict[str, Callable[[Tensors], Tensors]] = {
    "plain": lambda w: w,
    "reversed": lambda w: dict(reversed(w.items())),
    "prefixed": lambda w: under("backbone.", w),
    "data parallel": lambda w: under("module.", w),
    "compiled": lambda w: under("_orig_mod.", w),
    "compiled data parallel": lambda w: under("_orig_mod.module.", w),
    "compiled in Lightning": lambda w: under("model._orig_mod.", w),
    "Lightning with a loss": lambda w: {**under("model._orig_mod.", w), "criterion.weight": torch.ones(10)},
    "Lightning with metrics": lambda w: {**under("net.", w), "val_acc.confmat": torch.zeros(10, 10, dtype=torch.int64),
                                         "train_loss.total": torch.zeros(1)},
    "Lightning with an average": lambda w: {**under("model.", other(w)), "ema_model.n": torch.tensor(1),
                                            **under("ema_model.module.", w)},
    "MadryLab's robustness": madry,
    "MAIR": lambda w: {**pair("mean", "std"), **under("model.", w)},
    "RobustBench": lambda w: {**pair("mu", "sigma"), **w},
    "a sequence of a normalisation and a network": lambda w: {**pair("0.mean", "0.std"), **under("1.", w)},
    "torch's averaged model": averaged,
    "tables and counters": lambda w: {**w, "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
                                      "total_ops": torch.zeros(1), "keep_mask": torch.ones(3, 3, dtype=torch.bool)},
    "float64": lambda w: {k: t.double() if t.is_floating_point() else t for k, t in w.items()},
    "a pruned network": lambda w: {**{k: t for k, t in w.items() if k != "linear.weight"},
                                   "linear.weight_orig": w["linear.weight"],
                                   "linear.weight_mask": torch.ones_like(w["linear.weight"])},
}  # fmt: skip
"""that are one dictionary of tensors, which safetensors can hold too"""

NESTED: dict[str, Callable[[Tensors], Any]] = {
    **{name: lambda w, name=name: {name: w, "epoch": 3} for name in ("state_dict", "model", "net", "weights")},
    "DM-Improves-AT": lambda w: {"unaveraged_model_state_dict": under("module.", other(w)),
                                 "model_state_dict": averaged(w)},
    "timm with args": lambda w: {"arch": "resnet", "state_dict": other(w), "state_dict_ema": w, "metric": 0.5,
                                 "args": argparse.Namespace(lr=0.1), "optimizer": {"state": w, "param_groups": []}},
    **{f"an average called {name}": lambda w, name=name: {"model": other(w), name: w}
       for name in ("ema", "swa_model", "model_avg", "shadow", "ema_state_dict", "netEMA")},
    "an average of parameters": lambda w: {"state_dict": {k: t if is_statistic(k) else t * 2
                                                          for k, t in under("module.", w).items()},
                                           "ema": {k: t for k, t in w.items() if not is_statistic(k)}},
    "a whole module": lambda w: network(),
    "a whole module in a dictionary": lambda w: {"net": nn.DataParallel(network()), "acc": 0.9},
}  # fmt: skip


def write(folder: Path) -> Tensor:
    """Write all layouts into a folder; return the logits of the network."""
    from safetensors.torch import save_file

    net = network()
    weights = dict(net.state_dict())
    for name, layout in {**FLAT, **NESTED}.items():
        torch.save(layout(copy.deepcopy(weights)), folder / f"{name}.pth")
    for name, layout in FLAT.items():
        tensors = {key: tensor.clone() for key, tensor in layout(weights).items()}  # it holds no tensor twice
        save_file(tensors, folder / f"{name}.safetensors")
    with torch.no_grad():
        return net(images())


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(path: Path) -> list[Tensor]:
    """Of the network with the file's weights, and of the likeliest network for its tensors."""
    checkpoint = open_checkpoint(path)
    named = load_strict(checkpoint.raw_tensors, n.ResNet(n.Basic, (4, 8, 8)), str(path))
    inferred = next(iter(_proposals(checkpoint.tensors, 32))).make().eval()
    with torch.no_grad():
        return [named(images()), inferred(images())]


def digests(folder: Path) -> Iterator[str]:
    """Of every file, the name and hashes of its logits as JSON."""
    for path in sorted(folder.iterdir()):
        found = [hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in logits(path)]
        yield json.dumps([path.name, found])


if __name__ == "__main__":
    print("\n".join(digests(Path(sys.argv[1]))))
