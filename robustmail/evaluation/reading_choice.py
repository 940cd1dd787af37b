"""Which of several readings of a checkpoint is taken: the networks and normalisations that labelled images rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from robustmail.checkpoints import (
    Checkpoint,
)
from robustmail.data.image_files import LabelledImages
from robustmail.errors import ModelError
from robustmail.evaluation.doubts import compare_stored_accuracies, reading_doubts
from robustmail.evaluation.normalization import (
    PROBE_IMAGES,
    Normalize,
    Score,
    best_fit,
    refuse_double_normalization,
    score_all,
    shortlist,
)
from robustmail.models.classifier import Classifier

__all__ = ["Choice", "choose"]

MAX_SHOWN = 5  # normalizations whose accuracies are listed


@dataclass(frozen=True)
class Choice:
    """A network under a normalisation, chosen among the candidates by labelled images.

    network, normalization: their names among the candidates. model: the two together, in eval mode. score: how it does
    on the images; None if there was one pair only and it does not take them. notes: how it was chosen, in sentences.
    doubts: what speaks against it, in sentences.
    """

    network: str
    normalization: str
    model: Classifier
    score: Score | None
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def choose(
    checkpoint: Checkpoint,
    networks: dict[str, nn.Module],
    normalizations: dict[str, Normalize | None],
    part: LabelledImages,
    is_guessed: bool,
    is_named: bool,
    accept_doubts: bool = False,
) -> Choice:
    """The pair of a network and a normalisation that fits labelled images best.

    networks, normalizations: the candidates, likeliest first. part: the images. is_guessed: whether the networks were
    read off names and shapes. is_named: whether the caller named a normalisation, other than none. accept_doubts:
    return a guessed pair although something speaks against it.
    Raises ModelError: no pair takes these images; the network is better without the named normalisation; or the best
    pair is in doubt and was guessed or probed.
    """
    choice, ranked = _best_pair(networks, normalizations, part)
    if is_named and choice.score is not None:
        refuse_double_normalization(choice.score, networks, part.first(PROBE_IMAGES))
    is_probed = len(normalizations) > 1
    if choice.score is None or not (is_guessed or is_probed or checkpoint.accuracies):
        return choice
    score = choice.score.on(part) if checkpoint.accuracies else choice.score
    is_likeliest = choice.network == next(iter(networks))
    doubts = reading_doubts(score, ranked, part, checkpoint.accuracies, is_likeliest)
    if doubts and (is_guessed or is_probed) and not accept_doubts:
        raise _doubtful(checkpoint.path, choice, is_guessed, is_probed, doubts)
    notes = [*choice.notes, *compare_stored_accuracies(score, checkpoint.accuracies)]
    notes += [f"IN DOUBT: {text}" for text in doubts]
    return replace(choice, notes=tuple(notes), doubts=tuple(doubts))


def _best_pair(
    networks: dict[str, nn.Module], normalizations: dict[str, Normalize | None], part: LabelledImages
) -> tuple[Choice, list[Score]]:
    """(the pair that fits best, the scores of all that were compared). Raises ModelError if no pair takes the
    images."""
    if len(networks) * len(normalizations) > 1:
        best, rivals, ranked = best_fit(shortlist(networks, normalizations, part.first(PROBE_IMAGES)), part)
        notes = tuple(_choice_notes(best, rivals, ranked))
        return Choice(best.network, best.normalization, best.model, best, notes), ranked
    network, normalization = next(iter(networks)), next(iter(normalizations))
    model = Classifier(networks[network], normalizations[normalization]).eval()
    scores = score_all([(network, normalization)], networks, normalizations, part.first(PROBE_IMAGES))
    return Choice(network, normalization, model, next(scores, None)), []


def _choice_notes(best: Score, rivals: list[Score], ranked: list[Score]) -> Iterator[str]:
    """How the choice was made, in lines."""
    same_network = [score for score in ranked if score.network == best.network]
    other_networks = [score for score in ranked if score.network != best.network]
    n = len(ranked[0].right)
    if len(same_network) > 1:
        yield f"input convention: {best.normalization}, of those tried on {n} images"
        for score in same_network[:MAX_SHOWN]:
            fewer = f", on {len(score.right)} images" if len(score.right) != n else ""
            loss = f"cross-entropy {score.loss.mean().item():.3f}"
            yield f"  {100 * score.accuracy:5.1f} %  {loss}  {score.normalization}{fewer}"
        if close := [rival.normalization for rival in rivals if rival.network == best.network]:
            yield (f"  {len(best.right)} images do not tell {best.normalization} from {', '.join(close)}; the smaller "
                   "cross-entropy decided. Pass --normalize if you know better")  # fmt: skip
    if other_networks:
        count, top = len({score.network for score in other_networks}), other_networks[0]
        yield f"other readings of the tensors: {count}, right on {100 * top.accuracy:.1f} % at most ({top.network})"
        if close := [rival.network for rival in rivals if rival.network != best.network]:
            yield f"  {len(best.right)} images do not tell it from {close[0]}. Pass --model if you know better"


def _doubtful(path: Path, choice: Choice, is_guessed: bool, is_probed: bool, doubts: list[str]) -> ModelError:
    reading = choice.network + (f", images normalised as {choice.normalization}" if is_probed else "")
    options = ["--model file.py:factory"] * is_guessed + ["--normalize NAME"] * is_probed
    other = "" if is_probed else f" The normalisation is {choice.normalization}; --probe compares it with others."
    return ModelError(
        str(path),
        f"is read as {reading}, which is in doubt: {'; '.join(doubts)}",
        f"Say what it is: robustmail eval {path} {' '.join(options)}, or pass --accept-reading to accept it.{other}",
    )
