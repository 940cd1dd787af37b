"""The laws that hold for every plugin, ours and yours, each a sentence that can be broken.

    def test_my_margin_is_lawful():
        assert_lawful(my_margin)

or on the command line, without a recipe: `robustmail check my_margin.py`.
"""

from __future__ import annotations

import copy
import inspect
import random
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustmail.attacks.view import eps_of, model_view
from robustmail.errors import AttackError, NonFiniteError, PluginError, RobustmailError, asked_to_stop, in_brief
from robustmail.norms import max_distance, norm_of, tolerance
from robustmail.plugin_calls import call_plugin, error_location, is_third_party, plugin_name, source_location
from robustmail.runtime.rng import fork_rng
from robustmail.step import Adversarial, Step, Terms, Trace, counted_steps, means_one

__all__ = ["LAWS", "assert_lawful", "broken_laws", "kind_of", "laws"]

Law = Callable[[Any], str | None]
"""plugin -> what is wrong, or None"""

SIZE = 6


def laws(kind: str) -> dict[str, Law]:
    """The laws of a kind ("margin", "weighter", "objective", "attack", "perturbation"), by their sentence."""
    return LAWS[kind]


def broken_laws(plugin: Any, kind: str | None = None) -> dict[str, str]:
    """{law: what is wrong}, empty for a lawful plugin; a plugin that fails under a law breaks it."""
    found = {}
    kind = kind or kind_of(plugin)
    state = torch.get_rng_state()
    for sentence, law in laws(kind).items():
        torch.manual_seed(0)
        try:
            wrong = law(plugin)
        except BaseException as error:  # a plugin may fail in any way
            if asked_to_stop(error):
                raise
            wrong = f"{in_brief(error)} {_at(error)}".strip()
        if wrong:
            found[sentence] = wrong
    torch.set_rng_state(state)
    return found


def assert_lawful(plugin: Any, kind: str | None = None) -> None:
    """Raise PluginError that names every law which a plugin breaks, and how; an own attack gets a view, as in runs."""
    kind = kind or kind_of(plugin)
    if broken := broken_laws(_Lent(plugin) if kind == "attack" and is_third_party(plugin) else plugin, kind):
        first: dict[str, str] = {}
        for law, wrong in broken.items():  # a plugin that fails does so in the same way under every law
            first.setdefault(wrong, law)
        said = "; ".join(f"{law!r} ({wrong})" for wrong, law in first.items())
        count = "a law" if len(broken) == 1 else f"{len(broken)} laws"
        raise PluginError(
            f"{kind} {plugin_name(plugin)} ({source_location(plugin)})", f"breaks {count} of plugins: {said}"
        )


