"""The policies of AutoAugment and the strengths of its operations and of RandAugment's."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CIFAR10", "RAND_AUGMENT", "SVHN", "Choice", "policy_strength"]

RAND_AUGMENT = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""RandAugment's operations, by their names in image_operations.OPERATIONS"""


class Choice(NamedTuple):
    """An operation of a policy."""

    name: str
    p: float
    """probability that it is applied"""
    level: float
    """share of the largest strength, in [0, 1]"""


def policy_strength(name: str, level: float, sign: int, size: tuple[int, int]) -> float:
    """The strength of an operation in AutoAugment and RandAugment, as torchvision has it.

    name: of the operation.
    level: share of the largest strength, in [0, 1].
    sign: 1 or -1, for operations that have a direction.
    size: (height, width) of the image, in pixels.
    """
    if name in ("translate_x", "translate_y"):
        return float(sign * int(150 / 331 * size[name == "translate_x"] * level))
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1 + sign * 0.9 * level
    largest = {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0}
    if name in largest:
        return sign * largest[name] * level
    return {"posterize": float(round(8 - 4 * level)), "solarize": 1 - level}.get(name, 0.0)


def _policy(text: str) -> tuple[tuple[Choice, Choice], ...]:
    """A line of the text is a pair; each of the two is a name, a probability and a level in ninths."""

    def choice(words: str) -> Choice:
        name, p, ninths = words.split()
        return Choice(name, float(p), int(ninths) / 9)

    lines = (line.split(",") for line in text.strip().splitlines())
    return tuple((choice(first), choice(second)) for first, second in lines)


CIFAR10 = _policy("""
    invert 0.1 0, contrast 0.2 6
    rotate 0.7 2, translate_x 0.3 9
    sharpness 0.8 1, sharpness 0.9 3
    shear_y 0.5 8, translate_y 0.7 9
    autocontrast 0.5 0, equalize 0.9 0
    shear_y 0.2 7, posterize 0.3 7
    color 0.4 3, brightness 0.6 7
    sharpness 0.3 9, brightness 0.7 9
    equalize 0.6 0, equalize 0.5 0
    contrast 0.6 7, sharpness 0.6 5
    color 0.7 7, translate_x 0.5 8
    equalize 0.3 0, autocontrast 0.4 0
    translate_y 0.4 3, sharpness 0.2 6
    brightness 0.9 6, color 0.2 8
    solarize 0.5 2, invert 0 0
    equalize 0.2 0, autocontrast 0.6 0
    equalize 0.2 0, equalize 0.6 0
    color 0.9 9, equalize 0.6 0
    autocontrast 0.8 0, solarize 0.2 8
    brightness 0.1 3, color 0.7 0
    solarize 0.4 5, autocontrast 0.9 0
    translate_y 0.9 9, translate_y 0.7 9
    autocontrast 0.9 0, solarize 0.8 3
    equalize 0.8 0, invert 0.1 0
    translate_y 0.7 9, autocontrast 0.9 0
""")
"""The 25 pairs that were found on CIFAR-10 (Cubuk et al. 2019)"""

SVHN = _policy("""
    shear_x 0.9 4, invert 0.2 0
    shear_y 0.9 8, invert 0.7 0
    equalize 0.6 0, solarize 0.6 6
    invert 0.9 0, equalize 0.6 0
    equalize 0.6 0, rotate 0.9 3
    shear_x 0.9 4, autocontrast 0.8 0
    shear_y 0.9 8, invert 0.4 0
    shear_y 0.9 5, solarize 0.2 6
    invert 0.9 0, autocontrast 0.8 0
    equalize 0.6 0, rotate 0.9 3
    shear_x 0.9 4, solarize 0.3 3
    shear_y 0.8 8, invert 0.7 0
    equalize 0.9 0, translate_y 0.6 6
    invert 0.9 0, equalize 0.6 0
    contrast 0.3 3, rotate 0.8 4
    invert 0.8 0, translate_y 0 2
    shear_y 0.7 6, solarize 0.4 8
    invert 0.6 0, rotate 0.8 4
    shear_y 0.3 7, translate_x 0.9 3
    shear_x 0.1 6, invert 0.6 0
    solarize 0.7 2, translate_y 0.6 7
    shear_y 0.8 4, invert 0.8 0
    shear_x 0.7 9, translate_y 0.8 3
    shear_y 0.8 5, autocontrast 0.7 0
    shear_x 0.7 2, invert 0.1 0
""")
"""The 25 pairs that were found on SVHN"""
