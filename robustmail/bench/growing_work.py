"""The work whose growth is measured: each function does it once at one size, with networks of next to no cost.

So what is seen is what robustmail adds, which a large network hides. Images are random, [N, 1, 8, 8].
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustmail.attacks.pgd import PGD
from robustmail.data.dataset import Split
from robustmail.data.sources import digits
from robustmail.data.testsets import TestSet
from robustmail.evaluation.curve import run_curve
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.runner import run_evaluation
from robustmail.evaluation.task import EvaluationTask
from robustmail.margin_lab.measure import MarginTask, measure_margins
from robustmail.margins import pm_adv, target_confidence
from robustmail.models.classifier import build
from robustmail.objectives import TRADES, SelfAdaptive
from robustmail.optimizers import SGD
from robustmail.recipe import Recipe
from robustmail.runtime.distributed import shard_batch
from robustmail.runtime.files import atomic_write_json, make_folder
from robustmail.runtime.rng import fork_rng, generator
from robustmail.step import Context
from robustmail.train.memory import MemoryTables
from robustmail.train.train_step import train_step
from robustmail.trials.execute import Outcome, run_here
from robustmail.trials.fork import Job
from robustmail.trials.grid import cells
from robustmail.trials.study import Study
from robustmail.weighters import Sigmoid

__all__ = ["CURVES", "Curve", "Work", "training_step"]

Work = Callable[[], object]
EPS, CLASSES = 0.1, 10
BATCH = 128
DECADES = (10, 18, 32, 56, 100, 180, 320, 560, 1000)  # a factor of 100, four points to each decade
FEW = (1, 2, 4, 8, 16, 24)  # of what costs seconds each
ATTACKS = ("nat", PGD(eps=EPS, alpha=EPS / 4, steps=5))


@dataclass(frozen=True)
class Curve:
    """One quantity of which time and memory are a function.

    what: the work. by: what its size counts. make: size -> the work, prepared; the preparation is not timed.
    sizes: at which it is measured, ascending.
    """

    what: str
    by: str
    make: Callable[[int], Work]
    sizes: tuple[int, ...] = DECADES

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.what} by {self.by}"


def tiny(classes: int, channels: int) -> nn.Module:
    """A network with one hidden layer for images of 8 x 8."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 16), nn.ReLU(), nn.Linear(16, classes))


def training_step(batch: int, classes: int = CLASSES) -> Work:
    """A step of MAIL-TRADES on a batch."""
    attack = PGD(eps=EPS, alpha=EPS / 4, steps=2, loss="kl")
    recipe = Recipe(data=digits(), model=tiny, attack=attack, objective=TRADES(beta=5.0), margin=pm_adv,
                    weighter=Sigmoid(slope=2.0, bias=0.0), epochs=1, precision="fp32")  # fmt: skip
    x, y = _images(batch, classes)
    model = _network(classes)
    optimizer = SGD()(model.parameters())
    now = recipe.at(0)

    def work() -> None:
        with fork_rng(), shard_batch(batch) as rows:
            train_step(now, model, x[rows], y[rows], (0, 0), optimizer)

    return work


def remembering_epoch(images: int, batch: int = BATCH) -> Work:
    """An epoch of self-adaptive training, which reads and writes a row of each image."""
    recipe = Recipe(data=digits(), model=tiny, attack=PGD(eps=EPS, alpha=EPS / 4, steps=1),
                    objective=SelfAdaptive(start=0), margin=target_confidence(), weighter=Sigmoid(slope=2.0, bias=0.0),
                    epochs=1, precision="fp32")  # fmt: skip
    x, y = _images(images)
    model, now = _network(), recipe.at(0)
    optimizer = SGD()(model.parameters())

    def work() -> None:
        tables = MemoryTables(recipe.memory, [y], CLASSES, torch.device("cpu"))
        for index in torch.randperm(images, generator=generator("growth", images)).split(batch):
            context = Context(index, 0, 1, recipe.memory, tables.rows(index, y[index]))
            with fork_rng():
                train_step(now, model, x[index], y[index], (0, 0), optimizer, context=context)
            tables.write(index, y[index], context.written)

    return work


