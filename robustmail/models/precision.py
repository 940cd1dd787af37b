"""In which precision a run computes, and in which form attacks and the loss then meet the model: decided here, once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustmail.errors import ModelError
from robustmail.models.classifier import Classifier
from robustmail.models.cuda_graphs import enabled
from robustmail.models.folded import Autocast, FoldedModel
from robustmail.step import module_mode

__all__ = ["PrecisionChoice", "ComputeModels", "Precision", "backends", "choose_precision", "flops", "compute_models"]

Precision = Literal["auto", "fp32", "bf16"]
SMALL = 5e6  # FLOPs of one image's forward pass, below which there is too little to save


class PrecisionChoice(NamedTuple):
    """What "auto" has become, or what was asked for, and why."""

    name: str
    """fp32 or bf16"""
    why: str


class ComputeModels(NamedTuple):
    """The model as a training step calls it; both follow the live weights."""

    attack: nn.Module
    loss: nn.Module
    said: str
    """what they are, for people"""


def choose_precision(asked: Precision, model: nn.Module, sample: Tensor) -> PrecisionChoice:
    """bf16 where the device multiplies it faster than fp32 and the model has enough to multiply; else fp32.

    sample: [B, C, H, W] on the device of the model. The answer is the same each time on the same hardware.
    """
    if asked != "auto":
        return PrecisionChoice(asked, "as asked")
    fast, hardware = _bf16_hardware(sample.device)
    if not fast:
        return PrecisionChoice("fp32", hardware)
    if sample.device.type == "cpu" and any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules()):
        return PrecisionChoice("fp32", "grouped convolutions are slower in bf16 on a CPU")
    if (work := flops(model, sample[:1])) < SMALL:
        return PrecisionChoice("fp32", f"{work / 1e6:.1f} MFLOP an image are too few for bf16 to pay")
    return PrecisionChoice("bf16", hardware)


def compute_models(model: nn.Module, decision: PrecisionChoice, attack_mode: str, sample: Tensor) -> ComputeModels:
    """The model for attacks and the loss: in fp32 itself, to the bit; in bf16 a folded twin, and itself in autocast.

    sample: a batch such as will come, [B, C, H, W]: two of it are enough for a twin to be tried on, but a GPU records
    the passes of all.
    Where there can be no twin, attacks see what the loss sees, and `said` gives the reason.
    """
    settings = "; TF32 off, cuDNN's fastest kernels" if sample.is_cuda else ""  # see `backends`
    if decision.name == "fp32":
        return ComputeModels(model, model, f"fp32 ({decision.why}){settings}")
    if sample.device.type == "cpu":
        _keep_freed_memory()
    half = Autocast(model)
    attack, view = _attack_model(model, half, attack_mode, sample)
    return ComputeModels(attack, half, f"bf16 ({decision.why}); attacks see {view}{settings}")


def flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward pass in eval mode; a multiplication with its addition is two."""
    with torch.no_grad(), module_mode(model, "eval"), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


@contextmanager
def backends() -> Iterator[None]:
    """cuDNN looks for its fastest kernels, and float32 means float32, not TF32, inside; nothing on a CPU."""
    flags = [
        (torch.backends.cudnn, "benchmark", True), (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
    ] if torch.cuda.is_initialized() else []  # fmt: skip
    before = [getattr(backend, name) for backend, name, _ in flags]
    try:
        for backend, name, value in flags:
            setattr(backend, name, value)
        yield
    finally:
        for (backend, name, _), value in zip(flags, before, strict=True):
            setattr(backend, name, value)


def _attack_model(model: nn.Module, half: Autocast, attack_mode: str, sample: Tensor) -> tuple[nn.Module, str]:
    if attack_mode == "train":
        return half, "the model in autocast (a twin has no train mode)"
    if not isinstance(model, Classifier):
        return half, "the model in autocast (only a Classifier has a twin)"
    try:
        twin = FoldedModel(model, sample[:2])
    except ModelError as error:
        return half, f"the model in autocast ({error.who} {error.wrong})"
    said = "a twin with BatchNorm folded into its convolutions"
    if not enabled(sample.device):
        return twin, said
    try:
        with backends():  # a recording keeps the kernels that were chosen
            twin.record(sample)
    except ModelError as error:
        return twin, f"{said} (no CUDA graphs: {error.who} {error.wrong})"
    return twin, f"{said}, in CUDA graphs"


def _bf16_hardware(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    for unit, name in {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX512-BF16"}.items():
        if getattr(torch.cpu, unit, lambda: False)():
            return True, name
    return False, "this CPU has no fast bf16"


def _keep_freed_memory() -> None:
    """Tell glibc to keep what was freed for the next batch: else each activation is mapped, zeroed page by page and
    unmapped at every pass. Where arithmetic is slow this gains nothing that can be measured."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
