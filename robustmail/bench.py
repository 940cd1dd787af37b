"""Measure the speed of robustmail, of the plain loop as papers publish it, of torchattacks and of ART on this machine.

All contenders get the same network, batch, eps, steps and threads. In each repeat each of them runs once, so that a
ratio compares measurements of the same minute.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.attacks.art import art, import_evasion
from robustmail.attacks.pgd import PGD
from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import model_view
from robustmail.data.sources import digits
from robustmail.margins import pm_adv
from robustmail.models.classifier import Classifier, build
from robustmail.models.precision import Precision, backends, choose_precision, compute_models, flops
from robustmail.objectives import AT, TRADES
from robustmail.optimizers import SGD
from robustmail.recipe import Recipe
from robustmail.runtime.deferred import DeferredReads, defer_reads
from robustmail.runtime.devices import pick_device
from robustmail.runtime.provenance import provenance
from robustmail.runtime.rng import fork_rng
from robustmail.train.train_step import make_update, train_step
from robustmail.weighters import Sigmoid

__all__ = ["BenchReport", "BenchRow", "bench"]

EPS, ALPHA, BETA = 8 / 255, 2 / 255, 5.0
PLAIN = "plain loop"


@dataclass(frozen=True)
class BenchRow:
    """One contender in one task, over the repeats."""

    task: str
    who: str
    seconds: list[float]
    """of each repeat"""
    images_per_second: float
    """median"""
    ratio: float
    """median over the repeats of the plain loop's seconds divided by the contender's"""
    low: float
    """lowest such ratio"""
    high: float
    """highest such ratio"""
    gflops: float | None
    """useful GFLOP/s: the operations that the method needs, per second; None where they depend on the images"""
    share: float | None
    """gflops divided by the faster of `BenchReport.machine`"""


@dataclass(frozen=True)
class BenchReport:
    """Results of a benchmark, its settings, and the machine."""

    settings: dict[str, Any]
    machine: dict[str, float]
    """GFLOP/s of a matrix product, in fp32 and bf16"""
    rows: list[BenchRow]
    provenance: dict[str, Any]


class Contender(NamedTuple):
    """An implementation of a task."""

    task: str
    name: str
    run: Callable[[], object]
    """does the task once"""
    passes: int | None
    """forward passes of the batch that the task needs, a backward pass counted as one; None if they vary"""


def bench(
    model: str = "cifar_resnet18",
    batch: int = 128,
    repeats: int = 3,
    steps: int = 10,
    targeted_steps: int = 3,
    precision: Precision = "auto",
    device: str = "auto",
    progress: Callable[[str], object] = lambda _: None,
) -> BenchReport:
    """Measure every contender in every task, in turn, `repeats` times after one warm-up.

    The images are random, 3 x 32 x 32: the speed does not depend on their content.

    model: a timm name.
    batch: images in the batch.
    repeats: measurements of each contender.
    steps: steps of the attacks in training and of PGD.
    targeted_steps: steps of APGD-T.
    precision: of robustmail's contenders, "auto", "fp32" or "bf16".
    device: "auto", "cpu", "cuda" or another name of torch's.
    progress: called with a line of text before each measurement.

    Raises ModelError for an unknown model, DeviceError for a device that does not exist.
    """
    torch_device = pick_device(device)
    x = torch.rand(batch, 3, 32, 32, device=torch_device)
    y = torch.randint(10, (batch,), device=torch_device)
    contenders = list(_contenders(model, x, y, steps, targeted_steps, precision))
    machine = {
        "fp32": _matmul_gflops(torch.float32, torch_device),
        "bf16": _matmul_gflops(torch.bfloat16, torch_device),
    }
    seconds: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender in contenders:
            stage = f"repeat {repeat} of {repeats}" if repeat else "warming up"
            progress(f"{stage}: {contender.task}, {contender.name}")
            elapsed = _seconds(contender.run, torch_device)
            if repeat:
                seconds[contender].append(elapsed)
    forward_flops = flops(build(model, 10, 3), torch.rand(1, 3, 32, 32))
    network = build(model, 10, 3).to(torch_device)
    models = compute_models(network, choose_precision(precision, network, x), "eval", x)
    settings = {
        "model": model,
        "batch": batch,
        "repeats": repeats,
        "eps": EPS,
        "alpha": ALPHA,
        "steps": steps,
        "targeted_steps": targeted_steps,
        "forward_flops": forward_flops,
        "precision": models.said,
    }
    rows = _rows(seconds, batch, forward_flops, max(machine.values()))
    return BenchReport(settings, machine, rows, provenance(torch_device))


def _contenders(
    name: str, x: Tensor, y: Tensor, steps: int, targeted_steps: int, precision: Precision
) -> Iterator[Contender]:
    pgd = torchattack("PGD", eps=EPS, alpha=ALPHA, steps=steps)
    tpgd = torchattack("TPGD", eps=EPS, alpha=ALPHA, steps=steps)
    at = Recipe(
        data=digits(),
        model=name,
        attack=pgd,
        objective=AT(),
        margin=pm_adv,
        epochs=1,
        weight=Sigmoid(slope=10.0, bias=-0.5),
        precision=precision,
    )
    trades = at.but(attack=tpgd, objective=TRADES(beta=BETA), weight=Sigmoid(slope=2.0, bias=0.0))

    task, passes = "MAIL-AT step", 2 * steps + 3
    yield Contender(task, "robustmail", _our_step(at, x, y), passes)
    yield Contender(task, PLAIN, _plain_step(name, x, y, _plain_pgd, steps, _mail_at), passes)
    yield Contender(task, "torchattacks", _plain_step(name, x, y, _library_attack("PGD"), steps, _mail_at), passes)
    yield Contender(task, "ART (AT)", _art_trainer(name, x, y, steps, trades=False), passes)

    task, passes = "MAIL-TRADES step", 2 * steps + 1 + 6
    yield Contender(task, "robustmail", _our_step(trades, x, y), passes)
    yield Contender(task, PLAIN, _plain_step(name, x, y, _plain_tpgd, steps, _mail_trades), passes)
    yield Contender(task, "torchattacks", _plain_step(name, x, y, _library_attack("TPGD"), steps, _mail_trades), passes)
    yield Contender(task, "ART (TRADES)", _art_trainer(name, x, y, steps, trades=True), passes)

    yield from _attack_contenders(name, x, y, steps, targeted_steps, precision)


def _attack_contenders(
    name: str, x: Tensor, y: Tensor, steps: int, targeted_steps: int, precision: Precision
) -> Iterator[Contender]:
    plain, model = _plain(name).to(x.device).eval(), _network(name).to(x.device)
    view = compute_models(model, choose_precision(precision, model, x), "eval", x).attack

    task, passes = f"PGD-{steps}", 2 * steps
    ours, library = PGD(eps=EPS, alpha=ALPHA, steps=steps), torchattack("PGD", eps=EPS, alpha=ALPHA, steps=steps)
    art_pgd = art("ProjectedGradientDescentPyTorch", eps=EPS, eps_step=ALPHA, max_iter=steps, num_random_init=1)
    yield Contender(task, "robustmail", lambda: ours(view, x, y), passes)
    yield Contender(task, PLAIN, lambda: _plain_pgd(plain, x, y, steps), passes)
    yield Contender(task, "plain loop, our view", lambda: _plain_pgd_on_view(view, x, y, steps), passes)
    yield Contender(task, "torchattacks, our view", lambda: library(view, x, y), passes)
    yield Contender(task, "torchattacks", lambda: _library_attack("PGD")(plain, x, y, steps), passes)
    yield Contender(task, "ART", lambda: art_pgd(plain, x, y), passes)

    task = f"APGD-T, {targeted_steps} steps"
    settings = {"eps": EPS, "steps": targeted_steps, "n_classes": 10, "seed": 0}
    apgdt = torchattack("APGDT", **settings)
    with torch.no_grad():
        predicted = plain(x).argmax(1)  # as labels, because APGD-T does not attack a misclassified image
    yield Contender(task, "torchattacks, our view", lambda: apgdt(view, x, predicted), None)
    yield Contender(task, PLAIN, lambda: _library_apgdt(plain, x, predicted, settings), None)


def _our_step(recipe: Recipe, x: Tensor, y: Tensor) -> Callable[[], object]:
    model = _network(str(recipe.model)).to(x.device)
    models = compute_models(model, choose_precision(recipe.precision, model, x), recipe.attack_mode, x)
    recipe, optimizer = recipe.at(0), SGD()(model.parameters())

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        # As in `fit`: on a GPU no value is read before the step has ended.
        with fork_rng(), backends(), defer_reads(DeferredReads() if x.is_cuda else None):
            train_step(recipe, model, x, y, (0, 0), make_update(recipe, optimizer), models)

    return run


def _plain_step(
    name: str, x: Tensor, y: Tensor, attack: Callable[..., Tensor], steps: int, loss: Callable[..., Tensor]
) -> Callable[[], object]:
    model = _plain(name).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3)

    def run() -> float:
        model.eval()
        x_adv = attack(model, x, y, steps)
        model.train()
        optimizer.zero_grad()
        total = loss(model, x, x_adv, y)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return total.item()

    return run


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


def _plain_pgd_on_view(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The plain loop on the model as robustmail's attacks see it."""
    with model_view(model) as view:
        return _plain_pgd(view, x, y, steps)


