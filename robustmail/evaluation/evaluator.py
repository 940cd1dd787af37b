"""Named attacks over a whole set of images; the result is how many stand, with an interval and the settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustmail.attacks.per_image_noise import per_image_noise
from robustmail.attacks.view import ModelView, check_result
from robustmail.data.adapters import read_data
from robustmail.data.dataset import Split, to_float
from robustmail.errors import ModelError, NonFiniteError, RecipeError, RobustmailError, in_brief
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, check_custom, check_eps
from robustmail.evaluation.exact_inference import (
    BatchSizer,
    SearchModel,
    exact_inference,
    is_out_of_memory,
    make_search_model,
    search_view,
)
from robustmail.evaluation.ledger import UNTRIED, Ledger, concatenate
from robustmail.evaluation.statistics import wilson
from robustmail.functional import gap
from robustmail.norms import Norm, distances
from robustmail.plugin_calls import call_plugin, plugin_error
from robustmail.records import AttackProgress, AttackResult
from robustmail.runtime import distributed
from robustmail.runtime.rng import seed_all
from robustmail.step import Adversarial, Attack
from robustmail.text import plural

__all__ = [
    "Evaluation",
    "run_attack",
    "classes_of",
    "evaluate",
    "as_floats",
    "image_batch",
    "clean_pass",
    "parse_attacks",
    "evaluate_attack",
    "attack_result",
    "worst_case",
]

BLOCK = 50  # images that an attack of somebody else's sees together; ours do not depend on the company


@dataclass(frozen=True)
class Evaluation:
    """What came out: a row per attack, and the ledger of all images. `found["aa"].accuracy` is one number."""

    rows: tuple[AttackResult, ...]
    ledger: Ledger

    def __iter__(self) -> Iterator[AttackResult]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: int | str) -> AttackResult:
        if isinstance(which, int):
            return self.rows[which]
        found = {row.name: row for row in self.rows}
        if which not in found:
            raise KeyError(f"{which} was not run; there are: {', '.join(found)}")
        return found[which]

    def __repr__(self) -> str:
        said = ", ".join(f"{row.name} {row.accuracy:.1%}" for row in self.rows)
        return f"Evaluation({len(self.ledger)} images: {said}; worst case {self.worst.accuracy:.1%})".replace("%", " %")

    @property
    def worst(self) -> AttackResult:
        """How many images stand under every attack that was run."""
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
) -> Evaluation:
    """Robust accuracy of any nn.Module that takes images in [0, 1] and returns logits, one row per attack.

    data: (images, labels), tensors or numpy arrays, uint8 or floats in [0, 1] [N, C, H, W] and integers [N]; or a data
    set or its DataLoader, read in the data set's order (see `read_data`); n: only the first n. attacks: also as one
    text, "nat,pgd100". batch: images under attack at once; it changes the memory that is needed and nothing else.
    progress: called with how far it is.
    Raises RecipeError for an unknown attack, one of one's own that keeps to a smaller ball, none at all, or a budget,
    n or batch that is none, DataError for data that are not such, AttackError
    for an attack that leaves its ball,
    ModelError for a model that fails or returns no logits, NonFiniteError for one that returns NaN.
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
        attacks = tuple(name.strip() for name in attacks.split(","))
    plans = parse_attacks(attacks, eps, classes_of(model, part), norm)
    room = batch_sizer(model, batch)
    ledger = clean_pass(model, part, room)
    rows = []
    for what in plans:
        for record in run_attack(model, part, ledger, what, seed, room):
            if progress:
                progress(record)
        rows.append(attack_result(ledger, what, seed))
    return Evaluation(tuple(rows), ledger)


