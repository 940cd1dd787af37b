"""Speed of robustmail, the plain loop as papers publish it, torchattacks and ART, on this machine.

All contenders get the same network, batch, eps, steps and threads. Each repeat runs every contender once, so that a
ratio compares times measured within the same minute.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.attacks.art import art
from robustmail.attacks.pgd import PGD
from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import model_view
from robustmail.data.sources import digits
from robustmail.margins import pm_adv
from robustmail.models.classifier import Classifier, build
from robustmail.models.precision import ComputeModels, Precision, backends, choose_precision, compute_models, flops
from robustmail.objectives import AT, TRADES
from robustmail.optimizers import SGD
from robustmail.recipe import Recipe
from robustmail.records import PLAIN, BenchReport, BenchRow
from robustmail.runtime.deferred import DeferredReads, defer_reads
from robustmail.runtime.devices import pick_device
from robustmail.runtime.provenance import provenance
from robustmail.runtime.rng import fork_rng
from robustmail.train.train_step import train_step
from robustmail.weighters import Sigmoid

__all__ = ["OurStep", "bench", "mail_at", "mail_trades", "our_step", "timed"]

EPS, ALPHA, BETA = 8 / 255, 2 / 255, 5.0


class Contender(NamedTuple):
    """One implementation of a task."""

    task: str
    name: str
    run: Callable[[], object]
    """does the task once"""
    passes: int | None
    """forward and backward passes of the batch that the task needs; None if it depends on the images"""


def bench(
    model: str = "cifar_resnet18", batch: int = 128, repeats: int = 3, steps: int = 10, targeted_steps: int = 3,
    precision: Precision = "auto", device: str = "auto", progress: Callable[[str], object] = lambda _: None,
) -> BenchReport:  # fmt: skip
    """Time every contender in every task, after one run to warm up.

    model: a timm name, ours included.
    batch: images [batch, 3, 32, 32], random, for speed does not depend on their content.
    repeats: timed runs of each contender.
    steps: of PGD. targeted_steps: of targeted APGD.
    precision: of robustmail's training.
    device: as `pick_device` takes it.
    progress: called with a line of text before each run.

    Raises ModelError, DeviceError.
    """
    chosen = pick_device(device)
    x, y = torch.rand(batch, 3, 32, 32, device=chosen), torch.randint(10, (batch,), device=chosen)
    contenders = list(_contenders(model, x, y, steps, targeted_steps, precision))
    machine = {"fp32": _rate(torch.float32, chosen), "bf16": _rate(torch.bfloat16, chosen)}
    seconds: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(repeats + 1):
        phase = f"repeat {repeat} of {repeats}" if repeat else "warming up"
        for contender in contenders:
            progress(f"{phase}: {contender.task}, {contender.name}")
            duration = timed(contender.run, chosen)
            if repeat:
                seconds[contender].append(duration)
    work = flops(build(model, 10, 3), torch.rand(1, 3, 32, 32))
    network = build(model, 10, 3).to(chosen)
    compute = compute_models(network, choose_precision(precision, network, x), "eval", x)
    settings = {"model": model, "batch": batch, "repeats": repeats, "eps": EPS, "alpha": ALPHA, "steps": steps,
                "targeted_steps": targeted_steps, "forward_flops": work, "precision": compute.description,
                "threads": torch.get_num_threads()}  # fmt: skip
    return BenchReport(settings, machine, _rows(seconds, batch, work, max(machine.values())), provenance(chosen))


def _contenders(
    name: str, x: Tensor, y: Tensor, steps: int, targeted: int, precision: Precision
) -> Iterator[Contender]:
    pgd = torchattack("PGD", eps=EPS, alpha=ALPHA, steps=steps)
    apgdt = {"eps": EPS, "steps": targeted, "n_classes": 10, "seed": 0}
    needs = {"MAIL-AT step": 2 * steps + 3, "MAIL-TRADES step": 2 * steps + 1 + 6, f"PGD-{steps}": 2 * steps}

    for task, recipe, plain_attack, library, loss, trainer in (
        ("MAIL-AT step", mail_at(name, steps, precision), _plain_pgd, "PGD", _mail_at, "AT"),
        ("MAIL-TRADES step", mail_trades(name, steps, precision), _plain_tpgd, "TPGD", _mail_trades, "TRADES"),
    ):
        yield Contender(task, "robustmail", our_step(recipe, x, y).run, needs[task])
        yield Contender(task, PLAIN, _plain_step(name, x, y, plain_attack, steps, loss), needs[task])
        library_step = _plain_step(name, x, y, _library_attack(library), steps, loss)
        yield Contender(task, "torchattacks", library_step, needs[task])
        art_step = _art_trainer(name, x, y, steps, trades=trainer == "TRADES")
        yield Contender(task, f"ART ({trainer})", art_step, needs[task])
    task = f"PGD-{steps}"
    plain, model = _plain(name).to(x.device).eval(), _network(name).to(x.device)
    view = compute_models(model, choose_precision(precision, model, x), "eval", x).attack
    ours, art_pgd = PGD(eps=EPS, alpha=ALPHA, steps=steps), art(
        "ProjectedGradientDescentPyTorch", eps=EPS, eps_step=ALPHA, max_iter=steps, num_random_init=1
    )  # fmt: skip
    yield Contender(task, "robustmail", lambda: ours(view, x, y), needs[task])
    yield Contender(task, PLAIN, lambda: _plain_pgd(plain, x, y, steps), needs[task])
    yield Contender(task, "plain loop, our view", lambda: _on_view(view, x, y, steps), needs[task])
    yield Contender(task, "torchattacks, our view", lambda: pgd(view, x, y), needs[task])
    yield Contender(task, "torchattacks", lambda: _library_attack("PGD")(plain, x, y, steps), needs[task])
    yield Contender(task, "ART", lambda: art_pgd(plain, x, y), needs[task])
    task = f"APGD-T, {targeted} steps"
    fast = torchattack("APGDT", **apgdt)
    with torch.no_grad():
        predicted = plain(x).argmax(1)  # as labels, so that every image is attacked
    yield Contender(task, "torchattacks, our view", lambda: fast(view, x, predicted), None)
    yield Contender(task, PLAIN, lambda: _library_apgdt(plain, x, predicted, apgdt), None)


def mail_at(name: str, steps: int, precision: Precision = "auto") -> Recipe:
    """MAIL-AT with a network by name, as it is timed."""
    return Recipe(
        data=digits(), model=name, attack=torchattack("PGD", eps=EPS, alpha=ALPHA, steps=steps), objective=AT(),
        margin=pm_adv, weighter=Sigmoid(slope=10.0, bias=-0.5), epochs=1, precision=precision,
    )  # fmt: skip


def mail_trades(name: str, steps: int, precision: Precision = "auto") -> Recipe:
    """MAIL-TRADES with a network by name, as it is timed."""
    attack = torchattack("TPGD", eps=EPS, alpha=ALPHA, steps=steps)
    weighter = Sigmoid(slope=2.0, bias=0.0)
    return mail_at(name, steps, precision).but(attack=attack, objective=TRADES(beta=BETA), weighter=weighter)


class OurStep(NamedTuple):
    """A training step that can be repeated, and the forms of the model that it calls."""

    run: Callable[[], None]
    compute: ComputeModels


def our_step(recipe: Recipe, x: Tensor, y: Tensor) -> OurStep:
    """A step of a recipe on one batch. x: [B, 3, H, W], y: [B], on the device."""
    model = _network(str(recipe.model)).to(x.device)
    compute = compute_models(model, choose_precision(recipe.precision, model, x), recipe.attack_mode, x)
    recipe, optimizer = recipe.at(0), SGD()(model.parameters())

    def run() -> None:
        # As in `fit`: on a GPU no value is read before the step is over.
        with fork_rng(), backends(), defer_reads(DeferredReads() if x.is_cuda else None):
            train_step(recipe, model, x, y, (0, 0), optimizer, compute)

    return OurStep(run, compute)


def _plain_step(
    name: str, x: Tensor, y: Tensor, attack: Callable[..., Tensor], steps: int, loss: Callable[..., Tensor]
) -> Callable[[], object]:
    model = _plain(name).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3)

    def turn() -> float:
        model.eval()
        x_adv = attack(model, x, y, steps)
        model.train()
        optimizer.zero_grad()
        total = loss(model, x, x_adv, y)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return total.item()

    return turn


def _plain_pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD as in the repositories of the papers: the parameters keep requiring gradients."""
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + ALPHA * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv.detach()


