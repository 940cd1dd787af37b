"""The form of every model in this package: images in [0, 1] -> float32 logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustmail.errors import ModelError, asked_to_stop, did_you_mean, in_brief
from robustmail.functional import precise
from robustmail.models.timm_model import is_in_timm, read_timm_model
from robustmail.step import logits_of, module_mode, restored

__all__ = ["Classifier", "build", "check_name", "is_in_timm", "is_network", "example_logits", "check_forward"]


class Classifier(nn.Module):
    """A network with its normalisation inside: [B, C, H, W] in [0, 1] -> float32 logits [B, classes].

    So eps always means pixels, and attacks and plugins need not care about normalisation, memory layout or precision.
    net: the network, which is moved to channels-last; one that then fails on strides, as `x.view` does, goes on with
    plain strides. normalize: (mean, std), one number per channel or one for all; or None.
    """

    mean: Tensor
    std: Tensor
    memory_format = torch.channels_last
    frozen_norms: tuple[nn.Module, ...] = ()
    """BatchNorms that stay in eval mode, see `freeze`"""

    def __init__(self, net: nn.Module, normalize: tuple[Sequence[float], Sequence[float]] | None = None) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = normalize or ((0.0,), (1.0,))
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes]"""
        if self.memory_format == torch.contiguous_format:
            return precise(logits_of(self.net(self.prepare(x))))
        try:
            return precise(logits_of(self.net(self.prepare(x))))
        except RuntimeError as error:
            if not any(word in str(error) for word in ("view", "stride", "contiguous")):
                raise
        return precise(logits_of(self.use_plain_strides().net(self.prepare(x))))

    def use_plain_strides(self) -> Classifier:
        """Go on with plain strides instead of channels-last, in the network and in its input; returns itself."""
        self.memory_format = torch.contiguous_format
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            tensor.data = _plain(tensor.data)
        return self

    def train(self, mode: bool = True) -> Classifier:
        """As nn.Module's, but `frozen_norms` stay in eval mode."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def prepare(self, x: Tensor) -> Tensor:
        """The input of the network for images x [B, C, H, W] in [0, 1]: normalised, channels-last or plain."""
        if self.normalize is not None:
            x = (x - self.mean) / self.std
        is_plain = self.memory_format == torch.contiguous_format
        return _plain(x) if is_plain else x.contiguous(memory_format=self.memory_format)


def _plain(x: Tensor) -> Tensor:
    """x with plain strides, also where one channel makes both formats contiguous and torch takes it for the other."""
    return x.contiguous() if x.ndim != 4 or x.shape[1] > 1 else x.clone(memory_format=torch.contiguous_format)


def build(
    model: str | Callable[[int, int], nn.Module],
    classes: int,
    channels: int,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Classifier:
    """Build a Classifier with newly initialised weights.

    model: a timm name (our networks are registered there), a name of RobustBench such as WideResNet-34-10, a
    `timm_model`, or a function (classes, channels) -> nn.Module.
    classes: number of logits.
    channels: channels of the images.
    normalize: (mean, std), one number per channel or one for all; or None.

    Raises ModelError for an unknown name, with the nearest one; for a normalisation of another number of channels; or
    if the network's constructor fails.
    """
    if normalize is not None and {len(normalize[0]), len(normalize[1])} - {1, channels}:
        raise ModelError(f"normalize={normalize}", f"needs one mean and one std for each of {channels} channels")
    try:
        return Classifier(_network(model, classes, channels), normalize)
    except ModelError:
        raise
    except BaseException as error:  # a network's constructor may fail in any way
        if asked_to_stop(error):
            raise
        name = model if isinstance(model, str) else getattr(model, "__name__", repr(model))
        wrong = f"cannot be built for {classes} classes and {channels} channels: {type(error).__name__}: {error}"
        raise ModelError(f"model={name}", wrong, "A function is called as model(classes, channels).") from error


def example_logits(network: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes], and the gradient of the sum of their squares, in the shape of x.

    Two forms of a network are compared by them.
    """
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = network(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        return logits.detach(), gradient


def check_forward(model: Classifier, name: str, images: Tensor, classes: int) -> None:
    """Check that the model maps a training batch to logits [B, classes], in train mode.

    model: checked on `images`; its BatchNorm statistics and modes stay unchanged.
    name: the model's name in error messages.
    images: a batch of the training's size, [B, C, H, W] in [0, 1].
    classes: expected number of logits.

    Raises ModelError if the forward pass fails or the logits have another shape.
    """
    size = " x ".join(map(str, images.shape))
    try:
        with torch.no_grad(), module_mode(model, "train"), restored(model.buffers()):
            shape = list(model(images).shape)
    except BaseException as error:
        if asked_to_stop(error):
            raise
        wrong = f"does not take a batch of {size} ({in_brief(error)})"
        todo = "Choose one made for that size, e.g. cifar_resnet18 or small_cnn."
        if hasattr(getattr(model.net, "patch_embed", None), "img_size") and is_in_timm(name):
            side = images.shape[-1]
            todo = f"Write model='timm_model(\"{name}\", img_size={side}, patch_size={max(side // 8, 1)})'."
        raise ModelError(f"model={name}", wrong, todo) from error
    if shape != [len(images), classes]:
        raise ModelError(f"model={name}", f"logits of shape {shape}, expected {[len(images), classes]}")


def _network(model: str | Callable[[int, int], nn.Module], classes: int, channels: int) -> nn.Module:
    if callable(model):
        return model(classes, channels)
    check_name(model)
    if value := read_timm_model(model):
        return value(classes, channels)
    if not is_in_timm(model):
        from robustmail.models.robustbench import architectures

        return architectures(model)[0].build(classes, channels)
    import timm

    network: nn.Module = timm.create_model(model, num_classes=classes, in_chans=channels)
    return network


def is_network(name: str) -> bool:
    """Whether it is the name of a network of timm, ours or RobustBench's, or the text of a `timm_model`.

    Never true for names that are downloaded.
    """
    from robustmail.models.robustbench import architectures

    return is_in_timm(name) or read_timm_model(name) is not None or bool(architectures(name))


def check_name(model: str) -> None:
    """Check that `is_network` is true. Raises ModelError, with the nearest name."""
    import timm

    from robustmail.models import resnet, robustbench, small, wide_resnet

    ours = [*resnet.__all__, *small.__all__, *wide_resnet.__all__]
    if not is_network(model):
        if model.endswith(".py"):
            raise ModelError(f"model={model!r}", "no function of the file named", f"Write {model}:FUNCTION.")
        if nearest := wide_resnet.nearest_size(model):
            wrong = f"depths are 6n + 4, up to {wide_resnet.MAX_DEPTH}, widths 1 to {wide_resnet.MAX_WIDTH}"
            raise ModelError(f"model={model!r}", wrong, f"The nearest is {nearest!r}.")
        near = did_you_mean(model, ours)
        if not near.startswith("Did"):
            near = did_you_mean(model, [*timm.list_models(), *robustbench.NAMES])
        near = near or f"Ours are {', '.join(sorted(ours))}; names of timm and of RobustBench work too."
        raise ModelError(f"model={model!r}", "no such model", near)
