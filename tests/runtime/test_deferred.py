"""On a GPU the host runs a step ahead of what it reads. Here a CPU does so, with an optimiser that is told as there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustmail import (
    AT,
    AWP,
    LMPGD,
    MART,
    PGD,
    SGD,
    Sigmoid,
    State,
    digits,
    fit,
    reproduce,
)
from robustmail.catalog import recipe_files
from robustmail.config.loader import load_recipe
from robustmail.errors import AttackError, NonFiniteError
from robustmail.margins import lps, pm_dif
from robustmail.models.precision import ComputeModels
from robustmail.records import EpochFinished, StepFinished
from robustmail.runtime import devices
from robustmail.runtime.deferred import DeferredReads, defer_reads, read_later
from robustmail.runtime.signals import Signals
from robustmail.train import step_queue
from robustmail.train.run import Stopped, run
from robustmail.train.step_queue import StepQueue
from tests.train.conftest import Poison, Root
from tests.train.conftest import recipe as tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(SGD):
    """torch's fused SGD, which a CPU has too."""

    def __call__(self, parameters):
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )


recipe = tiny.but(batch=256, optimizer=Fused(lr=0.1), evaluate=("nat",))


@contextlib.contextmanager
def queued(n):
    """Inside, the host launches n steps before it reads one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_queue, "max_queued", lambda state: n)
        yield


def trained(made, n, folder=None, until=None):
    state = State.fresh(made, folder)
    records = []
    with queued(n):
        for record in fit(made, state):
            records.append(record)
            if until is not None and until(record):
                break
    return state, records


def weights(state):
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_reading_a_step_late_changes_neither_the_run_nor_what_is_told_of_it():
    at_once, told = trained(recipe, 0)
    late, told_late = trained(recipe, 1)
    assert same(weights(at_once), weights(late))
    steps, steps_late = (
        [dataclasses.replace(r, seconds=0.0) for r in each if isinstance(r, StepFinished)] for each in (told, told_late)
    )
    assert steps == steps_late
    epochs, epochs_late = ([r for r in each if isinstance(r, EpochFinished)] for each in (told, told_late))
    assert epochs == epochs_late


@pytest.mark.long
def test_the_host_is_a_step_ahead_and_knows_all_at_the_end_of_an_epoch():
    state = State.fresh(recipe)
    with queued(1):
        launched = [(r.epoch, r.step, state.step) for r in fit(recipe, state) if isinstance(r, StepFinished)]
    steps = max(step for _, step, _ in launched)
    assert launched == [(e, s, min(s + 1, steps)) for e in range(2) for s in range(1, steps + 1)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"margin": Poison}, r"epoch 1, step 3 \(training images .*the loss is nan \(first in the margin Poison"),
        ({"objective": Root, "margin": None, "weighter": None}, r"step 3 .*the gradient is not finite"),
        ({"objective": Root, "margin": None, "weighter": None, "ema": 0.9}, r"step 3 .*the gradient is not finite"),
    ],
)
def test_a_number_that_is_not_finite_leaves_no_mark_though_the_next_step_was_launched(changes, said, tmp_path):
    def made():
        return recipe.but(burn_in=0, **{k: v() if isinstance(v, type) else v for k, v in changes.items()})

    before, averages = {}, []
    for n in (0, 1):
        state = State.fresh(made(), tmp_path)
        with queued(n), pytest.raises(NonFiniteError, match=said):
            list(fit(made(), state))
        assert (state.epoch, state.step) == (0, 2)
        assert not before or same(before, weights(state))
        before = weights(state)
        averages.append({name: value.clone() for name, value in state.eval_model.state_dict().items()})
        dump = torch.load(tmp_path / "nonfinite.pt", weights_only=True)
        assert (dump["epoch"], dump["step"]) == (0, 2)
        assert all(torch.equal(dump["model"][name], value) for name, value in before.items())
    assert same(*averages)


def test_a_dump_of_a_late_reading_reproduces(tmp_path):
    made = recipe.but(optimizer=Fused(lr=1e30), margin=None, weighter=None, burn_in=0, epochs=5)
    with pytest.raises(NonFiniteError, match="step"):
        trained(made, 1, tmp_path)
    with pytest.raises(NonFiniteError):
        reproduce(tmp_path / "nonfinite.pt", made)


@pytest.mark.long
def test_a_state_saved_between_two_readings_goes_on_to_the_same_bits(tmp_path):
    whole, _ = trained(recipe, 1)
    broken, _ = trained(
        recipe, 1, tmp_path, until=lambda r: isinstance(r, StepFinished) and (r.epoch, r.step) == (1, 2)
    )
    assert broken.step == 3, "the host is not ahead, so this tests nothing"
    assert broken.sums["loss"][1] == 3 * recipe.batch, "what was launched is read when the loop is left"
    broken.save()
    again = State.fresh(recipe, tmp_path)
    again.load()
    assert again.step == 3, "the step that was launched is done, and saved as done"
    with queued(1):
        records = list(fit(recipe, again))
    assert same(weights(whole), weights(again))
    assert whole.history == again.history
    assert records


@pytest.mark.long
def test_a_signal_saves_what_was_launched_too(tmp_path, monkeypatch):
    monkeypatch.setattr(step_queue, "max_queued", lambda state: 1)
    signals = Signals()
    with pytest.raises(Stopped):
        for record in run(recipe, tmp_path / "run", "test", signals=signals, save_every=1e9):
            if isinstance(record, StepFinished) and record.step == 2:
                signals.asked = signal.SIGINT
    list(run(recipe, tmp_path / "run", "test"))
    list(run(recipe, tmp_path / "whole", "test"))
    assert (tmp_path / "run" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    both = [(tmp_path / name / "last.safetensors").read_bytes() for name in ("run", "whole")]
    assert both[0] == both[1]


def test_an_attack_that_leaves_its_ball_is_named_a_step_late(tmp_path):
    class Far(PGD):
        def _move(self, x, iterate, gradient, k):
            return (iterate + self.alpha * gradient.sign()).clamp(0, 1)

    calls = []
    later = DeferredReads()
    with defer_reads(later):
        read_later(torch.tensor([3.0, 4.0]), calls.extend)
        assert calls == []
        Far(eps=0.01, alpha=0.5, steps=1)(torch.nn.Flatten(), torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1]))
    later.send()
    with pytest.raises(AttackError, match="left its ball"):
        later.read()
    assert calls == [3.0, 4.0]


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive"}
ASKS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Waits(TorchDispatchMode):
    """The operators whose result the host has to wait for: a value, or a shape that hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = isinstance(args[1] if len(args) > 1 else None, (list, tuple)) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITS or (name in ("index", "index_put_", "index_put", "_index_put_impl_") and masks):
            self.met.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": AT(), "margin": None, "weighter": None},
        {"objective": MART(), "attack": PGD(eps=0.1, alpha=0.05, steps=2, norm="l2"), "margin": pm_dif},
        {"objective": AT(), "margin": lps, "attack": LMPGD(eps=0.1, alpha=0.05, steps=2)},
        {"perturbation": AWP(gamma=0.01), "attack": PGD(eps=0.1, alpha=0.05, steps=2, loss="kl", start="gaussian")},
        {"attack_mode": "train", "model": "cifar_resnet18_w8", "batch": 700},
        {"precision": "bf16", "model": "cifar_resnet18_w8", "batch": 700},
    ],
    ids=["MAIL-TRADES", "AT", "MART", "LPS of LM-PGD", "AWP", "attack in train mode", "bf16"],
)
def test_nothing_in_a_step_waits_for_a_value_on_the_device(changes, monkeypatch):
    made = recipe.but(burn_in=0, **changes)
    state = State.fresh(made)
    _ = state.compute_models  # compares the folded model with the model, once
    met = waits_in_a_step(made, state, monkeypatch)
    assert met == []


