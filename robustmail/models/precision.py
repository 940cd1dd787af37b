"""The precision of training, chosen once per run, and the forms of the model that attacks and the loss then use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustmail.errors import ModelError
from robustmail.models.classifier import Classifier
from robustmail.models.cuda_graphs import use_cuda_graphs
from robustmail.models.folded import Autocast, FoldedModel
from robustmail.models.gathered_conv import has_amx
from robustmail.runtime.devices import keep_freed_memory
from robustmail.step import module_mode

__all__ = ["PrecisionChoice", "ComputeModels", "Precision", "backends", "choose_precision", "flops", "compute_models"]

Precision = Literal["auto", "fp32", "bf16"]
SMALL = 5e6  # FLOPs of one image's forward pass, below which bf16 saves too little time


class PrecisionChoice(NamedTuple):
    """The precision of a run and the reason for it."""

    name: str
    """fp32 or bf16"""
    why: str
    """the reason, as text"""


class ComputeModels(NamedTuple):
    """The forms of the model that a training step calls; both follow the live weights."""

    attack: nn.Module
    """called by attacks"""
    loss: nn.Module
    """called by the loss"""
    description: str
    """description of both, as text"""


def choose_precision(requested: Precision, model: nn.Module, sample: Tensor) -> PrecisionChoice:
    """Return `requested`, or for "auto": bf16 if the device has fast bf16 and the model is large enough, else fp32.

    sample: [B, C, H, W] on the device of the model. The choice is the same each time on the same hardware.
    """
    if requested != "auto":
        return PrecisionChoice(requested, "as asked")
    fast, hardware = _bf16_hardware(sample.device)
    if not fast:
        return PrecisionChoice("fp32", hardware)
    if sample.device.type == "cpu" and any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules()):
        return PrecisionChoice("fp32", "grouped convolutions are slower in bf16 on a CPU")
    if (work := flops(model, sample[:1])) < SMALL:
        return PrecisionChoice("fp32", f"{work / 1e6:.1f} MFLOP an image are too few for bf16 to pay")
    return PrecisionChoice("bf16", hardware)


def compute_models(model: nn.Module, decision: PrecisionChoice, attack_mode: str, sample: Tensor) -> ComputeModels:
    """The model for attacks and for the loss.

    In fp32 both are `model` itself. In bf16 the loss gets it in autocast, and attacks get a FoldedModel; if the model
    cannot be folded, attacks get it in autocast too, and `description` gives the reason.

    model: the live model.
    decision: the precision, as from `choose_precision`.
    attack_mode: "eval" or "train", the mode of the model during attacks.
    sample: a batch of the training's size, [B, C, H, W]; two images of it test the folded model, and on a GPU the
        passes of the whole batch are captured as CUDA graphs.
    """
    settings = "; TF32 off, cuDNN's fastest kernels" if sample.is_cuda else ""  # see `backends`
    keep_freed_memory(sample.device)
    if decision.name == "fp32":
        return ComputeModels(model, model, f"fp32 ({decision.why}){settings}")
    autocast = Autocast(model)
    attack, description = _attack_model(model, autocast, attack_mode, sample)
    return ComputeModels(attack, autocast, f"bf16 ({decision.why}); attacks see {description}{settings}")


def flops(model: nn.Module, x: Tensor) -> int:
    """FLOPs of one forward pass of x in eval mode; a multiplication with its addition counts as two."""
    with torch.no_grad(), module_mode(model, "eval"), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


@contextmanager
def backends() -> Iterator[None]:
    """Context: cuDNN looks for its fastest kernels, and float32 is computed without TF32. No effect on a CPU."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = [(cudnn, "benchmark", True), (cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    if not torch.cuda.is_initialized():
        flags = []
    before = [getattr(backend, name) for backend, name, _ in flags]
    try:
        for backend, name, value in flags:
            setattr(backend, name, value)
        yield
    finally:
        for (backend, name, _), value in zip(flags, before, strict=True):
            setattr(backend, name, value)


def _attack_model(model: nn.Module, autocast: Autocast, attack_mode: str, sample: Tensor) -> tuple[nn.Module, str]:
    if attack_mode == "train":
        return autocast, "the model in autocast (a folded model has no train mode)"
    if not isinstance(model, Classifier):
        return autocast, "the model in autocast (only a Classifier can be folded)"
    try:
        folded = FoldedModel(model, sample[:2])
    except ModelError as error:
        return autocast, f"the model in autocast ({error.who}: {error.wrong})"
    description = "a copy of the model with BatchNorm folded into its convolutions"
    if not use_cuda_graphs(sample.device):
        return folded, description
    try:
        with backends():  # a CUDA graph keeps the kernels that were chosen at its capture
            folded.capture(sample)
    except ModelError as error:
        return folded, f"{description} (no CUDA graphs: {error.wrong})"
    return folded, f"{description}, in CUDA graphs"


def _bf16_hardware(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    if has_amx():
        return True, "AMX"
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return True, "AVX512-BF16"
    return False, "this CPU has no fast bf16"
