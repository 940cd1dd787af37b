"""A recipe of seconds, and plugins that go wrong in its third step."""

from __future__ import annotations

from robustmail import PGD, SGD, TRADES, Recipe, Sigmoid, Stairs, Terms, digits, pm_adv

recipe = Recipe(
    data=digits(), model="small_cnn", attack=PGD(eps=0.1, alpha=0.05, steps=2), objective=TRADES(), epochs=2,
    margin=pm_adv, weighter=Sigmoid(slope=2.0, bias=0.0), burn_in=1, batch=512, validate="pgd2",
    evaluate=("nat",), optimizer=SGD(lr=Stairs({0: 0.1, 1: 0.05})), test_size=100,
)  # fmt: skip


class Poison:
    """A margin that is NaN from its third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return step.probs_adv.amax(1) * (float("nan") if self.calls > 2 else 1.0)


class Root:
    """A finite loss whose gradient is not: sqrt(0), from its third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return Terms((step.logits_adv * (self.calls <= 2)).pow(2).sum(1).sqrt())
