"""Evaluation in memory: attacks run over all images, and how many images no attack broke."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustmail.attacks.per_image_noise import per_image_noise
from robustmail.attacks.view import ModelView, check_result
from robustmail.data.adapters import read_data
from robustmail.data.dataset import to_float
from robustmail.data.image_files import LabelledImages
from robustmail.errors import ModelError, NonFiniteError, RecipeError, RobustmailError, in_brief
from robustmail.evaluation.attack_specs import AttackSpec, check_eps, parse_attacks, transferred
from robustmail.evaluation.attack_texts import split_attacks
from robustmail.evaluation.exact_inference import (
    BatchSizer,
    SearchModel,
    exact_inference,
    fills_cpu,
    is_out_of_memory,
    search_view,
)
from robustmail.evaluation.ledger import UNTRIED, Ledger, concatenate
from robustmail.evaluation.notebook import accuracy_card
from robustmail.evaluation.statistics import wilson
from robustmail.functional import gap
from robustmail.norms import Norm, distances
from robustmail.plugin_calls import call_plugin, plugin_error
from robustmail.records import AttackProgress, AttackResult
from robustmail.runtime import distributed
from robustmail.runtime.progress import progress
from robustmail.runtime.rng import seed_all
from robustmail.step import Adversarial, Attack
from robustmail.text import plural

__all__ = [
    "Evaluation", "as_floats", "attack_result", "classes_of", "clean_pass", "evaluate", "evaluate_attacks",
    "image_batch", "run_attack", "worst_case",
]  # fmt: skip

BLOCK = 50  # images that an attack which is not ours sees together, for its result may depend on all of them


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    rows: one per attack, in the order given; `evaluation["aa"].accuracy` is one number. ledger: what each attack did to
    each image.
    """

    rows: tuple[AttackResult, ...]
    ledger: Ledger

    def __iter__(self) -> Iterator[AttackResult]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> AttackResult:
        if isinstance(key, int):
            return self.rows[key]
        if key not in (by_name := {row.name: row for row in self.rows}):
            raise KeyError(f"{key} was not run; there are: {', '.join(by_name)}")
        return by_name[key]

    def __repr__(self) -> str:
        rows = ", ".join(f"{row.name} {row.accuracy:.1%}" for row in self.rows)
        return f"Evaluation({len(self.ledger)} images: {rows}; worst case {self.worst.accuracy:.1%})".replace("%", " %")

    def _repr_html_(self) -> str:
        return accuracy_card(f"Evaluation of {plural(len(self.ledger), 'image')}", (*self.rows, self.worst))

    @property
    def worst(self) -> AttackResult:
        """The images that no attack of this evaluation broke."""
        return worst_case(self.ledger)


def evaluate(
    model: nn.Module,
    data: Any,
    attacks: str | Iterable[str | Attack] = ("nat", "pgd100"),
    eps: float = 8 / 255,
    norm: Norm = "linf",
    n: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[AttackProgress], object] | None = None,
    transfer: nn.Module | None = None,
) -> Evaluation:
    """Measure the robust accuracy of a model, one row per attack.

    model: any nn.Module that takes images [B, C, H, W] in [0, 1] and returns logits [B, classes].
    data: (images, labels) as tensors or arrays, images [N, C, H, W] or [N, H, W, C], uint8 or floats in [0, 1], labels
    [N] integers; or a data set, or its DataLoader, read in the data set's order (see `read_data`).
    attacks: names as `attack_spec` knows them, also as one text, "nat,pgd50x10,aa"; or attacks of your own.
    eps: radius of the ball around each image, in pixels of [0, 1].
    norm: "linf" or "l2", in which eps is measured.
    n: only the first n images; by default all.
    seed: of everything that attacks draw.
    batch: images under attack at once. It changes memory and time, never the result.
    progress: called with an `AttackProgress` after each batch.
    transfer: another model; each attack is run on it too, and `model` judges the examples: rows `pgd20 from ITSCLASS`.

    Raises RecipeError: an unknown attack, an attack of your own with a smaller eps, no attack at all, or eps, n or
    batch not positive. Raises DataError: data in another form. Raises AttackError: an attack returns an image outside
    of its ball. Raises ModelError: the model fails or returns no logits. Raises NonFiniteError: it returns NaN or
    infinity.
    """
    if not isinstance(model, nn.Module):
        raise ModelError("evaluate", f"the model is a {type(model).__name__}, not an nn.Module", "Wrap it in one.")
    check_eps(eps, norm)
    for name, count in {"n": n, "batch": batch}.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise RecipeError(f"evaluate (given {name}={count!r})", "must be a whole number, at least 1",
                              "Leave it out for all images." if name == "n" else "Leave it out.")  # fmt: skip
    part = read_data("evaluate", data, n)
    if isinstance(attacks, str):
        attacks = split_attacks(attacks)
    specs = parse_attacks(attacks, eps, classes_of(model, part), norm)
    if transfer is not None:
        specs += transferred(specs, transfer, type(transfer).__name__, "in memory")
    sizer = batch_sizer(model, part, batch)
    ledger = clean_pass(model, part, sizer)
    rows = []
    for spec in specs:
        for record in run_attack(model, part, ledger, spec, seed, sizer):
            if progress:
                progress(record)
        rows.append(attack_result(ledger, spec, seed))
    return Evaluation(tuple(rows), ledger)