def _library_attack(name: str) -> Callable[..., Tensor]:
    import torchattacks

    def attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        x_adv: Tensor = getattr(torchattacks, name)(model, eps=EPS, alpha=ALPHA, steps=steps)(x, y)
        return x_adv

    return attack


def _library_apgdt(model: nn.Module, x: Tensor, y: Tensor, settings: dict[str, Any]) -> Tensor:
    import torchattacks

    with fork_rng():
        x_adv: Tensor = torchattacks.APGDT(model, **settings)(x, y)
    return x_adv.detach()


def _art_trainer(name: str, x: Tensor, y: Tensor, steps: int, trades: bool) -> Callable[[], object]:
    """One batch through ART's trainer: adversarial training, or TRADES with the same attack."""
    evasion, model = import_evasion(), _plain(name)  # imports art, without its logging
    from art.defences import trainer
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )
    attack = evasion.ProjectedGradientDescent(
        classifier, eps=EPS, eps_step=ALPHA, max_iter=steps, num_random_init=1, batch_size=len(x), verbose=False
    )
    if trades:
        art_trainer = trainer.AdversarialTrainerTRADESPyTorch(classifier, attack, beta=BETA)
    else:
        art_trainer = trainer.AdversarialTrainer(classifier, attack, ratio=1.0)
    images, labels = x.cpu().numpy(), F.one_hot(y, 10).cpu().numpy()

    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()), fork_rng():  # progress bars
            art_trainer.fit(images, labels, batch_size=len(x), nb_epochs=1)

    return run


