"""May the way a checkpoint was read be believed?

A reading that fits the shapes may still have another activation, pool, stride or normalisation than the network that
was trained, and then its numbers are wrong by points while everything looks in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from robustmail.data.image_files import LabelledImages
from robustmail.evaluation.evidence import excludes, predict_differently, recalibrated
from robustmail.evaluation.normalization import Score, has_larger_misfit
from robustmail.evaluation.statistics import wilson

__all__ = ["reading_doubts", "compare_stored_accuracies"]

MISFIT, MISFIT_OF_RARE = 0.05, 0.02  # nats per channel between BatchNorm's statistics and the images'
COST = 0.1  # nats that the best temperature and class biases may gain, where the logits are STRETCH times too large
STRETCH = 4.0
CERTAIN, LIKELY = 0.99, 0.95  # of the interval of an accuracy
WIDEST = 0.08  # interval that says enough
WEAK = 0.5  # accuracy below which being right tells little of a reading


def reading_doubts(
    best: Score, ranked: Sequence[Score], part: LabelledImages, accuracies: Mapping[str, float], usual: bool = False
) -> list[str]:
    """What speaks against the best reading of a checkpoint, in sentences; an empty list if nothing does.

    best: the score of the reading. ranked: the scores of all readings that were compared. part: all labelled images.
    accuracies: that the file says its network has, in [0, 1], by name.
    usual: whether it is the likeliest reading by names and shapes; if then an accuracy agrees, it need only be better
    than the others.
    """
    has_rivals = any(other.network != best.network for other in ranked)
    found = list(_of_itself(best, part, MISFIT if usual else MISFIT_OF_RARE))
    if accuracies and not _agreeing(best, accuracies, LIKELY if has_rivals else CERTAIN):
        name, value = min(accuracies.items(), key=lambda pair: abs(pair[1] - best.accuracy))
        found.append(f"the file says {name} {100 * value:.1f} %, {_measured(best)}")
    low, high = wilson(int(best.right.sum()), len(best.right), LIKELY)
    enough = usual and high - low <= WIDEST and _agreeing(best, accuracies, LIKELY)
    batchnorm_tells = any(has_larger_misfit(other, best) for other in ranked)  # not of what follows the last one
    if has_rivals and not accuracies and not batchnorm_tells:
        found.append("no BatchNorm tells the readings apart and the file tells no accuracy, so that labelled images "
                     "can only rank the readings that were thought of")  # fmt: skip
    if has_rivals and not enough and best.accuracy < WEAK:
        found.append(f"it is right on {100 * best.accuracy:.1f} % of {len(best.right)} images, as a wrong reading of a "
                     "better network may be")  # fmt: skip
    if rivals := _rivals(best, ranked, part, enough):
        n = min(len(best.right), len(rivals[0].right))
        share = (rivals[0].logits[:n].argmax(1) != best.logits[:n].argmax(1)).double().mean().item()
        found.append(f"{n} images do not exclude {_called(rivals[0], best)}, which answers otherwise on "
                     f"{100 * share:.1f} % of them")  # fmt: skip
    return found


def compare_stored_accuracies(best: Score, accuracies: Mapping[str, float]) -> Iterator[str]:
    """How the accuracies in the file compare with the measured one, in sentences."""
    for name, value in accuracies.items():
        more = "" if _agreeing(best, {name: value}, CERTAIN) else ": MORE THAN CHANCE EXPLAINS"
        yield f"the file says {name} {100 * value:.1f} %, {_measured(best)}{more}"


def _measured(best: Score) -> str:
    low, high = wilson(int(best.right.sum()), len(best.right), CERTAIN)
    return (f"measured {100 * best.accuracy:.1f} % of {len(best.right)} images "
            f"(99 % interval {100 * low:.1f} to {100 * high:.1f})")  # fmt: skip


def _agreeing(best: Score, accuracies: Mapping[str, float], confidence: float) -> bool:
    """Is one of the accuracies in the interval of the measured one? The file does not say on how many images it was
    measured, so it is taken as exact."""
    low, high = wilson(int(best.right.sum()), len(best.right), confidence)
    return any(low <= value <= high for value in accuracies.values())


def _of_itself(best: Score, part: LabelledImages, most: float) -> Iterator[str]:
    """What a reading's own numbers say against it."""
    classes = best.logits.shape[1]
    guessing, loss = math.log(classes), best.loss.mean().item()
    possible, stretch = recalibrated(best.logits, part.y[: len(best.right)].cpu())
    if loss > guessing and best.accuracy > 1.5 / classes:
        yield (f"its mean cross-entropy is {loss:.3g} nats at {100 * best.accuracy:.1f} % accuracy, "
               f"where guessing has {guessing:.3g}")  # fmt: skip
    elif not 1 / STRETCH <= stretch <= STRETCH and loss - possible.mean().item() > COST:
        yield f"its logits are out of proportion: {stretch:.2g} times as large, they would fit the labels best"
    if best.misfit is not None and best.misfit > most:
        yield (f"what reaches its BatchNorms is {best.misfit:.2g} nats per channel from the statistics that they "
               f"keep, where {most} is usual at most")  # fmt: skip


def _rivals(best: Score, ranked: Sequence[Score], part: LabelledImages, better: bool) -> list[Score]:
    """Those that answer otherwise than `best` and that some of the images do not exclude, the likeliest first; if all
    of `part` excludes them, none. better: only those that are likelier than `best` count."""
    pairs = [(loss, score) for score in ranked if (loss := _open_question(best, score, part, better)) is not None]
    rivals = [score for _, score in sorted(pairs, key=lambda pair: pair[0])]
    if not rivals or len(best.right) == len(part.y) == len(rivals[0].right):
        return rivals
    best = best if len(best.right) == len(part.y) else best.on(part)
    for k, rival in enumerate(rivals):
        again = rival.on(part)
        if _open_question(best, again, part, better) is not None:
            return [again, *rivals[k + 1 :]]
    return []


def _called(rival: Score, best: Score) -> str:
    """What tells a rival from the best: its network, its convention, or both."""
    known = re.split(": |; ", best.network)
    parts = [part for part in re.split(": |; ", rival.network) if part not in known]
    parts += [f"images normalised as {rival.normalization}"] if rival.normalization != best.normalization else []
    return "; ".join(parts)


def _open_question(best: Score, other: Score, part: LabelledImages, better: bool) -> float | None:
    """The other's recalibrated cross-entropy, if it answers otherwise and nothing excludes it."""
    if (best.network, best.normalization) == (other.network, other.normalization):
        return None
    n = min(len(best.right), len(other.right))
    mine, its, y = best.logits[:n], other.logits[:n], part.y[:n].cpu()
    if not predict_differently(mine.argmax(1), its.argmax(1)):
        return None
    loss, own = recalibrated(its, y)[0], recalibrated(mine, y)[0]
    excluded = bool(own.mean() < loss.mean()) if better else excludes(own, loss)
    if has_larger_misfit(other, best):  # BatchNorm excludes it, unless the labels say the opposite
        excluded = not excludes(loss, own)
    return None if excluded else loss.mean().item()