def evaluation(images: int, classes: int = CLASSES) -> Work:
    """`robustmail eval` with PGD into a new folder: ledger, examples, sanity checks."""
    task = EvaluationTask(*_subject(images, classes), ATTACKS, EPS)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for _ in run_evaluation(task, Path(folder) / "evaluation"):
                pass

    return work


def curve_by_eps(count: int, images: int = 20) -> Work:
    """`robustmail eval --eps` with so many eps."""
    subject, data = _subject(images)
    tasks = [EvaluationTask(subject, data, ("nat", "pgd5"), EPS * (k + 1) / count) for k in range(count)]

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for _ in run_curve(tasks, Path(folder) / "curve"):
                pass

    return work


def margin_lab(images: int) -> Work:
    """`robustmail margins` with one margin."""
    task = MarginTask(*_subject(images), {"pm_adv": pm_adv}, EPS, against=ATTACKS[1:], steps=2)
    return lambda: [None for _ in measure_margins(task)]


def grid(seeds: int, rows: int = 1) -> Work:
    """A grid whose runs are over at once: planned, carried out, summarised."""
    overs = [f"weighter.slope={','.join(str(k + 1) for k in range(rows))}"]

    def perform(job: Job) -> Outcome:
        make_folder(job.folder)
        accuracy = generator("growth", str(job.folder.name)).initial_seed() % 100 / 100
        atomic_write_json(job.folder / "results.json", {"complete": job.until is None, "attacks": [
            {"name": "nat", "accuracy": accuracy}, {"name": "pgd100", "accuracy": accuracy / 2}]})  # fmt: skip
        return Outcome()

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            study = Study(cells(["quickstart"], overs, [], range(seeds)), Path(folder), "trials.json", "growth")
            for _ in study.carry_out(run_here(perform)):
                pass
            [asdict(row) for row in study.rows()]

    return work


def _times(factor: int) -> tuple[int, ...]:
    return tuple(factor * size for size in DECADES)


CURVES = (
    Curve("training step", "images in the batch", training_step, _times(10)),
    Curve("training step", "classes", lambda classes: training_step(BATCH, classes)),
    Curve("step with memory", "images in the batch", lambda images: remembering_epoch(images, images), _times(10)),
    Curve("epoch with memory", "images", remembering_epoch, _times(100)),
    Curve("evaluation", "images", evaluation, _times(10)),
    Curve("evaluation", "classes", lambda classes: evaluation(200, classes)),
    Curve("evaluation", "number of eps", curve_by_eps, FEW),
    Curve("margin lab", "images", margin_lab, _times(2)),
    Curve("grid", "seeds", grid),
    Curve("grid", "rows of two seeds", lambda rows: grid(2, rows), tuple(size // 2 for size in DECADES)),
)


def _images(n: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """(images [n, 1, 8, 8], labels [n], of which the largest occurs)."""
    x = torch.rand(n, 1, 8, 8, generator=generator("growth", n))
    return x, (torch.arange(n) * 7919 + classes - 1) % classes


def _network(classes: int = CLASSES) -> nn.Module:
    with fork_rng():
        torch.manual_seed(0)
        return build(tiny, classes, 1)


def _subject(images: int, classes: int = CLASSES) -> tuple[LoadedModel, TestSet]:
    """(the model, the images, on which the model is right for nine in ten)."""
    x, y = _images(images, classes)
    model = _network(classes).eval()
    with torch.no_grad():
        predicted = model(x).argmax(1)
    y = torch.where(torch.arange(images) % 10 > 0, predicted, y)
    data = TestSet("random images", Split(x, y), classes)
    return LoadedModel.of(model, data), data