def _network(name: str) -> Classifier:
    with fork_rng():
        torch.manual_seed(0)
        return build(name, 10, 3)


def _plain(name: str) -> nn.Module:
    """The network without its Classifier, float32, channels first."""
    return _network(name).net.to(memory_format=torch.contiguous_format)  # type: ignore[no-any-return,call-overload]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _matmul_gflops(dtype: torch.dtype, device: torch.device, n: int = 2048) -> float:
    """GFLOP/s of an n x n matrix product, the best of eight."""
    a, b = torch.rand(n, n, dtype=dtype, device=device), torch.rand(n, n, dtype=dtype, device=device)
    return max(2 * n**3 / _seconds(lambda: a @ b, device) for _ in range(8)) / 1e9


def _rows(
    seconds: dict[Contender, list[float]], batch: int, forward_flops: int, machine_gflops: float
) -> list[BenchRow]:
    rows = []
    for contender, times in seconds.items():
        (plain,) = (s for c, s in seconds.items() if (c.task, c.name) == (contender.task, PLAIN))
        ratios = [plain_seconds / own_seconds for plain_seconds, own_seconds in zip(plain, times, strict=True)]
        gflops = None
        if contender.passes is not None:
            gflops = contender.passes * forward_flops * batch / median(times) / 1e9
        rows.append(
            BenchRow(
                task=contender.task,
                who=contender.name,
                seconds=times,
                images_per_second=batch / median(times),
                ratio=median(ratios),
                low=min(ratios),
                high=max(ratios),
                gflops=gflops,
                share=None if gflops is None else gflops / machine_gflops,
            )
        )
    return rows
