"""What the sanity checks measure on the sample, and the light of a number beside its thresholds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["MIN_IMAGES", "Measurements", "level", "red_if"]

MIN_IMAGES = 3  # fewer images do not turn on a light


@dataclass(frozen=True)
class Measurements:
    """What the checks need of what `measure` yields last. Shares are in [0, 1], of the n images of the sample.

    n: images in the sample.
    differs: largest difference of logits between two passes on the same images, as a share of the largest logit.
    changes_its_mind: share of images whose class differs between these passes.
    by_company: as `differs`, for the same images beside other ones.
    alters_images: whether the model writes into its input.
    probabilities: whether its outputs are probabilities.
    zero_gradients: share of images whose gradient is zero or not finite.
    pgd10, pgd100, targeted: shares that stand under 10 iterations of PGD, under 100, and under 100 and a short targeted
    attack.
    black_box: share that only 300 random queries broke.
    broken: places in the data set of all images that these attacks broke.
    huge: an eps at which no image can stand; None if no attack takes so large a one.
    curve: images that stand under PGD at several eps.
    doubts: what speaks against the way the checkpoint was read, in sentences.
    weights: of the first test images, those that the margin and weighter of a training run would give them; else empty.
    causes: what `causes.measure_causes` returned; empty in results of before, and where the model answers at random.
    draws: what `output_checks.measure_draws` returned; empty unless the model answers at random.
    """

    n: int
    differs: float
    changes_its_mind: float
    by_company: float
    alters_images: bool
    probabilities: bool
    zero_gradients: float
    pgd10: float
    pgd100: float
    targeted: float
    black_box: float
    broken: list[int]
    huge: float | None
    curve: list[dict[str, Any]]
    doubts: list[str]
    weights: list[float]
    causes: dict[str, Any]
    draws: dict[str, Any]

    @classmethod
    def of(cls, measured: dict[str, Any]) -> Measurements:
        """The measurements in a results.json. Raises KeyError: one is missing."""
        values = {"doubts": [], "weights": [], "causes": {}, "draws": {}, **measured}
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def red_if(is_red: bool) -> str:
    """The light "red" or "green"."""
    return "red" if is_red else "green"


def level(value: float, yellow: float, red: float) -> str:
    """The light "red" from the second threshold on, "yellow" from the first, else "green"."""
    return "red" if value >= red else "yellow" if value >= yellow else "green"