def kind_of(plugin: Any) -> str:
    """What a plugin is, from its annotations, or from the number and names of what it takes.

    Raises PluginError where that cannot be told.
    """
    call = plugin if inspect.isfunction(plugin) else type(plugin).__call__
    taken = [
        p for p in inspect.signature(plugin).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    try:
        hints = typing.get_type_hints(call)
    except NameError:  # an annotation under TYPE_CHECKING
        hints = {}
    given = hints.get(taken[0].name) if taken else None
    names = [p.name for p in taken]
    if len(taken) == 3:
        return "attack"
    if len(taken) == 2 and "classes" not in names[0]:  # else it makes a model
        return "perturbation"
    if len(taken) == 1 and "param" not in names[0]:  # else an optimiser
        if hints.get("return") is Terms or "objective" in plugin_name(plugin).lower():
            return "objective"
        if given is Tensor or names[0] in ("m", "margin", "margins"):
            return "weighter"
        return "margin" if given is Step or (names[0] == "step" and "return" in hints) else _kind_of_answer(plugin)
    taken_said = f"takes {', '.join(names) or 'nothing'}"
    raise PluginError(
        f"{plugin_name(plugin)} ({source_location(plugin)})", f"{taken_said}, so it is no plugin that has laws"
    )


def _kind_of_answer(plugin: Any) -> str:
    """What a plugin of one argument is, from what it makes of a step, or of margins."""
    step = _step(_logits(), torch.arange(SIZE), _trace(SIZE))
    for kind, asked, size in (("margin", step, SIZE), ("weighter", MARGINS, len(MARGINS))):
        with suppress(RobustmailError), fork_rng():  # it may fail in any way on what it is not made for
            answer = call_plugin("plugin", plugin, asked)
            if isinstance(answer, Terms):
                return "objective"
            if isinstance(answer, Tensor) and answer.shape == (size,):
                return kind
    return "margin"


class _Lent:
    """An attack of somebody's own as runs and evaluations call it: on a view, on which it can leave no mark."""

    def __init__(self, attack: Any) -> None:
        self.attack = attack

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Any:
        with model_view(model) as view:
            return self.attack(view, x, y)


class _Net(nn.Module):
    """Everything that a plugin could leave a mark on: BatchNorm in its own mode, dropout, waiting gradients."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(self.bn(self.conv(x)).relu().flatten(1)))
        return logits


def _net(classes: int = 10) -> _Net:
    net = _Net(classes).train()
    nn.functional.cross_entropy(net(torch.rand(4, 3, 8, 8)), torch.arange(4) % classes).backward()
    net.drop.eval()
    return net


def _images(n: int = SIZE, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 8, 8), torch.arange(n) % classes


def _trace(n: int) -> Trace:
    return Trace(torch.rand(10, n) < 0.7, torch.rand(10, n))


def _step(logits: tuple[Tensor, Tensor], y: Tensor, trace: Trace, x: Tensor | None = None) -> Step:
    """A step whose logits are given, so that a law can choose them."""
    images = torch.rand(len(y), 3, 8, 8) if x is None else x
    step = Step(_net(logits[0].shape[1]), images, y, images, trace)
    step._logits = {"nat": logits[0], "adv": logits[1]}
    return step


def _logits(n: int = SIZE, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(n, classes) * 3, torch.randn(n, classes) * 3


class _Looks:
    """What a law asks of a margin or an objective, at chosen logits."""

    def __init__(self, read: Callable[[Any, Step], Tensor]) -> None:
        self.read = read

    def at(
        self, plugin: Any, change: Callable[[Tensor], Tensor] = lambda z: z, n: int = SIZE, classes: int = 10
    ) -> Tensor:
        nat, adv = _logits(n, classes)
        return self.read(plugin, _step((change(nat), change(adv)), torch.arange(n) % classes, _trace(n)))

    def shape(self, plugin: Any) -> str | None:
        value = self.at(plugin)
        if not isinstance(value, Tensor):
            return f"returned {type(value).__name__}"
        return None if value.shape == (SIZE,) else f"returned shape {list(value.shape)} for a batch of {SIZE}"

    def finite(self, plugin: Any) -> str | None:
        return _all_finite(self.at(plugin))

    def huge(self, plugin: Any) -> str | None:
        return _all_finite(self.at(plugin, lambda z: z.sign() * 1e4)) or _all_finite(
            self.at(plugin, lambda z: z * 1e4 / 3)
        )

    def half(self, plugin: Any) -> str | None:
        exact = self.at(plugin, lambda z: z.bfloat16().float())
        torch.manual_seed(0)
        value = self.at(plugin, lambda z: z.bfloat16())
        return _all_finite(value) or _differ(exact, value.float(), 0.05, "in float32 and bfloat16")

    def any_classes(self, plugin: Any) -> str | None:
        for classes in (2, 3, 100):
            value = self.at(plugin, classes=classes)
            if value.shape != (SIZE,) or not value.isfinite().all():
                return f"returned {value.tolist()} with {classes} classes"
        return None

    def short_batch(self, plugin: Any) -> str | None:
        value = self.at(plugin, n=1)
        return None if value.shape == (1,) and value.isfinite().all() else f"returned {value} for a batch of one"

    def order(self, plugin: Any) -> str | None:
        logits, y, trace, x = _logits(), torch.arange(SIZE), _trace(SIZE), torch.rand(SIZE, 3, 8, 8)
        value = self.read(plugin, _step(logits, y, trace, x))
        to = torch.tensor([3, 1, 5, 0, 2, 4])
        shuffled = Trace(trace.correct[:, to], trace.p_true[:, to])
        moved = self.read(plugin, _step((logits[0][to], logits[1][to]), y[to], shuffled, x[to]))
        return _differ(value[to], moved, 1e-5, "when the batch is put in another order")

    def company(self, plugin: Any) -> str | None:
        logits, y, trace, x = _logits(), torch.arange(SIZE), _trace(SIZE), torch.rand(SIZE, 3, 8, 8)
        value = self.read(plugin, _step(logits, y, trace, x))
        fewer = Trace(trace.correct[:, :2], trace.p_true[:, :2])
        alone = self.read(plugin, _step((logits[0][:2], logits[1][:2]), y[:2], fewer, x[:2]))
        return _differ(value[:2], alone, 1e-5, "in the company of other examples")

    def unmarked(self, plugin: Any) -> str | None:
        net, (x, y) = _net(), _images()
        step = Step(net, x, y, x.clone(), _trace(SIZE))
        return _mark(net, lambda: self.read(plugin, step))

    def generator(self, plugin: Any) -> str | None:
        step = _step(_logits(), torch.arange(SIZE), _trace(SIZE))
        return _drew(lambda: self.read(plugin, step))

    def repeatable(self, plugin: Any) -> str | None:
        step = _step(_logits(), torch.arange(SIZE), _trace(SIZE))
        return _differ(self.read(plugin, step), self.read(plugin, step), 0.0, "when it is asked again")

    def inputs(self, plugin: Any) -> str | None:
        logits = _logits()
        step = _step(logits, torch.arange(SIZE), _trace(SIZE))
        seen = [t.clone() for t in (*logits, step.x, step.y)]
        self.read(plugin, step)
        return None if all(map(torch.equal, (*logits, step.x, step.y), seen)) else "wrote into the tensors it was given"


_MARGIN = _Looks(lambda margin, step: margin(step.detached()))
_OBJECTIVE = _Looks(lambda objective, step: (lambda terms: terms.weighted + terms.plain)(objective(step)))


def _margin_detached(margin: Any) -> str | None:
    net, (x, y) = _net(), _images()
    value = margin(Step(net, x, y, x, _trace(SIZE)).detached())
    return "carries a graph: its gradient would reach the weights" if value.requires_grad else None


def _objective_terms(objective: Any) -> str | None:
    terms = objective(_step(_logits(), torch.arange(SIZE), _trace(SIZE)))
    if not isinstance(terms, Terms):
        return f"returned {type(terms).__name__}"
    plain = terms.plain
    if isinstance(plain, Tensor) and plain.shape != (SIZE,):
        return f"plain has shape {list(plain.shape)} for a batch of {SIZE}"
    return None if terms.weighted.shape == (SIZE,) else f"weighted has shape {list(terms.weighted.shape)}"


def _objective_gradient(objective: Any) -> str | None:
    nat, adv = (z.sign() * 1e4 for z in _logits())
    for scale in (1.0, 1e-4):
        pair = (nat * scale).requires_grad_(), (adv * scale).requires_grad_()
        terms = objective(_step(pair, torch.arange(SIZE), _trace(SIZE)))
        (terms.weighted + terms.plain).sum().backward()
        if pair[1].grad is None and pair[0].grad is None:
            return "no gradient reaches the logits"
        if any(z.grad is not None and not z.grad.isfinite().all() for z in pair):
            return f"NaN or infinite gradient at logits of {1e4 * scale:g}"
    return None


MARGINS = torch.linspace(-1, 1, 7)


def _weight_at(weight: Any, margin: Tensor) -> Tensor:
    value: Tensor = weight(margin)
    return value


def _counted(weight: Any) -> list[Tensor]:
    """Numbers of steps, 0 ... K, for a weight that says that it counts them; others need only know [-1, 1]."""
    steps = counted_steps(weight)
    return [] if steps is None else [torch.arange(steps + 1.0)]


def _weight_shape(weight: Any) -> str | None:
    for n in (1, 2, 7):
        value = _weight_at(weight, torch.linspace(-1, 1, n))
        if not isinstance(value, Tensor) or value.shape != (n,):
            return f"returned {getattr(value, 'shape', type(value).__name__)} for a batch of {n}"
    return None


def _weight_finite(weight: Any) -> str | None:
    for margin in (MARGINS, torch.ones(4), -torch.ones(4), torch.zeros(1), *_counted(weight)):
        value = _weight_at(weight, margin)
        if wrong := _all_finite(value):
            return f"{wrong} at margins {margin.tolist()}"
        if value.min() < 0:
            return f"returned {value.min().item():.3g} at margins {margin.tolist()}"
    return None


def _weight_mean(weight: Any) -> str | None:
    if not means_one(weight):
        return None
    for n in (1, 5, 128):
        mean = _weight_at(weight, torch.rand(n) * 2 - 1).mean().item()
        if abs(mean - 1) > 1e-4:
            todo = "divide by the mean, or, if it is meant, give the weight `mean_one = False`"
            return f"the mean over a batch of {n} is {mean:.4g}; {todo}"
    return None


def _weight_monotone(weight: Any) -> str | None:
    for margin in (torch.linspace(-1, 1, 33), *_counted(weight)):
        value = _weight_at(weight, margin)
        if (value.diff() > 1e-6).any():
            return "grows with the margin, so it listens to the easy examples"
    return None


def _weight_order(weight: Any) -> str | None:
    to = torch.tensor([3, 1, 5, 0, 6, 2, 4])
    return _differ(_weight_at(weight, MARGINS)[to], _weight_at(weight, MARGINS[to]), 1e-5, "in another order")


def _weight_detached(weight: Any) -> str | None:
    with torch.no_grad():
        value = _weight_at(weight, MARGINS)
    return "carries a graph" if value.requires_grad else None


def _weight_draws(weight: Any) -> str | None:
    return _drew(lambda: weight(MARGINS))


def _attack_found(attack: Any) -> tuple[Tensor, Tensor]:
    net, (x, y) = _net(), _images()
    x = torch.cat([x[:-2], torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])  # corners of the box, too
    found = attack(net, x, y)
    return x, found.x if isinstance(found, Adversarial) else found


def _attack_shape(attack: Any) -> str | None:
    x, found = _attack_found(attack)
    if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
        return f"returned {getattr(found, 'shape', type(found).__name__)}, expected {list(x.shape)} of {x.dtype}"
    return "carries a graph" if found.requires_grad else _all_finite(found)


def _attack_box(attack: Any) -> str | None:
    _, found = _attack_found(attack)
    low, high = found.min().item(), found.max().item()
    return None if low >= 0 and high <= 1 else f"pixels span [{low:.3g}, {high:.3g}]"


def _attack_ball(attack: Any) -> str | None:
    eps = eps_of(attack)
    if eps is None:
        return None
    x, found = _attack_found(attack)
    far = max_distance(x, found, norm_of(attack)).item()
    return None if far <= eps + tolerance(eps) else f"an image lies {far:.4g} away, eps is {eps:.4g}"


def _attack_unmarked(attack: Any) -> str | None:
    net, (x, y) = _net(), _images()
    return _mark(net, lambda: attack(net, x, y))


def _attack_unmarked_after_failure(attack: Any) -> str | None:
    net, (x, y) = _net(), _images()

    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    def fails() -> None:
        handle = net.head.register_forward_hook(fail)
        try:
            attack(net, x, y)
        except (ArithmeticError, AttackError):
            pass
        finally:
            handle.remove()

    return _mark(net, fails)


def _attack_draws(attack: Any) -> str | None:
    net, (x, y) = _net(), _images()
    return _drew(lambda: attack(net, x, y))


def _attack_inputs(attack: Any) -> str | None:
    net, (x, y) = _net(), _images()
    before = x.clone(), y.clone()
    attack(net, x, y)
    return None if torch.equal(x, before[0]) and torch.equal(y, before[1]) else "wrote into the images it was given"


def _attack_nan(attack: Any) -> str | None:
    net, (x, y) = _net(), _images()
    nn.init.constant_(net.head.weight, float("nan"))
    try:
        found = attack(net, x, y)
    except (NonFiniteError, AttackError):
        return None
    images = found.x if isinstance(found, Adversarial) else found
    return _all_finite(images)


def _attack_classes(attack: Any) -> str | None:
    for classes in (2, 100):
        net, (x, y) = _net(classes), _images(classes=classes)
        try:
            attack(net, x, y)
        except AttackError:  # says in one line that it cannot, as APGD-T with two classes
            continue
    return None


def _perturbation_restores(perturb: Any) -> str | None:
    for fails in (False, True):
        net, (x, y) = _net(), _images()

        def work(net: _Net = net, x: Tensor = x, y: Tensor = y, fails: bool = fails) -> None:
            try:
                with perturb(net, lambda: nn.functional.cross_entropy(net(x), y)):
                    if fails:
                        raise ArithmeticError("planted")
            except ArithmeticError:
                pass

        if wrong := _mark(net, work):
            return wrong + (" after an exception inside" if fails else "")
    return None


LAWS: dict[str, dict[str, Law]] = {
    "margin": {
        "one number per example": _MARGIN.shape,
        "finite": _MARGIN.finite,
        "detached": _margin_detached,
        "independent of the order of examples": _MARGIN.order,
        "independent of batch mates": _MARGIN.company,
        "finite at huge logits": _MARGIN.huge,
        "the same in bfloat16": _MARGIN.half,
        "any number of classes": _MARGIN.any_classes,
        "a batch of one": _MARGIN.short_batch,
        "leaves modes, gradients, BatchNorm statistics and weights alone": _MARGIN.unmarked,
        "leaves the generators alone": _MARGIN.generator,
        "the same when asked again": _MARGIN.repeatable,
        "does not write into its input": _MARGIN.inputs,
    },
    "weighter": {
        "one number per example": _weight_shape,
        "finite and not negative": _weight_finite,
        "mean one over the batch": _weight_mean,
        "falls with the margin": _weight_monotone,
        "independent of the order of examples": _weight_order,
        "detached": _weight_detached,
        "leaves the generators alone": _weight_draws,
    },
    "objective": {
        "two terms, one number per example": _objective_terms,
        "finite": _OBJECTIVE.finite,
        "finite at huge logits": _OBJECTIVE.huge,
        "a finite gradient": _objective_gradient,
        "independent of the order of examples": _OBJECTIVE.order,
        "independent of batch mates": _OBJECTIVE.company,
        "any number of classes": _OBJECTIVE.any_classes,
        "leaves the generators alone": _OBJECTIVE.generator,
        "does not write into its input": _OBJECTIVE.inputs,
    },
    "attack": {
        "images of the same shape, detached and finite": _attack_shape,
        "stays in the box": _attack_box,
        "stays in the ball": _attack_ball,
        "leaves modes, gradients, BatchNorm statistics and weights alone": _attack_unmarked,
        "leaves no mark when the model fails": _attack_unmarked_after_failure,
        "leaves the generators alone": _attack_draws,
        "does not write into its input": _attack_inputs,
        "never returns NaN": _attack_nan,
        "any number of classes": _attack_classes,
    },
    "perturbation": {"restores the model exactly": _perturbation_restores},
}


def _all_finite(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"returned {type(value).__name__}"
    return None if value.isfinite().all() else f"returned {value.flatten()[:4].tolist()}"


def _differ(a: Tensor, b: Tensor, tolerance: float, when: str) -> str | None:
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)} {when}"
    gap = (a.detach().float() - b.detach().float()).abs().max().item()
    return f"changes by {gap:.3g} {when}" if not gap <= tolerance * max(1.0, a.detach().abs().max().item()) else None


def _mark(net: nn.Module, call: Callable[[], Any]) -> str | None:
    """What `call` leaves behind on the model."""

    def picture() -> dict[str, list[Any]]:
        return {
            "modes": [m.training for m in net.modules()],
            "requires_grad": [p.requires_grad for p in net.parameters()],
            "gradients": [copy.deepcopy(p.grad) for p in net.parameters()],
            "weights": [p.detach().clone() for p in net.parameters()],
            "BatchNorm statistics": [b.clone() for b in net.buffers()],
        }

    before = picture()
    call()
    changed = [what for what, old in picture().items() if not all(map(_same, old, before[what]))]
    return f"changed {' and '.join(changed)}" if changed else None


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b


def _drew(call: Callable[[], Any]) -> str | None:
    """Which global generators `call` moved."""

    def states() -> dict[str, str]:
        words, position = np.random.get_state()[1:3]  # type: ignore[index, misc]
        return {
            "torch's": str(torch.get_rng_state().tolist()), "numpy's": f"{words.tolist()} {position}",
            "Python's": str(random.getstate()),
        }  # fmt: skip

    before = states()
    call()
    moved = [whose for whose, state in states().items() if state != before[whose]]
    return f"moved {' and '.join(moved)} global generator" if moved else None


def _at(error: BaseException) -> str:
    place = error_location(error)
    return f"at {place}" if place else ""
