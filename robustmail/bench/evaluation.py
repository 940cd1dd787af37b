"""Speed of an evaluation beside the official AutoAttack and a plain PGD loop: three networks, by stage, in one run."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.attacks.autoattack import AutoAttack
from robustmail.attacks.pgd import PGD
from robustmail.data.dataset import Split
from robustmail.data.sources import digits
from robustmail.errors import RobustmailError
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec
from robustmail.evaluation.evaluator import batch_sizer, clean_pass, run_attack
from robustmail.models.classifier import Classifier, build
from robustmail.records import EvaluationBenchRow
from robustmail.runtime.rng import fork_rng

__all__ = ["NETWORKS", "bench_evaluation"]

NETWORKS = {"small_cnn": (1, 28), "cifar_resnet18_w8": (3, 32), "cifar_resnet18_w16": (3, 32)}  # channels, side
EPS, BATCH = 0.05, 250  # BATCH: of the reference, its default
EPOCHS = 8  # of adversarial training before the measurement, so that some images stand


def bench_evaluation(
    n: int = 100, quick: bool = False, networks: dict[str, tuple[int, int]] | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Iterator[EvaluationBenchRow]:  # fmt: skip
    """Time pgd20 and each stage of AutoAttack, ours and the reference's in turn, on the same network and images; each
    row comes when its stage has ended. The reference runs in a spawned process, so a script calls this function under
    `if __name__ == "__main__"`.

    n: images, enlarged digits.
    quick: a tenth of the iterations and queries, for both.
    networks: name -> (channels, side of the images); by default NETWORKS.
    progress: called with a line of text before each stage.

    Raises RobustmailError: pyautoattack, the official code as a package, is not installed.
    """
    _reference("autoattack")
    chosen = (networks or NETWORKS).items()
    rows = (_rows(name, channels, side, n, quick, progress) for name, (channels, side) in chosen)
    return chain.from_iterable(rows)


def _rows(
    network: str, channels: int, side: int, n: int, quick: bool, progress: Callable[[str], object]
) -> Iterator[EvaluationBenchRow]:
    """Train the network and time its stages."""
    progress(f"{network}: training")
    data = digits()()
    train, test = (_images(part, channels, side) for part in (data.train.first(512), data.test.first(n)))
    yield from _stages(network, _hardened(network, channels, train), test, quick, progress)


def _stages(
    network: str, model: Classifier, test: Split, quick: bool, progress: Callable[[str], object]
) -> Iterator[EvaluationBenchRow]:
    sizer, plain = batch_sizer(model, test), _plain(model)
    specs = [attack_spec("pgd20", EPS, 10), *_autoattack(quick)]
    left = clean_pass(model, test, sizer).right
    # The reference has a process of its own, as where somebody runs it: `keep_freed_memory` makes ours faster.
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        for spec in specs:
            (stage,) = spec.stages
            is_loop = stage == "pgd20"
            progress(f"{network}: {stage}")
            part = test if is_loop else test.take(left)
            began = time.perf_counter()
            ledger = clean_pass(model, part, sizer)
            for _ in run_attack(model, part, ledger, spec, 0, sizer, keep_examples=False):
                pass
            ours, stands = time.perf_counter() - began, ledger.standing([stage])
            work: tuple[Any, ...] = (_plain_pgd, plain, part) if is_loop else (_official, plain, part, stage, quick)
            reference, theirs = other.submit(_timed, torch.get_num_threads(), *work).result()
            yield EvaluationBenchRow(network, stage, len(part.y), ours, reference, int(stands.sum()), int(theirs.sum()))
            if not is_loop:
                left[left.nonzero().flatten()[~stands]] = False
                if not left.any():
                    return


def _timed(threads: int, work: Callable[..., Tensor], *arguments: Any) -> tuple[float, Tensor]:
    """(seconds that it took, what it returned)."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - began, result


def _autoattack(quick: bool) -> Iterator[AttackSpec]:
    """The stages of AutoAttack, each as an attack of its own."""
    for stage, attack in AutoAttack(eps=EPS).stages(10).items():
        count = "n_queries" if stage == "square" else "steps"
        shorter = replace(attack, **{count: getattr(attack, count) // 10}) if quick else attack
        yield AttackSpec(stage, {stage: shorter}, EPS, "linf")


def _official(model: nn.Module, part: Split, stage: str, quick: bool) -> Tensor:
    """Which images stand under a stage of the official code, [B]."""
    attack = _reference("autoattack").AutoAttack(model, attacks=[stage], eps=EPS, version="custom", seed=0)
    attack.apgd.n_restarts = 1
    if quick:
        for one in (attack.apgd, attack.apgd_targeted, attack.fab):
            one.n_iter //= 10
        attack.square.n_queries //= 10
    for one in (attack.apgd, attack.apgd_targeted):  # derived from the iterations when it was made
        one.n_iter_2, one.n_iter_min, one.size_decr = (max(int(share * one.n_iter), 1) for share in (0.22, 0.06, 0.03))
    with fork_rng():
        _, predicted = attack.run_standard_evaluation(part.x, part.y, batch_size=BATCH)
    stands: Tensor = predicted == part.y
    return stands


def _plain_pgd(model: nn.Module, part: Split) -> Tensor:
    """PGD-20 as one writes it in ten lines, [B]: which images stand."""
    stands = []
    for x, y in zip(part.x.split(BATCH), part.y.split(BATCH), strict=True):
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(20):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = x_adv.detach() + EPS / 8 * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        with torch.no_grad():
            stands.append(model(x_adv).argmax(1) == y)
    return torch.cat(stands)


def _images(part: Split, channels: int, side: int) -> Split:
    """The images enlarged to `side`, in grey or three equal channels, as floats."""
    x = F.interpolate(part.x.float() / 255, size=(side, side), mode="bilinear")
    return Split(x.clamp(0, 1).expand(-1, channels, -1, -1).contiguous(), part.y)


def _hardened(name: str, channels: int, train: Split) -> Classifier:
    """The network after a few epochs of adversarial training, in eval mode."""
    with fork_rng():
        torch.manual_seed(0)
        model, attack = build(name, 10, channels), PGD(eps=EPS, alpha=EPS, steps=2)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(EPOCHS):
            for x, y in zip(train.x.split(64), train.y.split(64), strict=True):
                x_adv = attack(model, x, y).x
                optimizer.zero_grad()
                F.cross_entropy(model.train()(x_adv), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval()


def _plain(model: Classifier) -> nn.Module:
    """The same network as a bare module, channels first, as somebody hands it to the official code."""
    plain = copy.deepcopy(model.net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return nn.Sequential(plain).eval()


def _reference(module: str) -> Any:
    try:
        return importlib.import_module(f"pyautoattack.{module}")
    except ImportError as error:
        wrong = "needs pyautoattack, the official AutoAttack as a package, beside which it measures"
        raise RobustmailError("bench --evaluation", wrong, "pip install 'robustmail[bench]'") from error
