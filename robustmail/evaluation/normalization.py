"""What a network expects its input to be: the conventions there are, and which of them fits, by trying."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustmail.data.dataset import Split
from robustmail.errors import ModelError, NonFiniteError, did_you_mean
from robustmail.evaluation.evaluator import batch_sizer, image_batch
from robustmail.evaluation.evidence import batchnorm_misfit, predict_differently
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.statistics import paired
from robustmail.functional import ce
from robustmail.models.classifier import Classifier

__all__ = [
    "NORMALIZATIONS",
    "Score",
    "best_fit",
    "has_larger_misfit",
    "usual_normalizations",
    "parse_normalization",
    "score",
    "score_all",
    "shortlist",
    "format_normalization",
]

Normalize = tuple[tuple[float, ...], tuple[float, ...]]

NORMALIZATIONS: dict[str, Normalize | None] = {
    "none": None,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar10-per-image": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # the mean of each image's own std
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),  # [-1, 1]
    "mnist": ((0.1307,), (0.3081,)),
    "bytes": ((0.0,), (1 / 255,)),  # 0 ... 255
}
GLANCE, FEW = 16, 64  # images for a first and a second look
CLOSE = 2  # networks of which more than one convention is looked at again
PROBE_IMAGES, SLICE = 256, 32  # images in all, and in a pass
MANY = 8  # networks, above which a glance comes first
UNLIKE = ("none", "half", "bytes", "cifar10", "mnist")  # conventions that stand for all in a glance


@dataclass(frozen=True)
class Score:
    """How one way of reading a checkpoint does on some labelled images."""

    network: str
    normalization: str
    model: Classifier
    right: Tensor
    """[N] bool"""
    loss: Tensor
    """[N] cross-entropy"""
    logits: Tensor
    """[N, classes]"""
    misfit: float | None = None
    """nats between what reaches the BatchNorms and their statistics"""

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()

    def on(self, part: Split) -> Score:
        """The same on other images."""
        return score(self.network, self.normalization, self.model, part)


def parse_normalization(text: str, channels: int) -> Normalize | None:
    """`cifar10`, `none`, `0.5/0.5` or `0.49,0.48,0.45/0.25,0.24,0.26` (mean/std). Raises ModelError."""
    who = f"--normalize {text}"
    if text in NORMALIZATIONS:
        found = NORMALIZATIONS[text]
    elif re.fullmatch(r"[-+\d.eE,\s]+/[-+\d.eE,\s]+", text):
        try:
            mean, std = (tuple(float(v) for v in half.split(",")) for half in text.split("/"))
        except ValueError as error:
            raise ModelError(who, "is no mean/std", "Write e.g. 0.5,0.5,0.5/0.25,0.25,0.25.") from error
        found = (mean, std)
    else:
        raise ModelError(who, "no such convention", did_you_mean(text, NORMALIZATIONS) + " Or write mean/std.")
    if found is not None:
        if {len(found[0]), len(found[1])} - {1, channels}:
            raise ModelError(who, f"needs one mean and one std for each of {channels} channels")
        if min(found[1]) <= 0:
            raise ModelError(who, "a standard deviation must be positive")
    return found


def usual_normalizations(channels: int) -> dict[str, Normalize | None]:
    """The conventions that images of so many channels can have."""
    return {name: c for name, c in NORMALIZATIONS.items() if c is None or len(c[0]) in (1, channels)}


def format_normalization(normalize: Normalize | None) -> str:
    """`none`, or mean/std as --normalize takes it."""
    if normalize is None:
        return "none"
    name = next((name for name, known in NORMALIZATIONS.items() if known == normalize), None)
    return name or "/".join(",".join(f"{v:.6g}" for v in half) for half in normalize)


def shortlist(networks: dict[str, nn.Module], conventions: dict[str, Normalize | None], part: Split) -> list[Score]:
    """Every network under every convention, on a few images; the better ones on more, the likelier network first.

    What fails or gives NaN has no score.
    """
    names = list(networks)
    if len(names) > MANY:
        some = [c for c in conventions if c in UNLIKE] or list(conventions)
        glance = _ranked(score_all(((n, c) for n in names for c in some), networks, conventions, part.first(GLANCE)))
        expected = sorted((s for s in glance if s.misfit is not None), key=lambda s: s.misfit or 0.0)
        names = list(dict.fromkeys([names[0], *(s.network for s in expected)]))[: MANY // 2]
        names = list(dict.fromkeys([*names, *(s.network for s in glance)]))[:MANY]
    few = _ranked(score_all(((n, c) for n in names for c in conventions), networks, conventions, part.first(FEW)))
    its_best = {s.network: s for s in reversed(few)}
    close = [n for n in networks if n in its_best and _tie(few[0], its_best[n])][:CLOSE]
    pairs = [(s.network, s.normalization) for s in (*few[:1], *its_best.values())]
    pairs += [(s.network, s.normalization) for s in few if s.network in close and _tie(few[0], s)]
    order = list(networks)
    pairs = sorted(dict.fromkeys(pairs), key=lambda pair: order.index(pair[0]))
    return list(score_all(pairs, networks, conventions, part))


def _ranked(scores: Iterable[Score]) -> list[Score]:
    """Best first: the most accurate, and the least cross-entropy among equals."""
    return sorted(scores, key=lambda s: (-s.accuracy, s.loss.mean().item()))


def score_all(
    pairs: Iterable[tuple[str, str]],
    networks: dict[str, nn.Module],
    conventions: dict[str, Normalize | None],
    part: Split,
) -> Iterator[Score]:
    """How each pair of a network and a convention does; what fails or gives NaN has no score."""
    for network, convention in pairs:
        model = Classifier(networks[network], conventions[convention]).eval()
        try:
            yield score(network, convention, model, part)
        except (RuntimeError, ValueError, IndexError, NonFiniteError):  # another size or number of channels
            continue


def best_fit(scores: Sequence[Score], part: Split) -> tuple[Score, list[Score], list[Score]]:
    """(the one that fits, those that cannot be told from it, all of them best first; scored anew where they were tied).

    Those whose BatchNorms expect other statistics than they meet fall behind. Of the others the most accurate wins;
    among those whose accuracy cannot be told apart, on all of `part`, the likelier network, and
    of its conventions the one of the least cross-entropy. Raises ModelError where nothing had a score.
    """
    if not scores:
        raise ModelError("probe", "no way of reading the file takes these images", "Pass --model and --normalize.")
    fitted = _distinct([s for s in scores if _fits(s, scores)])
    ranked = [*_ranked(fitted), *_ranked(s for s in scores if not any(s is other for other in fitted))]
    close = [s for s in fitted if _tie(ranked[0], s)]
    if len(close) > 1 and len(part.y) > len(ranked[0].right):
        again = [s.on(part) for s in close]
        close = _ranked(again)
        ranked = [*close, *(s for s in ranked if (s.network, s.normalization) not in _names(close))]
    close = [s for s in _ranked(close) if _tie(ranked[0], s)]
    best = min(close, key=lambda s: s.loss.mean().item())
    for network in dict.fromkeys(s.network for s in scores):  # the likelier reading has the benefit of the doubt
        mine = min((s for s in close if s.network == network), key=lambda s: s.loss.mean().item(), default=None)
        if mine is not None and not _is_worse(mine, best):
            best = mine
            break
    rivals = [s for s in close if s is not best and not _is_worse(s, best)]
    return best, rivals, ranked


def _distinct(scores: Sequence[Score]) -> list[Score]:
    """Without those that answer as a likelier network does, but for a percent of the images."""
    kept: list[Score] = []
    for score in scores:
        if not any(
            s.network != score.network and s.normalization == score.normalization and _alike(s, score) for s in kept
        ):
            kept.append(score)
    return kept


def _fits(score: Score, scores: Sequence[Score]) -> bool:
    return not any(has_larger_misfit(score, other) for other in scores)


def has_larger_misfit(score: Score, other: Score) -> bool:
    """Do the BatchNorms say that the other is the one, and not this?"""
    return score.misfit is not None and other.misfit is not None and score.misfit > 3 * other.misfit + 0.003


def _names(scores: Iterable[Score]) -> set[tuple[str, str]]:
    return {(s.network, s.normalization) for s in scores}


def _tie(a: Score, b: Score) -> bool:
    first, second = (a.right & ~b.right).sum().item(), (b.right & ~a.right).sum().item()
    return paired(len(a.right), int(first), int(second)).tie


def _is_worse(a: Score, b: Score) -> bool:
    """Is the cross-entropy of a larger than b's by more than two standard errors?"""
    more = (a.loss - b.loss).double()
    return bool(more.mean() > 2 * more.std() / len(more) ** 0.5)


def _alike(a: Score, b: Score) -> bool:
    """Do two answer the same, but for a percent of the images?"""
    return len(a.right) == len(b.right) and not predict_differently(a.logits.argmax(1), b.logits.argmax(1))


def score(network: str, convention: str, model: Classifier, part: Split) -> Score:
    """How a model does on some images. Raises ValueError where it gives no logits for their labels."""
    room, answers = batch_sizer(model, None), []

    def said(x: Tensor) -> Tensor:
        with exact_inference(model, room.pass_size) as view, torch.no_grad():
            logits: Tensor = view(x)
        return logits

    with batchnorm_misfit(model) as moments:
        for start in range(0, len(part.y), PROBE_IMAGES):
            x, y = image_batch(model, part, slice(start, start + PROBE_IMAGES))
            logits = room.with_oom_retry(partial(said, x))
            if not logits.isfinite().all() or logits.ndim != 2 or logits.shape[1] <= int(y.max()):
                raise ValueError("no logits for these labels")
            answers.append(logits.cpu())
    logits, y = torch.cat(answers), part.y.cpu()
    return Score(network, convention, model, logits.argmax(1) == y, ce(logits, y), logits, moments.misfit)