def _plain_tpgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """TRADES' inner loop as its authors wrote it: the natural images go through the model at every step."""
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        x_adv.requires_grad_()
        natural = model(x).softmax(1)
        divergence = F.kl_div(model(x_adv).log_softmax(1), natural, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, x_adv)
        x_adv = x_adv.detach() + ALPHA * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv.detach()


def _mail_at(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    logits = model(x_adv)
    weights = torch.sigmoid(-10 * (_margin(logits, y) + 0.5))
    return (weights / weights.mean() * F.cross_entropy(logits, y, reduction="none")).mean()


def _mail_trades(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    natural, logits = model(x), model(x_adv)
    weights = torch.sigmoid(-2 * _margin(logits, y))
    divergence = F.kl_div(logits.log_softmax(1), natural.softmax(1), reduction="none").sum(1)
    return F.cross_entropy(natural, y) + BETA * (weights / weights.mean() * divergence).mean()


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    p = logits.detach().softmax(1)
    true = p.gather(1, y[:, None]).squeeze(1)
    return true - p.scatter(1, y[:, None], -1.0).amax(1)


def _on_view(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The plain PGD loop on robustmail's view of the model."""
    with model_view(model) as view:
        return _plain_pgd(view, x, y, steps)


def _library_attack(which: str) -> Callable[..., Tensor]:
    import torchattacks

    def attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        x_adv: Tensor = getattr(torchattacks, which)(model, eps=EPS, alpha=ALPHA, steps=steps)(x, y)
        return x_adv

    return attack


def _library_apgdt(model: nn.Module, x: Tensor, y: Tensor, knobs: dict[str, Any]) -> Tensor:
    import torchattacks

    with fork_rng():
        x_adv: Tensor = torchattacks.APGDT(model, **knobs)(x, y)
    return x_adv.detach()


def _art_trainer(name: str, x: Tensor, y: Tensor, steps: int, trades: bool) -> Callable[[], object]:
    """A step of ART's own trainers: Madry's, or TRADES with ART's attack."""
    from robustmail.attacks.art import import_evasion

    evasion, model = import_evasion(), _plain(name)
    from art.defences import trainer
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0.0, 1.0),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )  # fmt: skip
    attack = evasion.ProjectedGradientDescent(
        classifier, eps=EPS, eps_step=ALPHA, max_iter=steps, num_random_init=1, batch_size=len(x), verbose=False
    )
    art_trainer = (
        trainer.AdversarialTrainerTRADESPyTorch(classifier, attack, beta=BETA)
        if trades else trainer.AdversarialTrainer(classifier, attack, ratio=1.0)
    )  # fmt: skip
    images, labels = x.cpu().numpy(), F.one_hot(y, 10).cpu().numpy()

    def turn() -> None:
        with contextlib.redirect_stderr(io.StringIO()), fork_rng():  # hides progress bars
            art_trainer.fit(images, labels, batch_size=len(x), nb_epochs=1)

    return turn


def _network(name: str) -> Classifier:
    with fork_rng():
        torch.manual_seed(0)
        return build(name, 10, 3)


def _plain(name: str) -> nn.Module:
    """The bare network, float32, channels first."""
    return _network(name).net.to(memory_format=torch.contiguous_format)  # type: ignore[no-any-return,call-overload]


def timed(turn: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with all that it has queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a product of two n x n matrices, the best of eight.

    n: 2048, or less where a product takes seconds, as in bfloat16 on a CPU that has no instructions for it.
    """

    def seconds(n: int, repeats: int) -> float:
        a, b = (torch.rand(n, n, dtype=dtype, device=device) for _ in range(2))
        return min(timed(lambda: a @ b, device) for _ in range(repeats))

    n = 256
    while n < 2048 and seconds(n, repeats=2) < 0.05:
        n *= 2
    return 2 * n**3 / seconds(n, repeats=8) / 1e9


def _rows(seconds: dict[Contender, list[float]], batch: int, work: int, rate: float) -> list[BenchRow]:
    rows = []
    for contender, taken in seconds.items():
        (plain,) = (s for other, s in seconds.items() if (other.task, other.name) == (contender.task, PLAIN))
        ratios = [theirs / ours for theirs, ours in zip(plain, taken, strict=True)]
        gflops = None if contender.passes is None else contender.passes * work * batch / median(taken) / 1e9
        share = None if gflops is None else gflops / rate
        speed = batch / median(taken)
        spread = median(ratios), min(ratios), max(ratios)
        rows.append(BenchRow(contender.task, contender.name, taken, speed, *spread, gflops, share))
    return rows
