"""How a network wants its images normalised: the usual normalisations, and which of them fits labelled images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from robustmail.data.image_files import LabelledImages
from robustmail.errors import ModelError, NonFiniteError, did_you_mean
from robustmail.evaluation.evaluator import batch_sizer, image_batch
from robustmail.evaluation.evidence import batchnorm_misfit, predict_differently
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.statistics import paired
from robustmail.functional import ce
from robustmail.models.classifier import Classifier
from robustmail.runtime.progress import progress

__all__ = [
    "NORMALIZATIONS",
    "Score",
    "best_fit",
    "has_larger_misfit",
    "usual_normalizations",
    "parse_normalization",
    "refuse_double_normalization",
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
FIRST_IMAGES, SECOND_IMAGES, PROBE_IMAGES = 16, 64, 256  # in three rounds of the shortlist
SCORE_PASS = 64  # images in a pass: to compare networks needs no last bits
MAX_TIED = 2  # networks of which the third round scores more than one normalisation
MAX_NETWORKS = 8  # with more, the first round sorts out networks
FIRST_NORMALIZATIONS = (
    "none",
    "half",
    "bytes",
    "cifar10",
    "mnist",
)  # unlike each other: they stand for all in that round


@dataclass(frozen=True)
class Score:
    """How a network under a normalisation does on N labelled images.

    network, normalization: their names. model: the two together. right: [N] bool, classified correctly. loss: [N],
    cross-entropy. logits: [N, classes]. misfit: nats between the statistics of what reaches the BatchNorms and those
    that they keep; None without BatchNorm.
    """

    network: str
    normalization: str
    model: Classifier
    right: Tensor
    loss: Tensor
    logits: Tensor
    misfit: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return self.right.double().mean().item()

    def on(self, part: LabelledImages) -> Score:
        """The score of the same pair on other images."""
        return score(self.network, self.normalization, self.model, part)


def parse_normalization(text: str, channels: int) -> Normalize | None:
    """(mean, std) of a text; None for `none`.

    text: a name in NORMALIZATIONS, or mean/std as `0.5/0.5` or `0.49,0.48,0.45/0.25,0.24,0.26`. channels: of the
    images.
    Raises ModelError: another text, another number of channels, or a std that is not positive.
    """
    who = f"--normalize {text}"
    if text in NORMALIZATIONS:
        pair = NORMALIZATIONS[text]
    elif re.fullmatch(r"[-+\d.eE,\s]+/[-+\d.eE,\s]+", text):
        try:
            mean, std = (tuple(float(v) for v in half.split(",")) for half in text.split("/"))
        except ValueError as error:
            raise ModelError(who, "not a mean/std", "Write e.g. 0.5,0.5,0.5/0.25,0.25,0.25.") from error
        pair = (mean, std)
    else:
        raise ModelError(who, "no such convention", did_you_mean(text, NORMALIZATIONS) + " Or write mean/std.")
    if pair is not None:
        if {len(pair[0]), len(pair[1])} - {1, channels}:
            raise ModelError(who, f"needs one mean and one std for each of {channels} channels")
        if min(pair[1]) <= 0:
            raise ModelError(who, "a standard deviation must be positive")
    return pair


def usual_normalizations(channels: int) -> dict[str, Normalize | None]:
    """The usual normalisations of images with so many channels, by name."""
    return {name: c for name, c in NORMALIZATIONS.items() if c is None or len(c[0]) in (1, channels)}


def format_normalization(normalize: Normalize | None) -> str:
    """A name in NORMALIZATIONS, or mean/std as --normalize takes it."""
    if normalize is None:
        return "none"
    name = next((name for name, known in NORMALIZATIONS.items() if known == normalize), None)
    return name or "/".join(",".join(f"{v:.6g}" for v in half) for half in normalize)


def shortlist(
    networks: dict[str, nn.Module], normalizations: dict[str, Normalize | None], part: LabelledImages
) -> list[Score]:
    """The better pairs of a network and a normalisation with their scores on `part`, the likelier network first.

    All pairs are scored on a few images first, and the better ones on more. What fails or returns NaN has no score.
    networks: candidates by name, likeliest first. normalizations: candidates by name. part: labelled images.
    """
    names = list(networks)
    if len(names) > MAX_NETWORKS:
        first = [c for c in normalizations if c in FIRST_NORMALIZATIONS] or list(normalizations)
        pairs = [(network, normalization) for network in names for normalization in first]
        scores = _ranked(score_all(pairs, networks, normalizations, part.first(FIRST_IMAGES)))
        by_misfit = sorted((s for s in scores if s.misfit is not None), key=lambda s: s.misfit or 0.0)
        names = list(dict.fromkeys([names[0], *(s.network for s in by_misfit)]))[: MAX_NETWORKS // 2]
        names = list(dict.fromkeys([*names, *(s.network for s in scores)]))[:MAX_NETWORKS]
    pairs = [(network, normalization) for network in names for normalization in normalizations]
    scores = _ranked(score_all(pairs, networks, normalizations, part.first(SECOND_IMAGES)))
    best_of = {s.network: s for s in reversed(scores)}
    tied = [n for n in networks if n in best_of and _tie(scores[0], best_of[n])][:MAX_TIED]
    pairs = [(s.network, s.normalization) for s in (*scores[:1], *best_of.values())]
    pairs += [(s.network, s.normalization) for s in scores if s.network in tied and _tie(scores[0], s)]
    order = list(networks)
    pairs = sorted(dict.fromkeys(pairs), key=lambda pair: order.index(pair[0]))
    return list(score_all(pairs, networks, normalizations, part))


def _ranked(scores: Iterable[Score]) -> list[Score]:
    """Best first: the most accurate, and the least cross-entropy among equals."""
    return sorted(scores, key=lambda s: (-s.accuracy, s.loss.mean().item()))


def score_all(
    pairs: Sequence[tuple[str, str]],
    networks: dict[str, nn.Module],
    normalizations: dict[str, Normalize | None],
    part: LabelledImages,
) -> Iterator[Score]:
    """The scores of pairs (network, normalisation) on `part`; what fails or returns NaN has none."""
    for number, (network, normalization) in enumerate(pairs):
        progress("ways to read the file", number, len(pairs))
        model = Classifier(networks[network], normalizations[normalization]).eval()
        try:
            yield score(network, normalization, model, part)
        except (RuntimeError, ValueError, IndexError, NonFiniteError):  # another size or number of channels
            continue


def best_fit(scores: Sequence[Score], part: LabelledImages) -> tuple[Score, list[Score], list[Score]]:
    """(the best score, those that are statistically tied with it, all scores from best to worst).

    Scores whose BatchNorms expect other statistics than they get come last. Of the rest the most accurate is best.
    Those whose accuracies are tied are scored again on all of `part`; if they still are, the likelier network is best,
    under the normalisation with the least cross-entropy.
    scores: the likelier network first. Raises ModelError: there is no score.
    """
    if not scores:
        raise ModelError("probe", "no way of reading the file takes these images", "Pass --model and --normalize.")
    fitted = _distinct([s for s in scores if _fits(s, scores)])
    ranked = [*_ranked(fitted), *_ranked(s for s in scores if not any(s is fit for fit in fitted))]
    close = [s for s in fitted if _tie(ranked[0], s)]
    if len(close) > 1 and len(part.y) > len(ranked[0].right):
        again = [s.on(part) for s in close]
        close = _ranked(again)
        ranked = [*close, *(s for s in ranked if (s.network, s.normalization) not in _names(close))]
    close = [s for s in _ranked(close) if _tie(ranked[0], s)]
    best = min(close, key=lambda s: s.loss.mean().item())
    for network in dict.fromkeys(s.network for s in scores):  # the likelier reading has the benefit of the doubt
        own_best = min((s for s in close if s.network == network), key=lambda s: s.loss.mean().item(), default=None)
        if own_best is not None and not _is_worse(own_best, best):
            best = own_best
            break
    rivals = [s for s in close if s is not best and not _is_worse(s, best)]
    return best, rivals, ranked


def _distinct(scores: Sequence[Score]) -> list[Score]:
    """The scores without those that predict the same as a likelier network."""
    distinct: list[Score] = []
    for score in scores:
        rivals = [s for s in distinct if s.network != score.network and s.normalization == score.normalization]
        if not any(_predict_alike(rival, score) for rival in rivals):
            distinct.append(score)
    return distinct


def _fits(score: Score, scores: Sequence[Score]) -> bool:
    return not any(has_larger_misfit(score, other) for other in scores)


def has_larger_misfit(score: Score, other: Score) -> bool:
    """Whether the BatchNorms say that `other` is read correctly and `score` is not."""
    return score.misfit is not None and other.misfit is not None and score.misfit > 3 * other.misfit + 0.003


def _names(scores: Iterable[Score]) -> set[tuple[str, str]]:
    return {(s.network, s.normalization) for s in scores}


def _tie(a: Score, b: Score) -> bool:
    first, second = (a.right & ~b.right).sum().item(), (b.right & ~a.right).sum().item()
    return paired(len(a.right), int(first), int(second)).tie


def _is_worse(a: Score, b: Score) -> bool:
    """Whether the cross-entropy of a is larger than that of b by more than two standard errors."""
    more = (a.loss - b.loss).double()
    return bool(more.mean() > 2 * more.std() / len(more) ** 0.5)


def _predict_alike(a: Score, b: Score) -> bool:
    """Whether two predict the same classes, but for a percent of the images."""
    return len(a.right) == len(b.right) and not predict_differently(a.logits.argmax(1), b.logits.argmax(1))


def score(network: str, normalization: str, model: Classifier, part: LabelledImages) -> Score:
    """The score of a model on labelled images; network, normalization: their names.

    Raises ValueError: the model returns no finite logits for these labels. Raises whatever the model raises.
    """
    sizer, batches = batch_sizer(model, part), []
    if not sizer.is_large:
        sizer.pass_size = max(sizer.pass_size, SCORE_PASS)

    def infer(x: Tensor) -> Tensor:
        passes = math.ceil(len(x) / sizer.pass_size)  # of equal sizes: images that fill up a pass count as others do
        with exact_inference(model, math.ceil(len(x) / passes)) as view, torch.no_grad():
            logits: Tensor = view(x)
        return logits

    with batchnorm_misfit(model) as moments:
        for start in range(0, len(part.y), PROBE_IMAGES):
            x, y = image_batch(model, part, slice(start, start + PROBE_IMAGES))
            logits = sizer.with_oom_retry(partial(infer, x))
            if not logits.isfinite().all() or logits.ndim != 2 or logits.shape[1] <= int(y.max()):
                raise ValueError("no logits for these labels")
            batches.append(logits.cpu())
    logits, y = torch.cat(batches), part.y.cpu()
    return Score(network, normalization, model, logits.argmax(1) == y, ce(logits, y), logits, moments.misfit)


def refuse_double_normalization(score: Score, networks: dict[str, nn.Module], sample: LabelledImages) -> None:
    """Refuse a normalisation that the user named if the network is better without it, beyond chance.

    Raises ModelError.
    """
    bare = next(score_all([(score.network, "none")], networks, {"none": None}, sample), None)
    if bare is None:
        return
    n = len(sample.y)
    given = replace(score, right=score.right[:n])
    if bare.accuracy > given.accuracy + 0.05 and not _tie(bare, given):
        raise ModelError(
            f"--normalize {score.normalization}",
            f"the model seems to normalise already: of {n} images {100 * bare.accuracy:.1f} % are "
            f"right without, {100 * given.accuracy:.1f} % with it",
            "Drop --normalize, or pass --normalize none.",
        )
