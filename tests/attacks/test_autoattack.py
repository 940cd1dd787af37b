"""AutoAttack has the settings of the reference code, and adapts to models of few classes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from robustmail import AutoAttack
from tests.conftest import Small

EPS = 8 / 255


@pytest.mark.parametrize("classes", [2, 3, 4, 100])
def test_autoattack_takes_any_number_of_classes_and_notes_what_it_replaced(classes, batch, monkeypatch):
    """With a few steps of each attack: what they are made of does not depend on how many there are."""
    model, ran = Small(classes=classes).eval(), []
    attack = AutoAttack(eps=EPS / 100)  # so that images stand, and every stage has some to attack
    stages = attack.stages(classes)
    assert ("apgd-t" in stages) == (classes >= 4)
    assert (attack.replaced(classes) is None) == (classes >= 4)

    def quick(name, model, x, y):
        ran.append(name)
        return replace(stages[name], **{"n_queries": 10} if name == "square" else {"steps": 2})(model, x, y)

    monkeypatch.setattr(AutoAttack, "stages", lambda *_: {name: partial(quick, name) for name in stages})
    attack(model, batch[0], model(batch[0]).argmax(1))
    assert ran == list(stages)


def test_autoattack_has_the_settings_of_the_reference():
    stages = AutoAttack(eps=EPS).stages(10)
    assert list(stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [stages[s].steps for s in ("apgd-ce", "apgd-t", "fab-t")] == [100, 100, 100]
    assert (stages["square"].n_queries, stages["square"].resc_schedule, stages["square"].p_init) == (5000, False, 0.8)
    assert (stages["fab-t"].multi_targeted, stages["fab-t"].n_classes, stages["apgd-t"].n_classes) == (True, 10, 10)