def evaluate_attack(
    model: nn.Module, part: Split, what: AttackSpec, seed: int = 0
) -> Iterator[AttackProgress | AttackResult]:
    """Run one plan over a set of images, telling how far it is; the last record is the verdict.

    Several processes share the images, in blocks of CHUNK, so that each is attacked as if it were with all.
    """
    room = batch_sizer(model, None)
    index = torch.arange(len(part.y))
    index = index[index // BLOCK % distributed.world_size() == distributed.rank()]
    mine = Split(part.x[index.to(part.x.device)], part.y[index.to(part.y.device)])
    ledger = clean_pass(model, mine, room, index)
    yield from run_attack(model, mine, ledger, what, seed, room, keep=False)
    yield attack_result(concatenate(distributed.all_gather_lists([ledger])), what, seed)


def clean_pass(model: nn.Module, part: Split, room: BatchSizer, index: Tensor | None = None) -> Ledger:
    """A ledger of what the model says of the images as they are.

    Raises ModelError for a model that fails or gives no logits, NonFiniteError for NaN.
    """
    began = time.perf_counter()
    predicted, margin = torch.empty(0, dtype=torch.int64), torch.empty(0)
    while (start := len(predicted)) < len(part.y):
        said, lead = room.with_oom_retry(partial(_clean, model, part, start, room))
        predicted, margin = torch.cat([predicted, said]), torch.cat([margin, lead])
    index = torch.arange(len(part.y)) if index is None else index
    ledger = Ledger(index.cpu(), part.y.cpu(), predicted, margin)
    ledger.seconds["natural"] = time.perf_counter() - began
    return ledger


def _clean(model: nn.Module, part: Split, start: int, room: BatchSizer) -> tuple[Tensor, Tensor]:
    """(class said, probabilistic margin) of a batch of images, on the CPU."""
    x, y = image_batch(model, part, slice(start, start + room.batch))
    with exact_inference(model, room.slice) as view, torch.no_grad():
        logits = _logits(view, x)
    if logits.shape[1] <= int(y.max()):
        wrong = f"the model has {logits.shape[1]} classes, the data label {int(y.max())}"
        raise ModelError("evaluate", wrong, "Bring data of the model's own classes.")
    if not logits.isfinite().all():
        raise NonFiniteError("evaluate", "the model returns NaN or infinite logits", "Look for a broken layer.")
    return logits.argmax(1).cpu(), gap(logits.softmax(1), y).cpu()


def run_attack(
    model: nn.Module, part: Split, ledger: Ledger, what: AttackSpec, seed: int, room: BatchSizer, keep: bool = True
) -> Iterator[AttackProgress]:
    """Run one plan, entering into the ledger what each stage does; what is entered already is not done again.

    Images that are misclassified as they are count as broken and are not attacked; each stage sees only what the ones
    before left standing, regrouped over the whole set. Everything is judged in float32 on the image itself, inside
    the ball and the box. Noise belongs to the image and every pass has the same size, so a verdict depends neither on
    the batch nor on what else is in the set. Nothing outside is changed: not the model, nor its modes, nor a generator.
    """
    before: list[str] = []
    likeness: SearchModel | None = None
    for stage in what.stages:
        standing = ledger.standing(before)
        n = int(standing.sum())
        todo = (standing & (ledger.outcome(stage) == UNTRIED)).nonzero().flatten()
        while len(todo):
            began = time.perf_counter()
            if likeness is None:
                likeness = make_search_model(model, image_batch(model, part, todo[:2])[0], room.slice)
            search = (
                likeness if what.ours(stage) else SearchModel(model, False)
            )  # one's own may look at the model itself
            # An attack of which we do not know what it draws sees a fixed block of the set, whatever the batch.
            block = ledger.index[todo] // BLOCK

            def work(
                todo: Tensor = todo, block: Tensor = block, stage: str = stage, search: SearchModel = search
            ) -> Tensor:  # fmt: skip
                tried = todo[: room.batch] if what.independent(stage) else todo[block == block[0]]
                place = int(ledger.index[tried[0]])
                ledger.enter(stage, tried, *_attack(model, search, part, tried, place, what, stage, seed, room, keep))
                return tried

            together = plural(int((block == block[0]).sum()), "image")
            tried = room.with_oom_retry(work, "" if what.independent(stage) else f"attack {stage} (given {together})")
            todo = todo[~torch.isin(todo, tried)]
            took = time.perf_counter() - began
            ledger.seconds[stage] = ledger.seconds.get(stage, 0.0) + took
            room.pace(took)
            before_and_this = int(ledger.standing([*before, stage]).sum())
            yield AttackProgress(what.name, stage, n - len(todo), n, before_and_this)
        before.append(stage)


class AttackInfo(Protocol):
    """As much of a plan as a verdict needs."""

    @property
    def name(self) -> str: ...
    @property
    def stages(self) -> Iterable[str]: ...
    @property
    def settings(self) -> dict[str, str]: ...


def attack_result(ledger: Ledger, what: AttackInfo, seed: int) -> AttackResult:
    """The row of a plan whose stages have all been tried."""
    left = {"natural": int(ledger.right.sum())}
    done: list[str] = []
    for stage in what.stages:
        done.append(stage)
        left[stage] = int(ledger.standing(done).sum())
    settings = dict(what.settings)
    if done:
        settings |= {"seed": str(seed), "standing": ", ".join(f"{n} after {stage}" for stage, n in left.items())}
    seconds = sum(ledger.seconds.get(stage, 0.0) for stage in done or ("natural",))
    found = accuracy_row(what.name, int(ledger.standing(done).sum()), len(ledger), seconds, settings)
    return replace(found, stages=done)


def worst_case(ledger: Ledger) -> AttackResult:
    """How many images stand under every stage that was tried."""
    return accuracy_row("worst case", int(ledger.stands.sum()), len(ledger), sum(ledger.seconds.values()), {})


def accuracy_row(
    name: str, correct: int, n: int, seconds: float = 0.0, settings: dict[str, str] | None = None
) -> AttackResult:
    """A row of so many correct of n, with its interval."""
    low, high = wilson(correct, n)
    return AttackResult(name, correct, n, correct / n, low, high, seconds, settings or {})


def parse_attacks(attacks: Iterable[str | Attack], eps: float, classes: int, norm: Norm) -> list[AttackSpec]:
    """The plans of some attacks, each of one name (raises RecipeError, also where there is none)."""
    plans = unique_names([attack_spec(attack, eps, classes, norm) for attack in attacks])
    if not plans:
        raise RecipeError("attacks", "name none", "Write nat,pgd100.")
    for what in plans:
        check_custom(what)
    return plans


def unique_names(plans: list[AttackSpec]) -> list[AttackSpec]:
    """The same plans, each name and each stage of one's own attacks once: a second PGD becomes PGD-2."""
    seen: dict[str, AttackSpec] = {}
    for what in plans:
        name, k = what.name, 1
        while name in seen and seen[name].settings != what.settings:
            k += 1
            name = f"{what.name}-{k}"
        seen.setdefault(name, what if k == 1 else what.renamed(name))
    return list(seen.values())


def classes_of(model: nn.Module, part: Split) -> int:
    """How many logits the model gives. Raises ModelError where it fails or gives none."""
    x, _ = image_batch(model, part, slice(0, 1))
    room = BatchSizer(x.device, 1)
    room.slice = 1

    def work() -> int:
        with exact_inference(model, 1) as view, torch.no_grad():
            return int(_logits(view, x).shape[1])

    return room.with_oom_retry(work)


def batch_sizer(model: nn.Module, batch: int | None) -> BatchSizer:
    """What fits on the model's device, to begin with."""
    return BatchSizer(next((p.device for p in model.parameters()), torch.device("cpu")), batch)


def image_batch(model: nn.Module, part: Split, which: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Some images as floats, [B, C, H, W] in [0, 1], and their labels, on the model's device."""
    x = part.x[which.to(part.x.device) if isinstance(which, Tensor) else which]
    y = part.y[which.to(part.y.device) if isinstance(which, Tensor) else which]
    device = next((p.device for p in model.parameters()), x.device)
    return as_floats(x.to(device)), y.to(device)


def as_floats(x: Tensor) -> Tensor:
    """Images as they are seen: bytes become [0, 1]."""
    return x if x.is_floating_point() else to_float(x)


def _logits(view: ModelView, x: Tensor) -> Tensor:
    """[B, classes]; a model may fail in any way (raises ModelError)."""
    try:
        logits: Tensor = view(x)
    except (RobustmailError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        wrong = f"fails on images of {' x '.join(map(str, x.shape[1:]))}: {in_brief(error)}"
        raise ModelError("the model", wrong, "It takes images in [0, 1].") from error
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        wrong = f"returned {list(logits.shape)} for {len(x)} images, expected logits [B, classes]"
        raise ModelError("the model", wrong)
    return logits


def _attack(
    model: nn.Module,
    search: SearchModel,
    part: Split,
    tried: Tensor,
    place: int,
    what: AttackSpec,
    stage: str,
    seed: int,
    room: BatchSizer,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(broke, class said, distance, images or None) of the images at positions `tried`, on the CPU."""
    x, y = image_batch(model, part, tried)
    attack, frugal = what.stages[stage], room.frugal and not what.independent(stage)
    with exact_inference(model, room.slice) as view, search_view(view, search, room.slice, frugal) as seen:
        seed_all(seed, stage, place)
        with per_image_noise(x, seed, stage) if what.independent(stage) else nullcontext():
            found = call_plugin(
                "attack", attack, seen, x.clone(), y.clone()
            )  # it may write into them; we judge by ours
        x_adv = found.x if isinstance(found, Adversarial) else found
        if not isinstance(x_adv, Tensor):
            raise plugin_error("attack", attack, f"returned {type(x_adv).__name__}, expected images of {list(x.shape)}")
        bounded = what.bounds(stage)
        x_adv = check_result(stage, view, x, x_adv, what.eps if bounded else None, what.norm)
        with torch.no_grad():
            said = view(x_adv).argmax(1)
    far = distances(x, x_adv, what.norm)
    return ((said != y) & what.holds(x, x_adv)).cpu(), said.cpu(), far.cpu(), x_adv.cpu() if keep else None
