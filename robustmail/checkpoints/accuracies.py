"""The accuracies that a file of weights says its network had."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["stored_accuracies"]

_ACCURACY = re.compile(r"(?:^|_)(acc(?:uracy)?_?1?|prec_?1|top_?1)(?:_|$)")
_OTHER = {"train", "training", "robust", "rob", "adv", "adversarial", "pgd", "fgsm", "attack", "attacked", "aa",
          "autoattack", "certified", "cert", "loss", "top5", "acc5", "prec5", "err", "error"}  # fmt: skip


def stored_accuracies(values: Mapping[str, str]) -> dict[str, float]:
    """The clean test accuracies among a file's plain values, in [0, 1], by name: `best_acc`, `prec1`, `testAccuracy`.

    What is larger than 1 is in percent, a whole number above 100 a count, of 1,000 or the next power of ten. Those on
    training or attacked images are left out.
    """
    found = {}
    for name, text in values.items():
        last = re.split(r"[.\[/]", name)[-1]
        words = re.sub(r"[@\- ]", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", last)).lower()
        if not _ACCURACY.search(words) or _OTHER & set(words.split("_")):
            continue
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            continue
        if value > 100 and value.is_integer():  # a count of right answers
            found[name] = value / 10 ** max(3, math.ceil(math.log10(value)))
        elif 0 < value <= 100:
            found[name] = value if value <= 1 and not text.endswith("%") else value / 100
    return found
