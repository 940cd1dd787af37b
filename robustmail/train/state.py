"""The training state: everything that resuming to the same bits needs, and its files."""

from __future__ import annotations

import csv
import functools
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from robustmail.checkpoints import load_saved
from robustmail.data.dataset import ImageData, Split, hold_out, to_float
from robustmail.errors import RecipeError, RunError, in_brief
from robustmail.fields import describe
from robustmail.models.classifier import Classifier, build, check_forward
from robustmail.models.freezing import freeze, trained_parameters
from robustmail.models.precision import ComputeModels, PrecisionChoice, choose_precision, compute_models
from robustmail.models.timm_model import TimmModel
from robustmail.plugin_calls import call_plugin
from robustmail.recipe import Recipe
from robustmail.records import StepFinished
from robustmail.runtime.devices import pick_device
from robustmail.runtime.distributed import is_main_process, main_process_first, shard_batch, world_size
from robustmail.runtime.files import atomic_write, atomic_write_text, make_folder
from robustmail.runtime.rng import fork_rng, seed_all
from robustmail.runtime.untrusted import check_shape, check_tensors
from robustmail.train.batches import epoch_batches
from robustmail.train.initial_weights import load_initial, open_initial

__all__ = ["State"]

FORMAT = 1
SHAPE = {
    "format": int, "data": str, "epoch": int, "step": int, "sums": {"*": [float]}, "history": [dict], "best": float,
    "best_epoch": int, "threads": int, "precision": str, "processes?": int, "model": dict, "optimizer": dict,
    "average": dict,
}  # fmt: skip
"""what `State.load` requires of state.pt, which may come from anybody"""


@dataclass
class State:
    """A model under training, its data, and its progress.

    epoch, step: the next step to train, both from 0.
    sums: {metric: [sum over images, number of images]} of the current epoch.
    history: one row of metrics.csv per finished epoch.
    ema: the exponential moving average of the weights, if the recipe has one.
    best, best_epoch: the highest robust validation accuracy, and its epoch from 0; -1 before there is one.
    note: about initial weights or resuming, for people.
    init_sha256: SHA-256 of the file of initial weights, if one was read.

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
    ema: ModelEmaV3 | None = None
    folder: Path | None = None
    epoch: int = 0
    step: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    best: float = -1.0
    best_epoch: int = -1
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
            smallest = min(map(len, epoch_batches(len(train.y), recipe.batch, recipe.seed, epoch=0)))
            sample = to_float(train.x[:smallest]).to(device)
            check_forward(model, describe(recipe.model).strip("'"), sample, images.classes)
        optimizer = call_plugin("optimizer", recipe.at(0).optimizer, trained_parameters(model))
        parts = train.to(device), validation.to(device)
        precision = choose_precision(recipe.precision, model, sample)
        ema = _make_ema(model, recipe.ema)
        path = Path(folder) if folder is not None else None
        if path is not None:
            make_folder(path)
        init_sha256 = initial.sha256 if initial else None
        return cls(
            recipe, model, optimizer, images, *parts, device, precision, ema, path, note=note, init_sha256=init_sha256
        )

    @functools.cached_property
    def compute_models(self) -> ComputeModels:
        """The model as the attack and the loss call it, in the chosen precision."""
        n = min(self.recipe.batch, len(self.train.y))
        with shard_batch(n) as rows:
            sample = to_float(self.train.x[:n][rows])
        return compute_models(self.model, self.precision, self.recipe.attack_mode, sample)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated, written and evaluated: the EMA where there is one."""
        return self.model if self.ema is None else self.ema.module

    @functools.cached_property
    def steps(self) -> int:
        """Number of steps in an epoch."""
        return len(epoch_batches(len(self.train.y), self.recipe.batch, seed=0, epoch=0))

    def advance(self) -> None:
        """Count one step as done, and update the EMA."""
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.epoch * self.steps + self.step)

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
            "average": self.ema.module.state_dict() if self.ema else {},
        }  # fmt: skip
        atomic_write(self.folder / "state.pt", lambda path: torch.save(content, path))
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
            check_shape(content, SHAPE)
            if content["format"] != FORMAT:
                raise RunError(str(path), f"has format {content['format']}, this version reads {FORMAT}")
            if content["data"] != self.images.fingerprint:
                raise RunError(
                    str(path), "the data have changed since this run began", "Bring them back, or use --fresh."
                )
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(content["average"])
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
            "epoch": self.epoch, "norm": self.recipe.norm, "source": describe(self.recipe.data),
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

    def dump(self, indices: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Path | None:
        """Write nonfinite.pt, the batch and the model with which `reproduce` fails in the same way; returns its path.

        indices: [B] of the training set. x, y: [B, C, H, W] and [B]. None without a folder.
        """
        if self.folder is None or not is_main_process():
            return None
        content = {
            "epoch": self.epoch, "step": self.step, "indices": indices.cpu(), "x": x.cpu(), "y": y.cpu(),
            "model": self.model.state_dict(), "classes": self.images.classes, "precision": self.precision.name,
        }  # fmt: skip
        path = self.folder / "nonfinite.pt"
        atomic_write(path, lambda temporary: torch.save(content, temporary))
        return path


def _make_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """timm's EMA of the weights; None without a decay. Buffers are copied.

    Update t, from 0, uses the decay min(decay, (1 + t) / (10 + t)): with the whole decay from the start, the EMA of a
    short run would consist of its random initial weights.
    """
    if decay is None:
        return None
    # timm's warm-up of its n-th update, n = t + 1, is 1 - (1 + n / gamma)^-power: the same for gamma 9 and power 1.
    warmup: dict[str, Any] = {"use_warmup": True, "warmup_gamma": 9, "warmup_power": 1, "update_after_step": -1}
    return ModelEmaV3(model, decay, **warmup, exclude_buffers=True)


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
