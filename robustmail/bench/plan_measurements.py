"""Two measurements of a training step on a device: `python -m robustmail.bench.plan_measurements graphs --out FILE`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import model_view
from robustmail.data.sources import digits
from robustmail.margins import pm_adv
from robustmail.models.classifier import build, example_logits
from robustmail.models.precision import backends, choose_precision, compute_models
from robustmail.objectives import TRADES
from robustmail.optimizers import SGD
from robustmail.recipe import Recipe
from robustmail.runtime.deferred import DeferredReads, defer_reads
from robustmail.runtime.devices import pick_device
from robustmail.runtime.files import atomic_write_json, make_folder
from robustmail.runtime.provenance import provenance
from robustmail.runtime.rng import fork_rng
from robustmail.train.train_step import train_step
from robustmail.weighters import Sigmoid

__all__ = ["compare_graphs", "profile_step"]

SWITCH = "ROBUSTMAIL_CUDA_GRAPHS"
REPEATS, TOP = 5, 20  # timed steps; operators in the profile


def compare_graphs(model: str, batch: int, device: torch.device) -> dict[str, Any]:
    """A MAIL-TRADES step with and without CUDA graphs: seconds of each repeat, and how far the passes are apart.

    Differences are those of the attacked model's logits and image gradients on one batch, ||a - b|| / ||b||.
    """
    x, y = _batch(batch, device)
    seconds, passes, seen = {}, [], {}
    for name, value in (("graphs", "1"), ("plain", "0")):
        os.environ[SWITCH] = value
        work, view, seen[name] = _step(model, x, y)
        with model_view(view) as attacked, backends():
            passes.append(example_logits(attacked, x))
        work()
        seconds[name] = [_seconds(work, device) for _ in range(REPEATS)]
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(*passes, strict=True)]
    return {"seconds": seconds, "logits": apart[0], "gradients": apart[1], "precision": seen}


def profile_step(model: str, batch: int, device: torch.device) -> dict[str, Any]:
    """The operators in which a MAIL-TRADES step spends its time: seconds of the device (of the CPU without one)."""
    from torch.profiler import ProfilerActivity, profile

    work, _, description = _step(model, *_batch(batch, device))
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        taken = _seconds(work, device)
    unit = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -float(getattr(row, unit)))[:TOP]
    operators = [{"name": row.key, "calls": row.count, "seconds": getattr(row, unit) / 1e6} for row in rows]
    return {"seconds": taken, "operators": operators, "precision": description}


def _step(name: str, x: Tensor, y: Tensor) -> tuple[Callable[[], None], torch.nn.Module, str]:
    """(a training step, the model as attacks see it, how it computes)."""
    with fork_rng():
        torch.manual_seed(0)
        model = build(name, 10, 3).to(x.device)
    recipe = Recipe(
        data=digits(), model=name, attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),
        objective=TRADES(beta=5.0), margin=pm_adv, weighter=Sigmoid(slope=2.0, bias=0.0), epochs=1,
    )  # fmt: skip
    compute = compute_models(model, choose_precision(recipe.precision, model, x), recipe.attack_mode, x)
    now, optimizer = recipe.at(0), SGD()(model.parameters())

    def work() -> None:
        with fork_rng(), backends(), defer_reads(DeferredReads() if x.is_cuda else None):
            train_step(now, model, x, y, (0, 0), optimizer, compute)

    return work, compute.attack, compute.description


def _batch(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 32, 32, device=device), torch.arange(n, device=device) % 10


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure, and write a JSON file with provenance."""
    parser = argparse.ArgumentParser(prog="python -m robustmail.bench.plan_measurements", description=__doc__)
    parser.add_argument("what", choices=["graphs", "profile"])
    parser.add_argument("--model", default="cifar_resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = pick_device(given.device)
    measured = {"graphs": compare_graphs, "profile": profile_step}[given.what](given.model, given.batch, device)
    settings = {"model": given.model, "batch": given.batch}
    make_folder(given.out.parent)
    atomic_write_json(given.out, {"settings": settings, **measured, "provenance": provenance(device)})


if __name__ == "__main__":
    main()