def test_the_test_above_would_notice(monkeypatch):
    class Peeking(Sigmoid):
        def __call__(self, margin):
            return torch.ones_like(margin) * max(margin.mean().item(), 1.0)

    class Masking(AT):
        def __call__(self, step):
            wrong = step.logits_adv.argmax(1) != step.y
            step.logits_adv[wrong]
            return super().__call__(step)

    for changes, what in (
        ({"weighter": Peeking(slope=1.0, bias=0.0)}, "item"), ({"objective": Masking()}, "index"),
        ({"attack": PGD(eps=0.1, alpha=0.05, steps=2, patience=1)}, "index"),
    ):  # fmt: skip
        made = recipe.but(burn_in=0, **changes)
        assert what in waits_in_a_step(made, State.fresh(made), monkeypatch)


def step_on_meta(name, monkeypatch):
    """A training step on the meta device; returns the state, what was launched, and where the optimiser was told."""
    made = load_recipe(name).but(data=digits(), model="small_cnn", precision="fp32", burn_in=0, batch=64)
    made = made if made.teacher is None else made.but(teacher="ema", ema=0.9)
    state = State.fresh(made)
    state.device = torch.device("meta")
    state.memory.tables = {table: rows.to("meta") for table, rows in state.memory.tables.items()}
    state.train = state.train.to("meta")
    for model in state.averages.models().values():
        model.to("meta")
    state.compute_models = ComputeModels(state.model, state.model, "on no device")
    state.optimizer = made.at(0).optimizer(state.model.parameters())
    told = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: told.append(self.found_inf.device))  # not fused there
    monkeypatch.setattr(DeferredReads, "send", lambda self: None)
    with queued(1):
        queue = StepQueue(state)
    queue.launch(made.at(0), torch.arange(64))
    (launched,) = queue._launched
    return state, launched, told


