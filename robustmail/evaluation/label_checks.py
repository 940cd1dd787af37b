"""Do the labels belong to the model? Checks on its clean predictions, which need no further pass.

docs/believing.md explains each check under its name.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.results import Check
from robustmail.evaluation.statistics import paired, wilson

__all__ = ["label_checks"]

# Thresholds; docs/believing.md says where they come from.
FEWEST = 20  # images below which no class is missed
FEW_CLASSES = 0.5  # of the classes that so many labels would have if all were equally frequent
OUTSIDE = 0.5  # share of the answers that are classes which no label has
IMBALANCED = 1.5  # times its fair share that the most frequent class has
ONE_ANSWER = 0.99  # share of the answers that are one class
OTHER_ORDER = 0.10  # share of images that another order of the classes would gain

Pairs = list[tuple[int, int]]
"""(label, predicted class) of each image"""


def label_checks(ledger: Ledger, classes: int) -> Iterator[Check]:
    """The three checks. ledger: the evaluation's. classes: of the model."""
    pairs = list(zip(ledger.label.tolist(), ledger.predicted.tolist(), strict=True))
    yield _label_space(pairs, classes)
    yield _guessing(pairs, classes)
    yield _class_order(pairs)


def _label_space(pairs: Pairs, classes: int) -> Check:
    n, present = len(pairs), {label for label, _ in pairs}
    expected = classes * (1 - (1 - 1 / classes) ** n)
    is_narrow = n >= FEWEST and len(present) < FEW_CLASSES * expected
    outside = sum(predicted not in present for _, predicted in pairs) / n
    return Check(
        "label-space",
        "green" if not is_narrow else "red" if outside > OUTSIDE else "yellow",
        f"labels name {len(present)} of the model's {classes:,} classes, and {100 * outside:.1f} % of its answers are "
        "others",
        "the labels may be those of another data set, or the images the first ones of a sorted set",
    )


def _guessing(pairs: Pairs, classes: int) -> Check:
    n = len(pairs)
    (usual, count), answers = _most_common(label for label, _ in pairs), _most_common(answer for _, answer in pairs)
    only_model = sum(label == answer != usual for label, answer in pairs)
    only_guess = sum(label == usual != answer for label, answer in pairs)
    is_imbalanced = wilson(count, n)[0] > IMBALANCED / classes and count < n
    is_no_better = is_imbalanced and paired(n, only_model, only_guess).low <= 0
    return Check(
        "guessing",
        "green" if not is_no_better else "red" if answers[1] >= ONE_ANSWER * n else "yellow",
        f"always answering class {usual} is right on {100 * count / n:.1f} % of these labels and stands under every "
        f"attack, the model is right on {100 * sum(label == answer for label, answer in pairs) / n:.1f} %",
        "accuracy on labels of which one class has so many says little; read worst-class accuracy",
    )


def _class_order(pairs: Pairs) -> Check:
    """Each half of the images says which class is called what; the other half is judged by it."""
    shuffled = random.Random(0).sample(pairs, len(pairs))  # in many sets every other image is of few classes
    halves = shuffled[::2], shuffled[1::2]
    gained = lost = 0
    for chosen_on, judged_on in (halves, halves[::-1]):
        order = _order(chosen_on)
        gained += sum(answer == order.get(label, label) != label for label, answer in judged_on)
        lost += sum(answer == label != order.get(label, label) for label, answer in judged_on)
    n, right = len(pairs), sum(label == answer for label, answer in pairs)
    return Check(
        "class-order",
        "red" if paired(n, gained, lost).low > OTHER_ORDER else "green",
        f"with its classes in another order the model would be right on {100 * (right + gained - lost) / n:.1f} % "
        f"instead of {100 * right / n:.1f} %",
        "the labels count the classes in another order than the model does",
    )


def _order(pairs: Pairs) -> dict[int, int]:
    """label -> the answer that it gets most often; only where no other label gets that answer most often, too."""
    counts = Counter(pairs)
    usual: dict[int, tuple[int, int]] = {}
    for (label, answer), count in counts.items():
        usual[label] = max(usual.get(label, (0, -1)), (count, answer))
    claims = Counter(answer for _, answer in usual.values())
    return {label: answer for label, (_, answer) in usual.items() if claims[answer] == 1}


def _most_common(values: Iterator[int]) -> tuple[int, int]:
    """(value, how often it occurs)"""
    return Counter(values).most_common(1)[0]
