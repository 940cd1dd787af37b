"""A reading that is wrong is refused, not evaluated in silence; one that is right is not refused for what it stores."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from robustmail.data.dataset import ImageData, Split, to_float
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError
from robustmail.evaluation.doubts import reading_doubts
from robustmail.evaluation.model_loading import load_model
from robustmail.evaluation.normalization import Score, best_fit
from robustmail.models.classifier import Classifier
from tests.checkpoints.corpus import Conv, Spec, images_of, made, specs, trained

CONVS = (Conv(8, 3, 1, 1, "max"), Conv(12, 3, 1, 1))


@pytest.fixture(scope="module")
def handwritten() -> ImageData:
    return images_of("digits", None)


@functools.cache
def network(act: str) -> Classifier:
    spec = Spec(seed=1, data="digits", act=act, convs=CONVS, hidden=(32,))
    return trained(spec, images_of("digits", None))


def written(model: Classifier, path: Path, **values: float) -> Path:
    torch.save({"state_dict": model.net.state_dict(), **values}, path)
    return path


def answers(model: torch.nn.Module, images: ImageData) -> torch.Tensor:
    with torch.no_grad():
        return model(to_float(images.test.x)).argmax(1)


@pytest.mark.long
@pytest.mark.parametrize("act", ["relu", "sigmoid", "tanh", "sine", "square"])
def test_no_network_is_read_wrong_in_silence(act, handwritten, tmp_path):
    model, data = network(act), TestSet("digits", handwritten.test, 10)
    path = written(model, tmp_path / "net.pt")
    subject = load_model(path, data, normalize="none", accept_reading=True)
    if subject.doubts:
        with pytest.raises(ModelError, match=r"in doubt.*--accept-reading"):
            load_model(path, data, normalize="none")
    else:
        assert (answers(subject.model, handwritten) == answers(model, handwritten)).double().mean() > 0.98


@pytest.mark.long
def test_an_accuracy_in_the_file_that_was_not_measured_is_told_and_refused(handwritten, tmp_path):
    model, data = network("relu"), TestSet("digits", handwritten.test, 10)
    accuracy = (answers(model, handwritten) == handwritten.test.y).double().mean().item()
    subject = load_model(written(model, tmp_path / "true.pt", best_acc=accuracy), data, normalize="none")
    assert not subject.doubts
    assert "the file says best_acc" in " ".join(subject.notes)
    with pytest.raises(ModelError, match=r"in doubt: the file says best_acc 50.0 %, measured"):
        load_model(written(model, tmp_path / "false.pt", best_acc=0.5), data, normalize="none")


def test_of_two_readings_that_say_the_same_the_one_that_the_batchnorms_expect_is_left():
    def score(network: str, misfit: float) -> Score:
        right = torch.arange(20) % 2 == 0
        return Score(network, "none", model, right, torch.ones(20), torch.stack([~right, right], 1).float(), misfit)

    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
    part = Split(torch.rand(20, 1, 2, 2), torch.arange(20) % 2)
    best, _, ranked = best_fit([score("first", 0.5), score("second", 0.01)], part)
    assert best.network == "second"
    assert [s.network for s in ranked] == ["second", "first"]


def test_the_networks_of_the_published_table_can_be_drawn_and_built():
    for half in ("develop", "held-out"):
        drawn = specs(half)
        assert len({spec.name for spec in drawn}) == 64
        for spec in drawn[:8]:
            channels, size = (1, 8) if spec.data == "digits" else (3, 32)
            assert made(spec, channels, size).eval()(torch.rand(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("misfit", "doubtful"), [(0.01, True), (0.5, False)])
def test_a_batchnorm_that_fits_every_reading_excludes_none(misfit, doubtful):
    """What follows the last BatchNorm, it does not see."""
    y = torch.arange(200) % 2
    logits = torch.nn.functional.one_hot(y, 2).float() * 3
    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))

    def score(network: str, misfit: float) -> Score:
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return Score(network, "none", model, torch.ones(200, dtype=torch.bool), loss, logits, misfit)

    best, other = score("max-pool", 0.01), score("average-pool", misfit)
    found = reading_doubts(best, [best, other], Split(torch.rand(200, 1, 2, 2), y), {}, usual=True)
    assert any("no BatchNorm tells the readings apart" in text for text in found) == doubtful
