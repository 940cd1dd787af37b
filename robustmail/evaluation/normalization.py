"""What a network expects its input to be: the conventions there are, and which of them fits, by trying."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustmail.data.dataset import Split
from robustmail.errors import ModelError, NonFiniteError, did_you_mean
from robustmail.evaluation.evaluator import image_batch
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.statistics import paired
from robustmail.functional import ce
from robustmail.models.classifier import Classifier

__all__ = [
    "NORMALIZATIONS",
    "Score",
    "best_fit",
    "usual_normalizations",
    "parse_normalization",
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
FEW, SHORT = 64, 10  # images for a first look, and ways that are looked at again
PROBE_IMAGES = 256  # images


@dataclass(frozen=True)
class Score:
    """How one way of reading a checkpoint does on some labelled images."""

    network: str
    convention: str
    model: Classifier
    right: Tensor
    """[N] bool"""
    loss: Tensor
    """[N] cross-entropy"""

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()


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
    """Every network under every convention, on a few images; the better ones on all. What fails or gives NaN has no
    score."""
    few = sorted(_scored(((n, c) for n in networks for c in conventions), networks, conventions, part.first(FEW)),
                 key=lambda s: (-s.accuracy, s.loss.mean().item()))  # fmt: skip
    pairs = [(s.network, s.convention) for s in few[:SHORT]]
    for convention in {"none"} & set(conventions):  # which is asked for by name, to see what is done twice
        pairs += [(network, convention) for network in {p[0] for p in pairs[:1]} if (network, convention) not in pairs]
    return list(_scored(pairs, networks, conventions, part))


def _scored(
    pairs: Iterable[tuple[str, str]],
    networks: dict[str, nn.Module],
    conventions: dict[str, Normalize | None],
    part: Split,
) -> Iterator[Score]:
    for network, convention in pairs:
        model = Classifier(networks[network], conventions[convention]).eval()
        try:
            yield Score(network, convention, model, *_logits(model, part))
        except (RuntimeError, ValueError, IndexError, NonFiniteError):  # another size or number of channels
            continue


def best_fit(scores: Sequence[Score], part: Split) -> tuple[Score, list[Score], list[Score]]:
    """(the one that fits, those that cannot be told from it, all of them best first; scored anew where they were tied).

    The most accurate wins; among those whose accuracy cannot be told apart, on all of `part`, the likelier network, and
    of its conventions the one of the least cross-entropy. Raises ModelError where nothing had a score.
    """
    ranked = sorted(scores, key=lambda s: (-s.accuracy, s.loss.mean().item()))
    if not ranked:
        raise ModelError("probe", "no way of reading the file takes these images", "Pass --model and --normalize.")
    close = [s for s in ranked if _tie(ranked[0], s)]
    if len(close) > 1 and len(part.y) > len(ranked[0].right):
        again = [Score(s.network, s.convention, s.model, *_logits(s.model, part)) for s in close]
        close = sorted(again, key=lambda s: (-s.accuracy, s.loss.mean().item()))
        ranked = [*close, *(s for s in ranked if (s.network, s.convention) not in _names(close))]
        close = [s for s in close if _tie(close[0], s)]
    best = min(close, key=lambda s: s.loss.mean().item())
    for network in dict.fromkeys(s.network for s in scores):  # the likelier reading has the benefit of the doubt
        mine = min((s for s in close if s.network == network), key=lambda s: s.loss.mean().item(), default=None)
        if mine is not None and not _is_worse(mine, best):
            best = mine
            break
    rivals = [s for s in close if s is not best and not _is_worse(s, best)]
    return best, rivals, ranked


def _names(scores: Iterable[Score]) -> set[tuple[str, str]]:
    return {(s.network, s.convention) for s in scores}


def _tie(a: Score, b: Score) -> bool:
    first, second = (a.right & ~b.right).sum().item(), (b.right & ~a.right).sum().item()
    return paired(len(a.right), int(first), int(second)).tie


def _is_worse(a: Score, b: Score) -> bool:
    """Is the cross-entropy of a larger than b's by more than two standard errors?"""
    more = (a.loss - b.loss).double()
    return bool(more.mean() > 2 * more.std() / len(more) ** 0.5)


def _logits(model: Classifier, part: Split) -> tuple[Tensor, Tensor]:
    right, loss = [], []
    for start in range(0, len(part.y), PROBE_IMAGES):
        x, y = image_batch(model, part, slice(start, start + PROBE_IMAGES))
        with exact_inference(model) as view, torch.no_grad():
            logits = view(x)
        if not logits.isfinite().all() or logits.ndim != 2 or logits.shape[1] <= int(y.max()):
            raise ValueError("no logits for these labels")
        right.append((logits.argmax(1) == y).cpu())
        loss.append(ce(logits, y).cpu())
    return torch.cat(right), torch.cat(loss)
