"""Two measurements of a training step on a device: `python -m robustmail.bench.plan_measurements graphs --out FILE`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmail.attacks.view import model_view
from robustmail.bench.training import mail_trades, our_step, timed
from robustmail.models.classifier import example_logits
from robustmail.models.cuda_graphs import SWITCH
from robustmail.models.precision import backends
from robustmail.runtime.devices import pick_device
from robustmail.runtime.files import atomic_write_json, make_folder
from robustmail.runtime.provenance import provenance

__all__ = ["compare_graphs", "profile_step"]

STEPS = 10  # of the attack
REPEATS, TOP = 5, 20  # timed steps; operators in the profile


def compare_graphs(model: str, batch: int, device: torch.device) -> dict[str, Any]:
    """A MAIL-TRADES step with and without CUDA graphs: seconds of each repeat, and how far the passes are apart.

    Differences are those of the attacked model's logits and image gradients on one batch, ||a - b|| / ||b||.
    """
    x, y = _batch(batch, device)
    seconds, passes, seen = {}, [], {}
    for name, value in (("graphs", "1"), ("plain", "0")):
        os.environ[SWITCH] = value
        step = our_step(mail_trades(model, STEPS), x, y)
        seen[name] = step.compute.description
        with model_view(step.compute.attack) as attacked, backends():
            passes.append(example_logits(attacked, x))
        step.run()
        seconds[name] = [timed(step.run, device) for _ in range(REPEATS)]
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(*passes, strict=True)]
    return {"seconds": seconds, "logits": apart[0], "gradients": apart[1], "precision": seen}


def profile_step(model: str, batch: int, device: torch.device) -> dict[str, Any]:
    """The operators in which a MAIL-TRADES step spends its time: seconds of the device (of the CPU without one)."""
    from torch.profiler import ProfilerActivity, profile

    step = our_step(mail_trades(model, STEPS), *_batch(batch, device))
    step.run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        taken = timed(step.run, device)
    unit = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -float(getattr(row, unit)))[:TOP]
    operators = [{"name": row.key, "calls": row.count, "seconds": getattr(row, unit) / 1e6} for row in rows]
    return {"seconds": taken, "operators": operators, "precision": step.compute.description}


def _batch(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 32, 32, device=device), torch.arange(n, device=device) % 10


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
