"""What an evaluation is of: model, data, attacks, eps, seed, shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.data.dataset import tensor_hash
from robustmail.data.image_files import LabelledImages, hash_data
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError, RunError
from robustmail.evaluation.attack_specs import AttackSpec, check_eps, is_built_in, parse_attacks, transferred
from robustmail.evaluation.evaluator import BLOCK, as_floats
from robustmail.evaluation.exact_inference import BatchSizer
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.fields import fingerprint
from robustmail.norms import Norm
from robustmail.step import Attack
from robustmail.text import plural

__all__ = [
    "MAY_DIFFER",
    "EvaluationTask",
    "context_of",
    "spec_differences",
    "attack_differences",
    "check_same",
    "describe_data",
    "fingerprint_and_hashes",
    "shard_of",
]


MAY_DIFFER = ("checkpoint", "data", "data_given", "attacks", "own")  # where files lie, and attacks that are added later


@dataclass
class EvaluationTask:
    """An evaluation to be run: everything that its result depends on.

    subject: the model.
    data: the images and labels, all of them.
    attacks: names or attacks of one's own.
    eps, norm: radius of the ball around each image, in pixels of [0, 1], and the norm in which it is measured.
    seed: of everything that attacks draw.
    shard: (k, of): only the k-th of `of` parts of the images, counted from 1, in whole blocks of BLOCK images.
    batch: images under attack at once; by default what time and memory allow. No result depends on it.
    command: the command line, for provenance.
    training: of a training run's weights: epoch, burn_in, chosen_by, weights (the set: live, ema or swa).
    provenance: plain values for the results' provenance, beside versions, hardware and time.
    transfer: another model; each attack is run on it too, and its examples are judged by `subject`.
    weigh: of a training run, what gives the first images the weights that the run's method would: (model, images, batch
    sizes) -> [n]; empty if nothing can.
    attack_specs: what the attacks stand for.

    Raises RecipeError: an unknown attack or a bad eps. Raises RunError: more shards than blocks of images. Raises
    ModelError: a model to transfer from with other classes.
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
    transfer: LoadedModel | None = None
    weigh: Callable[[nn.Module, LabelledImages, BatchSizer], list[float]] | None = None
    attack_specs: list[AttackSpec] = field(init=False)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        blocks = -(-len(self.data.part.y) // BLOCK)
        if self.shard[1] > blocks:
            raise RunError(f"--shard {self.shard[0]}/{self.shard[1]}",
                           f"{len(self.data.part.y)} images make {plural(blocks, 'block')} of {BLOCK}, "
                           "and a shard has at least one",
                           f"Use {plural(blocks, 'shard')} at most.")  # fmt: skip
        self.attack_specs = parse_attacks(self.attacks, self.eps, self.subject.classes, self.norm)
        if (other := self.transfer) is not None:
            if other.classes != self.subject.classes:
                wrong = f"has {other.classes} classes, {self.subject.name} has {self.subject.classes}"
                raise ModelError(f"--transfer {other.name}", wrong, "Transfer from a model of the same classes.")
            self.attack_specs += transferred(self.attack_specs, other.model, other.name, other.fingerprint)

    @cached_property
    def index(self) -> Tensor:
        """Places of this shard's images in the data set, [N]."""
        index = torch.arange(len(self.data.part.y))
        k, of = self.shard
        return index[(index // BLOCK) % of == k - 1]

    @cached_property
    def part(self) -> LabelledImages:
        """This shard's images and labels."""
        return self.data.part.take(self.index)

    @property
    def image_hashes(self) -> list[str]:
        """Hashes of this shard's images, [N], as in the rows of the ledger."""
        return [self._hashes[1][i] for i in self.index.tolist()]

    @property
    def data_info(self) -> dict[str, Any]:
        """What results.json has on the images."""
        return describe_data(self.data, self.subject.classes, self._hashes[0])

    @cached_property
    def _hashes(self) -> tuple[str, list[str]]:
        return fingerprint_and_hashes(self.data.part)

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the evaluation, in plain values."""
        custom = [spec for spec in self.attack_specs if not is_built_in(spec.name)]
        own = {spec.name: fingerprint(attack) for spec in custom for attack in spec.stages.values()}
        return {
            **self.subject.spec, "data": self.data.name, "data_given": self.data.given,
            "attacks": [spec.name for spec in self.attack_specs],
            "own": own, "eps": self.eps, "norm": self.norm, "n": len(self.data.part.y), "seed": self.seed,
            **({"preprocess": asdict(preprocess)} if (preprocess := self.data.preprocess) else {}),
        }  # fmt: skip

    @property
    def context(self) -> str:
        """What the seal of each row covers besides the row: see `context_of`."""
        return context_of(self.subject.fingerprint, self.spec)


def context_of(fingerprint: str, spec: dict[str, Any]) -> str:
    """Weights, eps, norm, n and seed as text: a row of the ledger is only valid together with them."""
    return f"{fingerprint}|{spec['eps']!r}|{spec['norm']}|{spec['n']}|{spec['seed']}"


def check_same(stored: dict[str, Any], wanted: dict[str, Any], folder: Path, shard: bool = False) -> None:
    """Refuse to mix two evaluations, or, if `shard`, two shards of one.

    stored: results in `folder`. wanted: the same keys of the evaluation that is run. Raises RunError: they differ.
    """
    differences = spec_differences(stored, wanted)
    if shard and stored["shard"] != wanted["shard"]:
        differences.append(f"shard: {stored['shard']} there, {wanted['shard']} here")
    if differences:
        raise RunError(str(folder), f"holds another evaluation ({'; '.join(differences[:4])})",
                       "Pass another --out, or --fresh to begin anew.")  # fmt: skip


def spec_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What tells two evaluations apart, in words: their `spec`, and the fingerprints of their `weights` and `data`."""
    first, second = stored["spec"], wanted["spec"]
    keys = [key for key in {**first, **second} if key not in MAY_DIFFER and first.get(key) != second.get(key)]
    lines = [f"{key}: {_as_text(first.get(key))} there, {_as_text(second.get(key))} here" for key in keys]
    lines += [f"attack {name}: {a} there, {b} here" for name, a, b in attack_differences(first, second)]
    return lines + [f"other {k}" for k in ("weights", "data") if stored[k]["fingerprint"] != wanted[k]["fingerprint"]]


def attack_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, settings in the first spec, settings in the second) of each attack of one's own with the same name in two
    specs and other settings."""
    first, second = stored.get("own", {}), wanted.get("own", {})
    return [(name, first[name], second[name]) for name in first if second.get(name, first[name]) != first[name]]


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def shard_of(task: EvaluationTask) -> list[int] | None:
    """[k, of] as results.json has it; None for a whole evaluation."""
    return None if task.shard == (1, 1) else list(task.shard)


def fingerprint_and_hashes(part: LabelledImages) -> tuple[str, list[str]]:
    """(the fingerprint of a data set, the hash of each of its images [C, H, W] as floats), in one pass over them."""
    hashes: list[str] = []
    return hash_data(part, lambda images: hashes.extend(map(tensor_hash, as_floats(images)))), hashes


def describe_data(data: TestSet, classes: int, fingerprint: str) -> dict[str, Any]:
    """What results.json has on the images: name, shape, fingerprint, class names; classes: of the model."""
    names = None if data.class_names is None else list(data.class_names)
    return {"name": data.name, "classes": classes, "class_names": names, "shape": list(data.part.x.shape[1:]),
            "fingerprint": fingerprint}  # fmt: skip
