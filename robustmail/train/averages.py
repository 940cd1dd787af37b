"""Averages of the weights: the exponential moving average (EMA) and stochastic weight averaging (SWA)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from robustmail.data.dataset import Split, to_float
from robustmail.recipe import Recipe
from robustmail.runtime.deferred import to_device
from robustmail.runtime.rng import fork_rng, seed_all

__all__ = ["WeightAverages"]


class WeightAverages:
    """The sets of weights of a run: "live", and "ema" and "swa" where the recipe asks for them.

    EMA: updated after every step; timm's ModelEmaV3. Update t, from 0, uses the decay min(ema, (1 + t) / (10 + t)):
    with the whole decay from the start, the average of a short run would consist of its random initial weights.
    BatchNorm's statistics are copied.

    SWA (Izmailov et al. 2018): the plain mean of the weights at the ends of the epochs from `swa` on, torch's
    AveragedModel. Before that it is the live model. BatchNorm's statistics are estimated anew, over all training
    images.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.recipe, self.live = recipe, model
        self.ema: ModelEmaV3 | None = None
        self.swa: AveragedModel | None = None
        if recipe.ema is not None:
            # timm's warm-up of its n-th update, n = t + 1, is 1 - (1 + n / gamma)^-power: ours for gamma 9, power 1.
            warmup: dict[str, Any] = {
                "use_warmup": True, "warmup_gamma": 9, "warmup_power": 1, "update_after_step": -1
            }  # fmt: skip
            self.ema = ModelEmaV3(model, recipe.ema, **warmup, exclude_buffers=True)
        if recipe.swa is not None:
            self.swa = AveragedModel(model)

    def models(self) -> dict[str, nn.Module]:
        """The models by the name of their set of weights, as they are to be validated; "swa" once it has begun."""
        models = {"live": self.live}
        if self.ema is not None:
            models["ema"] = self.ema.module
        if self.swa is not None and self._swa_has_begun:
            models["swa"] = self.swa.module
        return models

    @property
    def kept(self) -> nn.Module:
        """The model with the recipe's set of weights that is kept: written and evaluated."""
        return self.models().get(self.recipe.kept_weights, self.live)

    @property
    def _swa_has_begun(self) -> bool:
        return self.swa is not None and int(self.swa.n_averaged) > 0

    def after_step(self, number: int) -> None:
        """Update the EMA; number: of the step in the run, from 1."""
        if self.ema is not None:
            self.ema.update(self.live, number)

    def after_epoch(self, epoch: int, train: Split) -> None:
        """Take the weights at the end of an epoch, from 0, into the SWA, and estimate its statistics over `train`."""
        if self.swa is None or self.recipe.swa is None or epoch < self.recipe.swa:
            return
        self.swa.update_parameters(self.live)
        if any(isinstance(module, _BatchNorm) for module in self.swa.modules()):
            estimate_batchnorm(self.swa.module, train, self.recipe.batch, self.recipe.seed)

    def changed_by_step(self) -> list[Tensor]:
        """The tensors that `after_step` changes."""
        return [] if self.ema is None else list(self.ema.module.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        """What is saved of the averages, by name."""
        saved: dict[str, Any] = {}
        if self.ema is not None:
            saved["ema"] = self.ema.module.state_dict()
        if self.swa is not None:
            saved["swa"] = self.swa.state_dict()
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what was saved."""
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        if self.swa is not None:
            self.swa.load_state_dict(saved["swa"])


def estimate_batchnorm(model: nn.Module, train: Split, batch: int, seed: int) -> None:
    """Estimate BatchNorm's statistics anew: their means over all training images, in their order, not augmented.

    Every process passes all images, so that the statistics are those of a single process. batch: images in a pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    cudnn = torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False)
    model.train()
    # Not torch's update_bn: it would forget the statistics of frozen layers, too, which stay in eval mode.
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    with fork_rng(), cudnn, torch.no_grad():
        seed_all(seed, "batchnorm")  # dropout draws in these passes
        for x in _batches(train, batch, next(model.parameters()).device):
            model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes:
        module.training = training


def _batches(train: Split, batch: int, device: torch.device) -> Iterator[Tensor]:
    """All training images, [b, C, H, W] in [0, 1], in passes of nearly equal size: BatchNorm refuses a single image."""
    n = len(train.y)
    for rows in torch.arange(n).tensor_split(math.ceil(n / batch)):
        yield to_float(to_device(device, train.x[rows.to(train.x.device)]))
