"""The training state: everything that resuming to the same bits needs, and its files."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robustmail.checkpoints import load_saved, save
from robustmail.data.dataset import ImageData, Split, hold_out, to_float
from robustmail.data.mixed import tested_source
from robustmail.errors import ModelError, RecipeError, RunError, in_brief
from robustmail.evaluation.exact_inference import is_out_of_memory
from robustmail.fields import describe
from robustmail.models.classifier import Classifier, build, check_forward
from robustmail.models.freezing import freeze, trained_parameters
from robustmail.models.precision import ComputeModels, PrecisionChoice, choose_precision, compute_models
from robustmail.models.timm_model import TimmModel
from robustmail.plugin_calls import call_plugin
from robustmail.recipe import Recipe
from robustmail.records import StepFinished
from robustmail.runtime.deferred import to_device
from robustmail.runtime.devices import pick_device
from robustmail.runtime.distributed import (
    is_main_process,
    main_process_first,
    micro_batch_rows,
    shard_batch,
    world_size,
)
from robustmail.runtime.files import atomic_write, atomic_write_text, make_folder
from robustmail.runtime.rng import fork_rng, seed_all
from robustmail.runtime.untrusted import check_shape, check_tensors
from robustmail.step import Context
from robustmail.train.averages import WeightAverages
from robustmail.train.batches import Batch, epoch_batches
from robustmail.train.initial_weights import load_initial, open_initial
from robustmail.train.memory import MemoryTables
from robustmail.train.teacher import Teacher, open_teacher

__all__ = ["State", "kept_epoch_name", "kept_epochs", "micro_batches"]

FORMAT = 2
SHAPE = {
    "format": int, "data": str, "epoch": int, "step": int, "sums": {"*": [float]}, "history": [dict], "best": float,
    "best_epoch": int, "threads": int, "precision": str, "processes?": int, "model": dict, "optimizer": dict,
    "averages": {"*": dict}, "accumulate?": int, "memory?": dict,
}  # fmt: skip
"""what `State.load` requires of state.pt, which may come from anybody"""


@dataclass
class State:
    """A model under training, its data, and its progress.

    epoch, step: the next step to train, both from 0.
    sums: {metric: [sum over images, number of images]} of the current epoch.
    history: one row of metrics.csv per finished epoch.
    averages: the averages of the weights that the recipe asks for.
    memory: what plugins remember.
    teacher: the second network, if the recipe has one.
    best, best_epoch: the highest robust validation accuracy, and its epoch from 0; -1 before there is one.
    note: about initial weights or resuming, for people.
    init_sha256: SHA-256 of the file of initial weights, if one was read.
    accumulate: number of micro-batches of a whole batch: the recipe's, or more since memory ran out.

    No generator is stored: all randomness is a function of (seed, epoch, step).
    """

    recipe: Recipe
    model: Classifier
    optimizer: torch.optim.Optimizer
    images: ImageData
    train: Split
    validation: Split
    device: torch.device
    precision: PrecisionChoice
    averages: WeightAverages
    memory: MemoryTables
    teacher: Teacher | None = None
    folder: Path | None = None
    epoch: int = 0
    step: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    best: float = -1.0
    best_epoch: int = -1
    accumulate: int = 1
    save_every: float = 30.0
    """seconds between two saves within an epoch; without influence on results"""
    saved_at: float = field(default_factory=time.monotonic)
    init_sha256: str | None = None

    @classmethod
    def fresh(cls, recipe: Recipe, folder: str | Path | None = None, read_init: bool = True) -> State:
        """The state before the first step: data loaded, model built, both on the device.

        folder: where state and weights are saved, created if missing; None: nowhere. read_init: read the file of the
        recipe's `init`; not needed where `load` follows. Raises DeviceError, DataError or ModelError, before anything
        is written.
        """
        device = pick_device(recipe.device)
        initial = open_initial(recipe.init) if read_init and recipe.init is not None else None
        with main_process_first():
            images = call_plugin("data", recipe.data)
        if not isinstance(images, ImageData):
            raise RecipeError(f"data={describe(recipe.data)}", f"returned {type(images).__name__}, not ImageData")
        train, validation = hold_out(images, recipe.seed)
        with fork_rng():
            seed_all(recipe.seed, "init")
            model = build(recipe.model, images.classes, images.shape[0], recipe.normalize)
            note = load_initial(model, initial, recipe.init or "", recipe.model) if initial else ""
            freeze(model, recipe.freeze)
            model.to(device)
            order = epoch_batches(len(train.y), recipe.batch, recipe.seed, epoch=0, extra=images.extra)
            smallest = min(map(len, order))
            smallest //= micro_batches(recipe.batch, recipe.accumulate, smallest)
            sample = to_float(train.x[:smallest]).to(device)
            _check_forward(recipe, model, sample, images.classes)
        optimizer = call_plugin("optimizer", recipe.at(0).optimizer, trained_parameters(model))
        parts = train.to(device), validation.to(device)
        precision = choose_precision(recipe.precision, model, sample)
        averages = WeightAverages(recipe, model)
        labels = [train.y, *(part.y for part in (images.extra.parts if images.extra else ()))]
        memory = MemoryTables(recipe.memory, labels, images.classes, device)
        teacher = open_teacher(recipe.teacher, images, validation, device, averages) if recipe.teacher else None
        note = ". ".join(filter(None, (note, teacher.note if teacher else "")))
        path = Path(folder) if folder is not None else None
        if path is not None:
            make_folder(path)
        return cls(
            recipe, model, optimizer, images, *parts, device, precision, averages, memory, teacher, path,
            note=note, init_sha256=initial.sha256 if initial else None, accumulate=recipe.accumulate,
        )  # fmt: skip

    @functools.cached_property
    def compute_models(self) -> ComputeModels:
        """The model as the attack and the loss call it, in the chosen precision."""
        n = min(self.recipe.batch, len(self.train.y))
        with shard_batch(n, self.micro_batches(n)) as rows:
            first = micro_batch_rows(n)[0]
            sample = to_float(self.train.x[:n][rows][first])
        return compute_models(self.model, self.precision, self.recipe.attack_mode, sample)

    @property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the files that the recipe names, {"init.sha256": ...}."""
        hashes = {"init": self.init_sha256, "teacher": self.teacher.sha256 if self.teacher else None}
        return {f"{name}.sha256": value for name, value in hashes.items() if value}

    def micro_batches(self, n: int) -> int:
        """In how many micro-batches a batch of n images is processed."""
        return micro_batches(self.recipe.batch, self.accumulate, n)

    def context(self, indices: torch.Tensor, y: torch.Tensor) -> Context:
        """What the next step knows beside its images; indices: [B] of the training set, on the host; y: [B]."""
        index = to_device(self.device, indices)
        rows = self.memory.rows(indices, y)
        teacher = self.teacher.logits if self.teacher else None
        return Context(index, self.epoch, self.recipe.epochs, self.memory.declared, rows, teacher)

    @property
    def memory_note(self) -> str:
        """What changed since memory ran out, for people; "" if it never did."""
        if self.accumulate == self.recipe.accumulate:
            return ""
        note = f"memory ran out, so batches are processed with accumulate={self.accumulate}"
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            note += "; BatchNorm has statistics of its own in each micro-batch, so the numbers are others"
        return note

    @property
    def eval_model(self) -> nn.Module:
        """The model that is written and evaluated, with the set of weights that the recipe keeps."""
        return self.averages.kept

    @functools.cached_property
    def steps(self) -> int:
        """Number of steps in an epoch."""
        return len(epoch_batches(len(self.train.y), self.recipe.batch, seed=0, epoch=0, extra=self.images.extra))

    def advance(self) -> None:
        """Count one step as done, and update the EMA."""
        self.step += 1
        self.averages.after_step(self.epoch * self.steps + self.step)

    def add_metrics(self, finished: StepFinished) -> None:
        """Add the metrics of one step to the epoch's sums, weighted by its images."""
        for name, value in _metrics(finished).items():
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0] += value * finished.images
            total[1] += finished.images

    def save(self) -> None:
        """Write state.pt and metrics.csv atomically; does nothing without a folder, and on ranks other than 0."""
        self.saved_at = time.monotonic()
        if self.folder is None or not is_main_process():
            return
        content = {
            "format": FORMAT, "data": self.images.fingerprint,
            "epoch": self.epoch, "step": self.step, "sums": self.sums, "history": self.history,
            "best": self.best, "best_epoch": self.best_epoch, "threads": torch.get_num_threads(),
            "precision": self.precision.name, "processes": world_size(),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "averages": self.averages.state_dict(), "accumulate": self.accumulate,
            "memory": self.memory.state_dict(),
        }  # fmt: skip
        save(content, self.folder / "state.pt")
        if self.step == 0:  # rows are added at the end of an epoch
            self._write_metrics()

    def _write_metrics(self) -> None:
        if is_main_process():
            atomic_write_text(_folder(self) / "metrics.csv", _csv(self.history))

    @property
    def should_save(self) -> bool:
        """True if the last save is longer ago than `save_every`."""
        return time.monotonic() - self.saved_at >= self.save_every

    def load(self) -> None:
        """Go on from state.pt.

        Raises RunError if it is damaged or the data are not the ones it was trained on.
        """
        path = _folder(self) / "state.pt"
        try:
            content = load_saved(path, self.device)
            check_shape(content, {"format": int})
            if content["format"] != FORMAT:
                raise RunError(str(path), f"has format {content['format']}, this version reads {FORMAT}")
            check_shape(content, SHAPE)
            if content["data"] != self.images.fingerprint:
                raise RunError(
                    str(path), "the data have changed since this run began", "Bring them back, or use --fresh."
                )
            if not 1 <= (accumulate := content.get("accumulate", 1)) <= self.recipe.batch:
                raise ValueError(f"accumulate={accumulate}")
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.averages.load_state_dict(content["averages"])
            in_burn_in = content["epoch"] <= self.recipe.burn_in
            self.memory.load_state_dict(content.get("memory", {}), in_burn_in=in_burn_in)
        except RunError:
            raise
        except Exception as error:  # a damaged file fails in a dozen ways
            wrong = f"damaged ({in_brief(error)})"
            raise RunError(str(path), wrong, "Begin anew with --fresh --yes.") from error
        if content["threads"] != torch.get_num_threads() and self.device.type == "cpu":
            self.note = f"begun with {content['threads']} threads, so the bits may differ from a run without a break"
        if (before := content.get("processes", 1)) != world_size():
            self.note = (
                f"begun in {before} processes, now {world_size()}: the last bits differ from a run without a break"
            )
        if content["precision"] != self.precision.name:
            self.precision = PrecisionChoice(content["precision"], "as this run began")
        for name in ("epoch", "step", "sums", "history", "best", "best_epoch"):
            setattr(self, name, content[name])
        self.accumulate = accumulate
        self.note = ". ".join(filter(None, (self.note, self.memory_note)))
        self._write_metrics()  # after a kill between the two writes it is one epoch behind

    def write_weights(self, name: str) -> None:
        """Write NAME.safetensors: the weights of `eval_model`, and what is needed to use them. Needs a folder."""
        if self.folder is None or not is_main_process():
            return
        weights = {key: value.detach().cpu().contiguous() for key, value in self.eval_model.state_dict().items()}
        facts = {
            "model": _recorded_name(self.recipe.model),
            "classes": self.images.classes, "channels": self.images.shape[0], "shape": list(self.images.shape),
            "data": self.images.name, "normalize": self.recipe.normalize, "eps": self.recipe.budget,
            "epoch": self.epoch, "norm": self.recipe.norm, "source": describe(tested_source(self.recipe.data)),
        }  # fmt: skip
        metadata = {"robustmail": json.dumps(facts)}  # one key: safetensors writes several in random order
        atomic_write(self.folder / f"{name}.safetensors", lambda path: save_file(weights, path, metadata))

    def read_weights(self, name: str) -> None:
        """Load NAME.safetensors into `eval_model`. Raises RunError: missing, damaged or of another network."""
        if self.folder is None:
            return
        path = self.folder / f"{name}.safetensors"
        try:
            check_tensors(path)
            self.eval_model.load_state_dict(load_file(path, device=str(self.device)))
        except Exception as error:  # missing, damaged, or of another network
            wrong = f"cannot be read ({in_brief(error)})"
            raise RunError(str(path), wrong, "Begin anew with --fresh --yes.") from error

    def dump(self, indices: torch.Tensor, batch: Batch) -> Path | None:
        """Write nonfinite.pt, the batch and the model with which `reproduce` fails in the same way; returns its path.

        indices: [B] of the training set, of the batch's images; those from its number of images on, `training_images`,
        are extra images. None without a folder.
        """
        if self.folder is None or not is_main_process():
            return None
        content = {
            "epoch": self.epoch, "step": self.step, "indices": indices.cpu(), "x": batch.x.cpu(), "y": batch.y.cpu(),
            "targets": None if batch.targets is None else batch.targets.cpu(),
            "model": self.model.state_dict(), "classes": self.images.classes, "precision": self.precision.name,
            "training_images": len(self.train.y), "accumulate": self.accumulate,
            "memory": {name: rows.cpu() for name, rows in self.memory.rows(indices, batch.y).items()},
        }  # fmt: skip
        path = self.folder / "nonfinite.pt"
        save(content, path)
        return path


