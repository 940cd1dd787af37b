"""Every attack leaves model and generators unchanged, and stays in the eps-ball and in [0, 1]."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from robustmail import PGD, Adversarial, AutoAttack, Classifier, art, torchattack
from robustmail.attacks.view import model_view
from robustmail.errors import AttackError, NonFiniteError

EPS = 8 / 255
ATTACKS = {
    "PGD": PGD(steps=3),
    "PGD kl": PGD(steps=3, loss="kl", start="gaussian"),
    "PGD margin": PGD(steps=3, loss="margin", start="none"),
    "PGD l2": PGD(eps=0.5, alpha=0.2, steps=3, norm="l2"),
    "torchattacks PGD": torchattack("PGD", eps=EPS, steps=3),
    "torchattacks TPGD": torchattack("TPGD", eps=EPS, steps=3),
    "torchattacks FGSM": torchattack("FGSM", eps=EPS),
    "torchattacks MIFGSM": torchattack("MIFGSM", eps=EPS, steps=3),
    "torchattacks PGDL2": torchattack("PGDL2", eps=0.5, steps=3),
    "torchattacks CW": torchattack("CW", steps=5),
    "torchattacks APGD": torchattack("APGD", eps=EPS, steps=5),
    "torchattacks APGD l2": torchattack("APGD", norm="L2", eps=0.5, steps=5),
    "torchattacks APGDT": torchattack("APGDT", eps=EPS, steps=3),
    "torchattacks FAB": torchattack("FAB", eps=EPS, steps=3, multi_targeted=True),
    "torchattacks Square": torchattack("Square", eps=EPS, n_queries=20),
    "AutoAttack": AutoAttack(eps=EPS),
    "ART PGD": art("ProjectedGradientDescentPyTorch", eps=EPS, eps_step=2 / 255, max_iter=3, num_random_init=1),
    "ART APGD": art("AutoProjectedGradientDescent", eps=EPS, eps_step=2 / 255, max_iter=3, nb_random_init=1),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def state_of(model):
    """Everything that an attack must not change."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "torch": torch.get_rng_state(),
        "numpy": str(np.random.get_state(legacy=False)),
        "python": random.getstate(),
    }


def is_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return a == b


def assert_unchanged(model, before):
    after = state_of(model)
    assert [name for name in before if not is_equal(before[name], after[name])] == []


def in_training(model, batch):
    """The model in the middle of training: mixed modes, a frozen parameter, gradients not applied yet."""
    x, y = batch
    model.train()
    model.bn.eval()
    model.conv.bias.requires_grad_(False)
    nn.functional.cross_entropy(model(x), y).backward()
    return model


@every_attack
def test_leaves_modes_gradients_buffers_and_generators_as_they_were(attack, small, batch):
    model = in_training(small, batch)
    before = state_of(model)
    attack(model, *batch)
    assert_unchanged(model, before)


@every_attack
def test_changes_nothing_when_the_model_fails_half_way(attack, small, batch):
    model = in_training(small, batch)
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == 1:
            raise RuntimeError("half way")

    handle = model.head.register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises((RuntimeError, AttackError), match="half way"):
        attack(model, *batch)
        attack(model, *batch)  # FGSM reaches no second forward in one call
    handle.remove()
    assert_unchanged(model, before)


@every_attack
def test_stays_in_the_ball_and_the_box_and_returns_a_plain_tensor(attack, small, real_images):
    x, y = real_images
    model = Classifier(type(small)(3, 32), normalize=([0.5, 0.4, 0.3], [0.2, 0.2, 0.3]))
    x = torch.cat([x[:6], torch.zeros_like(x[:1]), torch.ones_like(x[:1])])  # corners of the box, too
    result = attack(model, x, y[:8])
    assert isinstance(result, Adversarial)
    x_adv = result.x
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert x_adv.isfinite().all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if hasattr(attack, "eps"):
        delta = (x_adv - x).flatten(1)
        distances = delta.norm(dim=1) if attack.eps == 0.5 else delta.abs().amax(1)
        assert distances.max() <= attack.eps + 1e-5


@every_attack
def test_runs_in_eval_mode_even_if_the_model_trains(attack, small, batch):
    modes = set()
    small.bn.register_forward_hook(lambda module, *_: modes.add(module.training))
    attack(small.train(), *batch)
    assert modes == {False}


@every_attack
def test_refuses_images_outside_the_box(attack, small, batch):
    with pytest.raises(AttackError, match=r"must lie in \[0, 1\]"):
        attack(small, 2 * batch[0] - 1, batch[1])


@every_attack
def test_refuses_a_model_that_returns_nan(attack, small, batch):
    nn.init.constant_(small.head.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        attack(small, *batch)


@every_attack
def test_noise_follows_the_generator_of_the_caller(attack, small, batch):
    torch.manual_seed(5)
    first = attack(small, *batch).x
    assert torch.equal(first, attack(small, *batch).x), "the generator was not put back"


def test_another_state_of_the_generator_gives_another_start_also_where_the_library_reseeds(small, batch):
    attack = torchattack("APGD", eps=EPS, steps=1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(attack(small, *batch).x)
    assert not torch.equal(*results)


def test_works_under_no_grad_and_inference_mode(small, batch):
    expected = PGD(start="none")(small, *batch).x
    with torch.no_grad():
        assert torch.equal(PGD(start="none")(small, *batch).x, expected)
    with torch.inference_mode():
        assert torch.equal(torchattack("PGD", random_start=False)(small, *batch).x, expected)


def test_an_attack_in_train_mode_changes_no_statistic(small, batch):
    before = small.bn.running_mean.clone()
    modes = set()
    small.bn.register_forward_hook(lambda module, *_: modes.add(module.training))
    with model_view(small, "train") as view:
        torchattack("PGD", steps=2)(view, *batch)
    assert modes == {True}
    assert torch.equal(small.bn.running_mean, before)


def test_an_attack_that_leaves_its_ball_is_an_error(small, batch):
    attack = torchattack("PGD", eps=EPS, steps=1)
    object.__setattr__(attack, "_target", lambda view, **_: lambda x, y: (x + 2 * EPS).clamp(0, 1))
    with pytest.raises(AttackError, match=r"left its ball: an image lies 16.00/255 away in linf, eps is 8.00/255"):
        attack(small, *batch)
