"""What an evaluation is of: model, data, attacks, budget, seed, shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmail.data.dataset import Split, data_fingerprint, tensor_hash
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.attack_specs import AttackSpec, check_eps, is_built_in
from robustmail.evaluation.evaluator import BLOCK, as_floats, parse_attacks
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.fields import fingerprint
from robustmail.norms import Norm
from robustmail.step import Attack
from robustmail.text import plural

__all__ = ["MAY_DIFFER", "EvaluationTask", "context_of", "spec_differences", "attack_differences", "describe_data"]


MAY_DIFFER = ("checkpoint", "data", "data_given", "attacks", "own")  # where files lie, and attacks that are added later


@dataclass
class EvaluationTask:
    """What to evaluate, on what, and with what: everything that a result depends on.

    data: the images, n of them. shard: (k, of), the k-th of so many parts, counted from 1; whole blocks of images.
    training: of the weights of a training run, which they are: epoch, burn_in, chosen_by. provenance: plain values for
    the results' provenance beside versions, hardware and time.
    """

    subject: LoadedModel
    data: TestSet
    attacks: tuple[str | Attack, ...]
    eps: float
    norm: Norm = "linf"
    seed: int = 0
    shard: tuple[int, int] = (1, 1)
    batch: int | None = None
    command: str = ""
    training: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    plans: list[AttackSpec] = field(init=False)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        blocks = -(-len(self.data.part.y) // BLOCK)
        if self.shard[1] > blocks:
            raise RunError(f"--shard {self.shard[0]}/{self.shard[1]}",
                           f"{len(self.data.part.y)} images make {plural(blocks, 'block')} of {BLOCK}, "
                           "and a shard has at least one",
                           f"Use {plural(blocks, 'shard')} at most.")  # fmt: skip
        self.plans = parse_attacks(self.attacks, self.eps, self.subject.classes, self.norm)

    @cached_property
    def index(self) -> Tensor:
        """Places in the data set of this shard's images."""
        index = torch.arange(len(self.data.part.y))
        k, of = self.shard
        return index[(index // BLOCK) % of == k - 1]

    @cached_property
    def part(self) -> Split:
        """This shard's images."""
        return Split(self.data.part.x[self.index], self.data.part.y[self.index])

    @cached_property
    def hashes(self) -> list[str]:
        """Of each of this shard's images, as rows of the ledger say it."""
        return [tensor_hash(as_floats(x)) for x in self.part.x]

    @cached_property
    def told(self) -> dict[str, Any]:
        """What the results say of the images."""
        return describe_data(self.data, self.subject.classes)

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the evaluation, in plain values."""
        return {
            **self.subject.described, "data": self.data.name, "data_given": self.data.given,
            "attacks": [what.name for what in self.plans],
            "own": {w.name: fingerprint(a) for w in self.plans if not is_built_in(w.name) for a in w.stages.values()},
            "eps": self.eps, "norm": self.norm, "n": len(self.data.part.y), "seed": self.seed,
        }  # fmt: skip

    @property
    def context(self) -> str:
        """What every row's seal covers besides the row."""
        return context_of(self.subject.fingerprint, self.spec)


def context_of(fingerprint: str, spec: dict[str, Any]) -> str:
    """The weights and the budget, which no row may be separated from."""
    return f"{fingerprint}|{spec['eps']!r}|{spec['norm']}|{spec['n']}|{spec['seed']}"


def _same(there: dict[str, Any], here: dict[str, Any], folder: Path, shard: bool = False) -> None:
    """Refuse to mix two evaluations (raises RunError naming what differs); `shard`: nor two shards of one."""
    said = spec_differences(there, here)
    if shard and there["shard"] != here["shard"]:
        said.append(f"shard: {there['shard']} there, {here['shard']} here")
    if said:
        raise RunError(str(folder), f"holds another evaluation ({'; '.join(said[:4])})",
                       "Pass another --out, or --fresh to begin anew.")  # fmt: skip


def spec_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What tells two measurements apart: their `spec`, and the fingerprints of `weights` and `data`."""
    ours, theirs = here["spec"], there["spec"]
    differ = [k for k in {**theirs, **ours} if k not in MAY_DIFFER and theirs.get(k) != ours.get(k)]
    said = [f"{k}: {_plain(theirs.get(k))} there, {_plain(ours.get(k))} here" for k in differ]
    said += [f"attack {name}: {one} there, {other} here" for name, one, other in attack_differences(theirs, ours)]
    return said + [f"other {w}" for w in ("weights", "data") if there[w]["fingerprint"] != here[w]["fingerprint"]]


def attack_differences(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, what it is there, what it is here) of every attack that has one name in two specs and is not the same."""
    first, second = there.get("own", {}), here.get("own", {})
    return [(name, first[name], second[name]) for name in first if second.get(name, first[name]) != first[name]]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _shard(task: EvaluationTask) -> list[int] | None:
    return None if task.shard == (1, 1) else list(task.shard)


def describe_data(data: TestSet, classes: int) -> dict[str, Any]:
    """What the results say of the images; `classes`: of the model."""
    names = None if data.class_names is None else list(data.class_names)
    return {"name": data.name, "classes": classes, "class_names": names, "shape": list(data.part.x.shape[1:]),
            "fingerprint": data_fingerprint(data.part)}  # fmt: skip
