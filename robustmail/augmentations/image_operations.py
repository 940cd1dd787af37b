"""Operations on images [b, C, H, W] in [0, 1] whose strength differs from image to image.

torchvision's functions take one strength for a whole tensor. What needs none (equalize, autocontrast, grey images,
blurred ones) is taken from torchvision; the rest is a blend or a warp with one number per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from robustmail.runtime.deferred import to_device

__all__ = ["OPERATIONS", "apply_chosen", "take_pixels"]


def take_pixels(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at whole places, and 0 outside of the image: [B, C, H, W] -> [B, C, H, W].

    rows: int64, broadcast to [B, H, W], as are columns; on the device of x.
    """
    _, _, height, width = x.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    example = torch.arange(len(x), device=x.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    taken = x.permute(0, 2, 3, 1)[example, rows, columns]  # [B, H, W, C]
    return taken.where(inside[..., None], 0.0).permute(0, 3, 1, 2)


def _warped(x: Tensor, matrix: Sequence[Tensor | float], shift: Sequence[Tensor | float], at: float) -> Tensor:
    """The nearest pixel at `matrix @ (u, v) - shift`, where (u, v) is the place of a pixel's centre from an origin.

    matrix: a, b, c, d of [[a, b], [c, d]]; shift: right and down, in pixels; each a number or [b]. at: the origin as a
    share of width and height, 0 for the top left corner, 0.5 for the centre.
    """
    _, _, height, width = x.shape
    v = (torch.arange(height, device=x.device) + 0.5 - at * height)[None, :, None]
    u = (torch.arange(width, device=x.device) + 0.5 - at * width)[None, None, :]
    a, b, c, d, right, down = (p[:, None, None] if isinstance(p, Tensor) else p for p in (*matrix, *shift))
    columns, rows = a * u + b * v - right + at * width, c * u + d * v - down + at * height
    return take_pixels(x, rows.floor().long(), columns.floor().long())


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    angle = degrees.deg2rad()  # counter-clockwise
    return _warped(x, (angle.cos(), -angle.sin(), angle.sin(), angle.cos()), (0.0, 0.0), 0.5)


def _blend(degenerate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """PIL's ImageEnhance: factor 0 is the degenerate image, 1 the image itself; factor: [b]."""

    def operation(x: Tensor, factor: Tensor) -> Tensor:
        base, factor = degenerate(x), factor[:, None, None, None]
        return (base + factor * (x - base)).clamp(0, 1)

    return operation


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)[:, None, None, None]  # of bytes, whose lower bits become 0
    return ((x * 255).round() / step).floor() * step / 255


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return x.where(x < threshold[:, None, None, None], 1 - x)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda x, _: x,
    "shear_x": lambda x, slope: _warped(x, (1.0, slope, 0.0, 1.0), (0.0, 0.0), 0.0),
    "shear_y": lambda x, slope: _warped(x, (1.0, 0.0, slope, 1.0), (0.0, 0.0), 0.0),
    "centred_shear_x": lambda x, slope: _warped(x, (1.0, slope, 0.0, 1.0), (0.0, 0.0), 0.5),
    "centred_shear_y": lambda x, slope: _warped(x, (1.0, 0.0, slope, 1.0), (0.0, 0.0), 0.5),
    "translate_x": lambda x, pixels: _warped(x, (1.0, 0.0, 0.0, 1.0), (pixels, 0.0), 0.0),
    "translate_y": lambda x, pixels: _warped(x, (1.0, 0.0, 0.0, 1.0), (0.0, pixels), 0.0),
    "rotate": _rotate,
    "brightness": _blend(torch.zeros_like),
    "color": _blend(lambda x: F.adjust_saturation(x, 0.0)),
    "contrast": _blend(lambda x: F.adjust_contrast(x, 0.0)),
    "sharpness": _blend(lambda x: F.adjust_sharpness(x, 0.0)),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda x, _: F.autocontrast(x),
    "equalize": lambda x, _: F.equalize(x),
    "invert": lambda x, _: 1 - x,
}
"""(images [b, C, H, W], strength [b]) -> images, by name. Strength: a slope, pixels to the right or down, degrees
counter-clockwise, a factor (1 changes nothing), bits that are kept, a threshold; without meaning for the other ones."""


def apply_chosen(x: Tensor, chosen: Sequence[str], strength: Tensor) -> Tensor:
    """Apply to each image the operation chosen for it.

    x: [B, C, H, W] in [0, 1], on any device. chosen: B names of OPERATIONS. strength: [B], on the host.
    """
    out = x.clone()
    for name in sorted(set(chosen) - {"identity"}):
        which = torch.tensor([i for i, other in enumerate(chosen) if other == name])
        rows = to_device(x.device, which)
        out[rows] = OPERATIONS[name](x[rows], to_device(x.device, strength[which].float()))
    return out
