"""robustmail: train networks against adversarial attacks, and decide which examples the training listens to.

All public names are here. Each is imported when it is first used, so `import robustmail` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustmail.attacks.art import art
    from robustmail.attacks.autoattack import AutoAttack
    from robustmail.attacks.constraint_relaxation import CR
    from robustmail.attacks.lm_pgd import LMPGD
    from robustmail.attacks.margin_decomposition import MD
    from robustmail.attacks.pgd import PGD
    from robustmail.attacks.torchattacks import torchattack
    from robustmail.augmentations.geometry import Crop, CropShift, Flip
    from robustmail.augmentations.mixing import CutMix, Cutout, Mixup
    from robustmail.augmentations.policies import IDBH, AutoAugment, RandAugment
    from robustmail.checkpoints import inspect_checkpoint
    from robustmail.config.loader import load_recipe
    from robustmail.data.dataset import ImageData
    from robustmail.data.file_sources import image_folder, npy, npz, parquet, tiny_imagenet
    from robustmail.data.mixed import mixed
    from robustmail.data.sources import (
        cifar10,
        cifar100,
        dataset,
        digits,
        fashion_mnist,
        gtsrb,
        mnist,
        stl10,
        subset,
        svhn,
        torchvision_dataset,
    )
    from robustmail.errors import RobustmailError
    from robustmail.evaluation.data_loading import load_data
    from robustmail.evaluation.evaluator import evaluate
    from robustmail.evaluation.model_loading import load_model
    from robustmail.evaluation.pretrained import from_pretrained
    from robustmail.evaluation.verify import verify
    from robustmail.export import export_model
    from robustmail.margins import (
        energy,
        entropy,
        kappa,
        logit_margin,
        loss_adv,
        lps,
        p_adv,
        pm_adv,
        pm_dif,
        pm_nat,
        target_confidence,
        vulnerability,
    )
    from robustmail.memory import per_class, per_example, per_run, remembers
    from robustmail.models.classifier import Classifier, build
    from robustmail.models.timm_model import timm_model
    from robustmail.objectives import AT, HAT, MART, SOVR, TRADES, ARoW, SelfAdaptive
    from robustmail.optimizers import SGD, torch_optimizer
    from robustmail.perturbations import AWP
    from robustmail.recipe import Recipe
    from robustmail.records import EpochFinished, StepFinished
    from robustmail.schedules import Cosine, Cyclic, OneCycle, Ramp, Stairs, WarmupCosine
    from robustmail.step import Adversarial, Step, Terms, Trace, margin_range
    from robustmail.train.loop import fit, reproduce
    from robustmail.train.state import State
    from robustmail.weighters import Affine, Discrete, Exp, Lowest, MeanOf, Sigmoid, Softmax, Softplus, Tanh

__version__ = "0.2.0"

_NAMES = {  # by module; type checkers read the imports above instead
    "attacks.art": ["art"],
    "attacks.autoattack": ["AutoAttack"],
    "attacks.constraint_relaxation": ["CR"],
    "attacks.lm_pgd": ["LMPGD"],
    "attacks.margin_decomposition": ["MD"],
    "attacks.pgd": ["PGD"],
    "attacks.torchattacks": ["torchattack"],
    "augmentations.geometry": ["Crop", "CropShift", "Flip"],
    "augmentations.mixing": ["CutMix", "Cutout", "Mixup"],
    "augmentations.policies": ["AutoAugment", "IDBH", "RandAugment"],
    "checkpoints": ["inspect_checkpoint"],
    "data.dataset": ["ImageData"],
    "data.file_sources": ["image_folder", "npy", "npz", "parquet", "tiny_imagenet"],
    "data.mixed": ["mixed"],
    "data.sources": [
        "cifar10",
        "cifar100",
        "dataset",
        "digits",
        "fashion_mnist",
        "gtsrb",
        "mnist",
        "stl10",
        "subset",
        "svhn",
        "torchvision_dataset",
    ],
    "errors": ["RobustmailError"],
    "evaluation.data_loading": ["load_data"],
    "evaluation.model_loading": ["load_model"],
    "evaluation.evaluator": ["evaluate"],
    "evaluation.pretrained": ["from_pretrained"],
    "evaluation.verify": ["verify"],
    "export": ["export_model"],
    "margins": [
        "energy",
        "entropy",
        "kappa",
        "logit_margin",
        "loss_adv",
        "lps",
        "p_adv",
        "pm_adv",
        "pm_dif",
        "pm_nat",
        "target_confidence",
        "vulnerability",
    ],
    "memory": ["per_class", "per_example", "per_run", "remembers"],
    "models.classifier": ["Classifier", "build"],
    "models.timm_model": ["timm_model"],
    "objectives": ["AT", "HAT", "MART", "SOVR", "TRADES", "ARoW", "SelfAdaptive"],
    "optimizers": ["SGD", "torch_optimizer"],
    "perturbations": ["AWP"],
    "config.loader": ["load_recipe"],
    "recipe": ["Recipe"],
    "records": ["EpochFinished", "StepFinished"],
    "schedules": ["Cosine", "Cyclic", "OneCycle", "Ramp", "Stairs", "WarmupCosine"],
    "step": ["Adversarial", "Step", "Terms", "Trace", "margin_range"],
    "train.loop": ["fit", "reproduce"],
    "train.state": ["State"],
    "weighters": ["Affine", "Discrete", "Exp", "Lowest", "MeanOf", "Sigmoid", "Softmax", "Softplus", "Tanh"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'robustmail' has no attribute {name!r}")
    return getattr(import_module(f"robustmail.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