def kept_epoch_name(epoch: int) -> str:
    """The stem of the file with the weights of an epoch, counted from 1 as on screen: epoch-0010."""
    return f"epoch-{epoch:04d}"


def micro_batches(batch: int, accumulate: int, n: int) -> int:
    """In how many micro-batches n images are processed: `accumulate` of them if n = batch, fewer if n is smaller."""
    return -(-n * accumulate // batch)


def _check_forward(recipe: Recipe, model: Classifier, sample: torch.Tensor, classes: int) -> None:
    """`check_forward` on as many of these images as fit into memory."""
    while True:
        try:
            check_forward(model, describe(recipe.model).strip("'"), sample, classes)
            return
        except ModelError as error:
            if not is_out_of_memory(error):
                raise
            if len(sample) == 1:
                wrong = f"out of memory with one image ({in_brief(error.__cause__ or error)})"
                raise ModelError(error.who, wrong, "Use a smaller model, or a device with more memory.") from error
        sample = sample[: len(sample) // 2]


def kept_epochs(folder: Path) -> dict[int, str]:
    """The files of kept epochs in a run's folder, by epoch, counted from 1."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # no folder, or none that can be read
        names = []
    found = [(match, name) for name in sorted(names) if (match := re.fullmatch(r"epoch-(\d{4,})\.safetensors", name))]
    return {int(match[1]): name for match, name in found}


def _recorded_name(model: Any) -> str:
    """What a file of weights says of its network: a name, the text of a `timm_model`, or a function of the recipe."""
    if isinstance(model, TimmModel):
        return model.text
    return model if isinstance(model, str) else f"recipe.py:{describe(model)}"


def _folder(state: State) -> Path:
    assert state.folder is not None
    return state.folder


def _metrics(step: StepFinished) -> dict[str, float]:
    weights = step.weights
    metrics = {"loss": step.loss, "weighted": step.weighted, "plain": step.plain, "adv": step.adv, "nat": step.nat}
    if weights:
        metrics |= {"ess": weights.ess, "top": weights.top, "right": weights.right, "wrong": weights.wrong}
    return {name: value for name, value in metrics.items() if value is not None}


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