@pytest.mark.parametrize("name", [name for name in recipe_files() if name != "fat"])
def test_a_recipes_step_leaves_nothing_behind_on_another_device(name, monkeypatch):
    """On the meta device there are no values to ask for, and no tensor may meet one of the CPU, as on a GPU."""
    state, launched, told = step_on_meta(name, monkeypatch)
    assert told == [torch.device("meta")]
    assert {p.grad.device for p in state.model.parameters()} == {torch.device("meta")}
    assert {tensor.device for _, tensor in launched.before} == {torch.device("meta")}


class NoFloat64(TorchDispatchMode):
    """The meta device as a Mac's GPU, which has no float64."""

    def __torch_dispatch__(self, called, types, args=(), kwargs=None):
        found = called(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            assert not (isinstance(part, torch.Tensor) and part.is_meta and part.dtype == torch.float64), called
        return found


@pytest.mark.parametrize("name", ["mail_trades_awp", "self_adaptive"])
def test_a_step_needs_no_float64_where_the_device_has_none(name, monkeypatch):
    monkeypatch.setattr(devices, "NO_FLOAT64", {"meta"})
    with NoFloat64():
        step_on_meta(name, monkeypatch)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has a Mac's GPU")
def test_a_mac_gpu_that_is_not_there_is_the_cpu_with_one_line(capsys):
    devices._mps_or_cpu.cache_clear()
    assert [devices.pick_device("mps").type for _ in range(2)] == ["cpu", "cpu"]
    error = capsys.readouterr().err
    assert error.startswith("robustmail: device=mps: ")
    assert error.count("\n") == 1


def test_the_test_above_would_notice_a_tensor_of_the_cpu_and_a_question():
    x = torch.rand(4, 1, 8, 8, device="meta")
    for wrong in (lambda: x + torch.zeros(4, 1, 8, 8), lambda: x.sum().item(), lambda: x[x > 0.5], lambda: x.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wrong()


def waits_in_a_step(made, state, monkeypatch):
    indices = torch.arange(len(state.train.y))[: made.batch]
    waits = Waits()
    with queued(1):
        queue = StepQueue(state)

    def noting(name, ask):
        def asked(*args, **options):
            waits.met.append(name)
            return ask(*args, **options)

        return asked

    with monkeypatch.context() as patch:
        for name in ASKS:
            patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        with waits:
            queue.launch(made.at(0), indices)
    (finished,) = queue.drain()
    assert math.isfinite(finished.loss)
    return waits.met
