"""Laws that hold for every plugin, ours and yours: each is a sentence that a plugin can break.

    def test_my_margin_is_lawful():
        assert_lawful(my_margin)

or on the command line, without a recipe: `robustmail check my_margin.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.view import model_view
from robustmail.contracts.attack_laws import ATTACK_LAWS
from robustmail.contracts.augmentation_laws import AUGMENTATION_LAWS
from robustmail.contracts.kinds import kind_of
from robustmail.contracts.perturbation_laws import PERTURBATION_LAWS
from robustmail.contracts.samples import Law
from robustmail.contracts.step_laws import MARGIN_LAWS, OBJECTIVE_LAWS
from robustmail.contracts.weighter_laws import tried_range, weighter_laws
from robustmail.errors import PluginError, asked_to_stop, in_brief
from robustmail.plugin_calls import error_location, is_third_party, plugin_name, source_location
from robustmail.step import range_of

__all__ = ["LAWS", "Law", "assert_lawful", "broken_laws", "kind_of", "laws", "tried_on"]

LAWS: dict[str, dict[str, Law]] = {
    "margin": MARGIN_LAWS,
    "weighter": weighter_laws(),
    "objective": OBJECTIVE_LAWS,
    "attack": ATTACK_LAWS,
    "perturbation": PERTURBATION_LAWS,
    "augmentation": AUGMENTATION_LAWS,
}
"""The laws by kind of plugin, then by their sentence."""


def laws(kind: str, margin: Any = None) -> dict[str, Law]:
    """The laws of a kind, a key of LAWS, by their sentence.

    margin: for a weighter, the margin that it is used with; its laws are tried on that margin's range (`tried_range`).
    """
    return weighter_laws(margin) if kind == "weighter" else LAWS[kind]


def broken_laws(plugin: Any, kind: str | None = None, margin: Any = None) -> dict[str, str]:
    """Return {law: what is wrong} of the laws that a plugin breaks; an exception breaks the law too.

    kind: its kind of plugin; None to infer it with `kind_of`. margin: as in `laws`.
    """
    broken = {}
    kind = kind or kind_of(plugin)
    state = torch.get_rng_state()
    for sentence, law in laws(kind, margin).items():
        torch.manual_seed(0)
        try:
            wrong = law(plugin)
        except BaseException as error:  # a plugin may fail in any way
            if asked_to_stop(error):
                raise
            location = error_location(error)
            wrong = f"{in_brief(error)} {f'at {location}' if location else ''}".strip()
        if wrong:
            broken[sentence] = wrong
    torch.set_rng_state(state)
    return broken


def assert_lawful(plugin: Any, kind: str | None = None, margin: Any = None) -> None:
    """Check a plugin against all laws of its kind; a user's own attack is called on a `model_view`, as in a run.

    kind: its kind of plugin; None to infer it with `kind_of`. margin: as in `laws`.
    Raises PluginError with every law that it breaks, and how.
    """
    kind = kind or kind_of(plugin)
    on_view = kind == "attack" and is_third_party(plugin)
    if broken := broken_laws(_OnModelView(plugin) if on_view else plugin, kind, margin):
        first_law: dict[str, str] = {}
        for law, wrong in broken.items():  # a plugin that fails does so in the same way under every law
            first_law.setdefault(wrong, law)
        faults = "; ".join(f"{law!r} ({wrong})" for wrong, law in first_law.items())
        count = "a law" if len(broken) == 1 else f"{len(broken)} laws"
        raise PluginError(
            f"{kind} {plugin_name(plugin)} ({source_location(plugin)})", f"breaks {count} of plugins: {faults}"
        )


def tried_on(weighter: Any, margin: Any = None) -> str:
    """The margins on which the laws of a weighter were tried, in words; margin: as in `laws`."""
    low, high = tried_range(weighter, margin)
    whose = f" of {plugin_name(margin)}" if range_of(margin) else ""
    return f" on margins{whose} from {low:g} to {high:g}"


class _OnModelView:
    """A user's own attack as runs and evaluations call it: on a view, through which it cannot change a model."""

    def __init__(self, attack: Any) -> None:
        self.attack = attack

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Any:
        with model_view(model) as view:
            return self.attack(view, x, y)