def evaluate_attacks(
    model: nn.Module, part: LabelledImages, specs: Sequence[AttackSpec], seed: int = 0
) -> Iterator[AttackProgress | AttackResult]:
    """Run attacks on all images after a single clean pass; yield their progress and, in the end, one result for each.

    Several processes share the images in whole blocks of BLOCK, so that the results are those of a single process.
    """
    sizer = batch_sizer(model, part)
    index = torch.arange(len(part.y))
    index = index[index // BLOCK % distributed.world_size() == distributed.rank()]
    local_part = part.take(index)
    ledger = clean_pass(model, local_part, sizer, index)
    for spec in specs:
        yield from run_attack(model, local_part, ledger, spec, seed, sizer, keep_examples=False)
    whole = concatenate(distributed.all_gather_lists([ledger]))
    yield from (attack_result(whole, spec, seed) for spec in specs)


def clean_pass(model: nn.Module, part: LabelledImages, sizer: BatchSizer, index: Tensor | None = None) -> Ledger:
    """A new ledger with the model's predictions and margins on the clean images.

    index: places of the images in the data set, [N]; by default 0 ... N - 1.
    Raises ModelError: the model fails or returns no logits for these labels. Raises NonFiniteError: it returns NaN.
    """
    start_time = time.perf_counter()
    predicted, margin = torch.empty(0, dtype=torch.int64), torch.empty(0)
    while (start := len(predicted)) < len(part.y):
        batch_predicted, batch_margin = sizer.with_oom_retry(partial(_clean_batch, model, part, start, sizer))
        predicted, margin = torch.cat([predicted, batch_predicted]), torch.cat([margin, batch_margin])
        progress("clean images", len(predicted), len(part.y))
    index = torch.arange(len(part.y)) if index is None else index
    ledger = Ledger(index.cpu(), part.y.cpu(), predicted, margin)
    ledger.seconds["natural"] = time.perf_counter() - start_time
    return ledger


def _clean_batch(model: nn.Module, part: LabelledImages, start: int, sizer: BatchSizer) -> tuple[Tensor, Tensor]:
    """(predicted classes, probabilistic margins) of a batch of images, on the CPU."""
    x, y = image_batch(model, part, slice(start, start + sizer.max_batch))
    with sizer.exact_inference(model, x[:1]) as view, torch.no_grad():
        logits = _logits(view, x)
    if logits.shape[1] <= int(y.max()):
        wrong = f"the model has {logits.shape[1]} classes, the data label {int(y.max())}"
        from_one = int(part.y.max()) == logits.shape[1] and int(part.y.min()) == 1
        todo = "Labels seem to count from 1: subtract 1." if from_one else "Bring data of the model's own classes."
        raise ModelError("evaluate", wrong, todo)
    if not logits.isfinite().all():
        raise NonFiniteError("evaluate", "the model returns NaN or infinite logits", "Look for a broken layer.")
    return logits.argmax(1).cpu(), gap(logits.softmax(1), y).cpu()


def run_attack(
    model: nn.Module,
    part: LabelledImages,
    ledger: Ledger,
    spec: AttackSpec,
    seed: int,
    sizer: BatchSizer,
    keep_examples: bool = True,
) -> Iterator[AttackProgress]:
    """Run all stages of an attack and enter their outcomes into the ledger; outcomes that it has already are not
    computed again.

    Images that are misclassified without an attack are not attacked. Each stage attacks only images that all stages
    before left standing. An image is broken if the model, in exact inference, misclassifies an example inside the ball
    and [0, 1]. Noise depends on the image and its place in the data set, so an outcome depends neither on the batch nor
    on which other images there are. Modes of the model and all random generators are as before afterwards.

    model, part: what is attacked: images [N, C, H, W] and labels [N].
    ledger: of the same images; changed in place.
    spec: the attack.
    seed: of everything that it draws.
    sizer: batch sizes; changed as time and memory require.
    keep_examples: whether the ledger keeps adversarial images.
    """
    before: list[str] = []
    search_model: SearchModel | None = None
    for stage in spec.stages:
        standing = ledger.standing(before)
        n = int(standing.sum())
        todo = (standing & (ledger.outcome(stage) == UNTRIED)).nonzero().flatten()
        while len(todo):
            start_time = time.perf_counter()
            if search_model is None:
                search_model = sizer.search_model(model, image_batch(model, part, todo[:2])[0])
            # An attack of somebody else's may look at the model itself.
            search = search_model if spec.uses_logits_only(stage) else SearchModel(model)
            tried = _attack_batch(model, search, part, ledger, todo, spec, stage, seed, sizer, keep_examples)
            todo = todo[~torch.isin(todo, tried)]
            seconds = time.perf_counter() - start_time
            ledger.seconds[stage] = ledger.seconds.get(stage, 0.0) + seconds
            sizer.adapt(seconds)
            still_standing = int(ledger.standing([*before, stage]).sum())
            yield AttackProgress(spec.name, stage, n - len(todo), n, still_standing)
        before.append(stage)


def _attack_batch(
    model: nn.Module,
    search: SearchModel,
    part: LabelledImages,
    ledger: Ledger,
    todo: Tensor,
    spec: AttackSpec,
    stage: str,
    seed: int,
    sizer: BatchSizer,
    keep_examples: bool,
) -> Tensor:
    """Attack the first of the images at positions `todo`, enter the outcomes, and return the positions attacked."""
    block = ledger.index[todo] // BLOCK
    in_first_block = block == block[0]

    def work() -> Tensor:
        # An attack of which we do not know what it draws sees a fixed block of the set, whatever the batch.
        tried = todo[: sizer.batch] if spec.is_per_image(stage) else todo[in_first_block]
        place = int(ledger.index[tried[0]])
        outcome = _attack(model, search, part, tried, place, spec, stage, seed, sizer, keep_examples)
        ledger.enter(stage, tried, *outcome)
        return tried

    who = f"attack {stage} (given {plural(int(in_first_block.sum()), 'image')})"
    return sizer.with_oom_retry(work, "" if spec.is_per_image(stage) else who)


class AttackInfo(Protocol):
    """Name, stages and settings of an attack: as much as `attack_result` needs."""

    @property
    def name(self) -> str: ...
    @property
    def stages(self) -> Iterable[str]: ...
    @property
    def settings(self) -> dict[str, str]: ...


def attack_result(ledger: Ledger, spec: AttackInfo, seed: int) -> AttackResult:
    """The row of an attack whose stages have all been run: how many images they left standing."""
    left = {"natural": int(ledger.right.sum())}
    stages: list[str] = []
    for stage in spec.stages:
        stages.append(stage)
        left[stage] = int(ledger.standing(stages).sum())
    settings = dict(spec.settings)
    if stages:
        settings |= {"seed": str(seed), "standing": ", ".join(f"{n} after {stage}" for stage, n in left.items())}
    seconds = sum(ledger.seconds.get(stage, 0.0) for stage in stages or ("natural",))
    row = accuracy_row(spec.name, int(ledger.standing(stages).sum()), len(ledger), seconds, settings)
    return replace(row, stages=stages)


def worst_case(ledger: Ledger) -> AttackResult:
    """A row for all stages that were run: how many images none of them broke."""
    return accuracy_row("worst case", int(ledger.stands.sum()), len(ledger), sum(ledger.seconds.values()), {})


def accuracy_row(
    name: str, correct: int, n: int, seconds: float = 0.0, settings: dict[str, str] | None = None
) -> AttackResult:
    """A row for `correct` of `n` images, with Wilson's 95 % interval."""
    low, high = wilson(correct, n)
    return AttackResult(name, correct, n, correct / n, low, high, seconds, settings or {})


def classes_of(model: nn.Module, part: LabelledImages) -> int:
    """The number of logits that the model returns. Raises ModelError: it fails on an image, or returns no logits."""
    x, _ = image_batch(model, part, slice(0, 1))
    sizer = BatchSizer(x.device, 1)
    sizer.pass_size = 1

    def work() -> int:
        with exact_inference(model, 1) as view, torch.no_grad():
            return int(_logits(view, x).shape[1])

    return sizer.with_oom_retry(work)


def batch_sizer(model: nn.Module, part: LabelledImages, batch: int | None = None) -> BatchSizer:
    """A BatchSizer for the model's device and images of this size; batch: images under attack at once, if given."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return BatchSizer(device, batch, fills_cpu(device, part.x.shape))


def image_batch(model: nn.Module, part: LabelledImages, which: slice | Tensor) -> tuple[Tensor, Tensor]:
    """(images [B, C, H, W] float in [0, 1], labels [B]) on the model's device; which: a slice, or positions [B]."""
    which = which.to(part.y.device) if isinstance(which, Tensor) else which
    x, y = part.x[which], part.y[which]
    device = next((p.device for p in model.parameters()), x.device)
    return as_floats(x.to(device)), y.to(device)


def as_floats(x: Tensor) -> Tensor:
    """Images in [0, 1]: uint8 are divided by 255, floats stay as they are."""
    return x if x.is_floating_point() else to_float(x)


def _logits(view: ModelView, x: Tensor) -> Tensor:
    """Logits [B, classes]. Raises ModelError: the model fails, in whatever way, or returns something else."""
    try:
        logits: Tensor = view(x)
    except (RobustmailError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        wrong = f"fails on images of {' x '.join(map(str, x.shape[1:]))}: {in_brief(error)}"
        kinds = {str(p.dtype).removeprefix("torch.") for p in view.parameters() if p.is_floating_point()} - {"float32"}
        if kinds:
            wrong = f"its parameters are {' and '.join(sorted(kinds))}, images are float32 ({in_brief(error)})"
        todo = "Call model.float() first." if kinds else "It takes images in [0, 1]."
        raise ModelError("the model", wrong, todo) from error
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ModelError(
            "the model", f"returned {list(logits.shape)} for {len(x)} images, expected logits [B, classes]"
        )
    return logits


def _attack(
    model: nn.Module,
    search: SearchModel,
    part: LabelledImages,
    tried: Tensor,
    place: int,
    spec: AttackSpec,
    stage: str,
    seed: int,
    sizer: BatchSizer,
    keep_examples: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(whether broken, predicted class, distance, examples or None) of the images at positions `tried`, on the CPU.

    place: of the first image in the data set, which seeds attacks that are not per image.
    """
    x, y = image_batch(model, part, tried)
    attack, is_per_image = spec.stages[stage], spec.is_per_image(stage)
    with (
        sizer.exact_inference(model, x[:1]) as view,
        search_view(view, search, sizer, sizer.recompute and not is_per_image) as search_model,
    ):
        seed_all(seed, stage, place)
        with per_image_noise(x, seed, stage) if is_per_image else nullcontext():
            result = call_plugin("attack", attack, search_model, x.clone(), y.clone())  # it may write into its copies
        x_adv = result.x if isinstance(result, Adversarial) else result
        if not isinstance(x_adv, Tensor):
            raise plugin_error("attack", attack, f"returned {type(x_adv).__name__}, expected images of {list(x.shape)}")
        eps = spec.eps if spec.must_stay_in_ball(stage) else None
        x_adv = check_result(stage, view, x, x_adv, eps, spec.norm)
        with torch.no_grad():
            predicted = view(x_adv).argmax(1)
    distance = distances(x, x_adv, spec.norm)
    is_broken = (predicted != y) & spec.in_ball(x, x_adv)
    return is_broken.cpu(), predicted.cpu(), distance.cpu(), x_adv.cpu() if keep_examples else None
