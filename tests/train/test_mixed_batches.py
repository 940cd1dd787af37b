"""Batches of original and extra images: counted, resumed, and held in memory once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustmail import AT, PGD, Recipe, State, fit, mixed, npz, subset
from robustmail.data.dataset import Extra, ImageData, Split
from robustmail.errors import NonFiniteError, RecipeError
from robustmail.records import RunStarted, StepFinished
from robustmail.train.batches import draw_batch, epoch_batches, name_places
from tests.processes import python
from tests.train.conftest import Poison

GENERATED = 97


@pytest.fixture
def extra_path(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (GENERATED, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, GENERATED)
    np.savez(tmp_path / "extra.npz", image=x, label=y)
    return str(tmp_path / "extra.npz")


@pytest.fixture
def recipe(slice_path: Path, extra_path: str) -> Recipe:
    data = mixed(npz(str(slice_path), validation=40), extra=extra_path, share=0.7)
    return Recipe(
        data=data, model="small_cnn", attack=PGD(eps=0.02, alpha=0.02, steps=1), objective=AT(), epochs=2, batch=32,
        evaluate=("nat",), validate="nat", test_size=10,
    )  # fmt: skip


def numbered(n: int, *parts: int, share: float) -> tuple[Split, Extra]:
    """n training images and parts of extra images, in which every pixel is the image's own number."""
    x = torch.arange(n + sum(parts), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    own, *others = (Split(part, part[:, 0, 0, 0].long() % 3) for part in x.split([n, *parts]))
    return own, Extra(tuple(others), share)


@pytest.mark.parametrize(("n", "size", "share"), [(100, 16, 0.7), (96, 16, 0.5), (97, 16, 0.0626), (20, 8, 1.0)])
def test_every_batch_has_its_share_of_extra_images_and_no_original_comes_twice_in_an_epoch(n, size, share):
    _, extra = numbered(n, 30, 20, share=share)
    n_extra, seen, met = int(share * size), Counter(), Counter()
    for epoch in range(12):
        batches = epoch_batches(n, size, 0, epoch, extra)
        assert len(batches) == -(-n // size)
        assert {int((batch >= n).sum()) for batch in batches} == {n_extra}
        assert all(len(batch) == size for batch in batches[:-1])
        assert 1 < len(batches[-1]) <= size
        places = torch.cat(batches)
        own = places[places < n]
        assert len(own) == len(own.unique()) == min(n, len(batches) * (size - n_extra))
        seen.update(own.tolist())
        met.update((places[places >= n] - n).tolist())
    assert set(met) <= set(range(50))
    if share < 1:
        assert len(seen) == n, "every epoch shuffles anew, so all originals come in the end"
    if n_extra > 4:
        assert len(met) == 50, "of all parts"


def test_an_epoch_of_the_paper_sees_three_tenths_of_cifar10():
    _, extra = numbered(10, 20, share=0.7)
    batches = epoch_batches(50_000, 512, 0, 0, extra)
    assert len(batches) == 98
    assert sum(int((batch < 50_000).sum()) for batch in batches) == 98 * 154


def test_the_draws_depend_on_seed_and_epoch_alone_and_repeat_an_extra_image():
    _, extra = numbered(100, 50, share=0.7)
    first, same, seed, epoch = (
        torch.cat(epoch_batches(100, 16, *of, extra)).tolist() for of in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert first == same
    assert len({tuple(draw) for draw in (first, seed, epoch)}) == 3
    drawn = [place for place in first if place >= 100]
    assert len(drawn) > len(set(drawn)), "with replacement"


def test_without_extra_images_the_order_is_what_it_was():
    from robustmail.data.dataset import batch_indices
    from robustmail.runtime.rng import generator

    ordinary = batch_indices(100, 16, generator(3, "order", 2))
    assert all(map(torch.equal, epoch_batches(100, 16, 3, 2), ordinary))


def test_a_share_that_leaves_no_extra_image_in_a_batch_is_refused(recipe):
    made = recipe.but(data=mixed(recipe.data.data, recipe.data.extra, share=0.03))
    with pytest.raises(RecipeError, match=r"mixed \(given share=0.03\): leaves no extra image in a batch of 32"):
        State.fresh(made)


def test_a_batch_has_the_images_and_labels_of_its_places(recipe):
    train, extra = numbered(60, 30, 20, share=0.5)
    images = ImageData("mine", train, train, 3, extra=extra)
    places = torch.tensor([5, 59, 60, 0, 109, 89, 90, 60])
    batch = draw_batch(recipe, images, train, places, (0, 0))
    numbers = (batch.x[:, 0, 0, 0] * 255).round().long()
    assert sorted(numbers.tolist()) == sorted(places.tolist())
    assert torch.equal(batch.y, numbers % 3)
    assert numbers.tolist()[3:] == [60, 109, 89, 90, 60], "the extra images come last, in their order"


def test_validation_and_test_images_are_the_originals(recipe, slice_path):
    state, alone = State.fresh(recipe), State.fresh(recipe.but(data=recipe.data.data))
    for name in ("train", "validation"):
        assert all(map(torch.equal, getattr(state, name), getattr(alone, name)))
    assert all(map(torch.equal, state.images.test, alone.images.test))
    assert state.steps == alone.steps == 4
    started = next(fit(recipe))
    assert isinstance(started, RunStarted)
    assert "0.7 of each batch from 97 extra images" in started.data


def test_a_subset_of_the_originals_keeps_the_extra_images(recipe):
    state = State.fresh(recipe.but(data=subset(recipe.data, train=100)))
    assert (len(state.train.y), len(state.images.extra)) == (60, GENERATED)


@pytest.mark.long
def test_a_run_that_was_stopped_within_an_epoch_ends_in_the_same_bits(recipe, tmp_path):
    def weights(state: State) -> list[Any]:
        return [tensor.tolist() for tensor in state.model.state_dict().values()]

    whole = State.fresh(recipe, tmp_path / "whole")
    losses = [record.loss for record in fit(recipe, whole) if isinstance(record, StepFinished)]
    state = State.fresh(recipe, tmp_path / "parts")
    records = fit(recipe, state)
    while (state.epoch, state.step) != (1, 1):
        next(records)
    records.close()
    state.save()
    state = State.fresh(recipe, tmp_path / "parts")
    state.load()
    rest = [record.loss for record in fit(recipe, state) if isinstance(record, StepFinished)]
    assert rest == losses[-3:]
    assert weights(state) == weights(whole)


def test_other_extra_images_are_noticed_where_a_run_goes_on(recipe, extra_path, tmp_path):
    State.fresh(recipe, tmp_path / "run").save()
    x, y = (np.load(extra_path)[name] for name in ("image", "label"))
    x[50, 3, 3, 0] ^= 1
    Path(extra_path).unlink()  # the old one is still mapped
    np.savez(extra_path, image=x, label=y)
    with pytest.raises(Exception, match="the data have changed since this run began"):
        State.fresh(recipe, tmp_path / "run").load()


def test_an_error_and_a_dump_say_which_images_of_a_batch_are_extra(recipe, tmp_path):
    from robustmail import Sigmoid

    made = recipe.but(margin=Poison(), weighter=Sigmoid(slope=1.0, bias=0.0))
    state = State.fresh(made, tmp_path / "run")
    with pytest.raises(NonFiniteError) as caught:
        list(fit(made, state))
    content = torch.load(tmp_path / "run" / "nonfinite.pt", weights_only=True)
    assert content["training_images"] == 160 - 40
    extra = content["indices"] >= content["training_images"]
    assert int(extra.sum()) == 22
    first = (content["indices"][extra] - content["training_images"])[0]
    assert f"extra images {first}, " in str(caught.value)
    assert name_places(torch.tensor([4, 1, 12, 10]), 10) == "training images 4, 1, extra images 2, 0"
    assert name_places(torch.arange(10), 10) == "training images 0, 1, 2, 3, 4, 5, 6, 7, ..."


PEAK = """
import resource, sys, tempfile
import torch
torch.set_num_threads(1)
from robustmail import AT, PGD, Recipe, State, fit, mixed, npz

def peak(extra):
    data = mixed(npz(sys.argv[1], validation=40), extra=extra)
    recipe = Recipe(data=data, model="small_cnn", attack=PGD(eps=0.02, alpha=0.02, steps=1), objective=AT(), epochs=1,
                    batch=32, evaluate=("nat",), validate="nat", test_size=10)
    list(fit(recipe, State.fresh(recipe, tempfile.mkdtemp(dir=sys.argv[2]))))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

# A small run first: what torch itself needs would hide a copy that is made before training. And a second one, which
# needs more, since recipe and network of the first are not free yet.
peak(sys.argv[3])
small = peak(sys.argv[3])
print(peak(sys.argv[4]) - small)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the peak is told in KiB on Linux")
def test_training_holds_the_extra_images_once_at_most(slice_path, tmp_path):
    paths, sizes = [], (32, 20_000)
    for n in sizes:
        x = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{n}.npz")
        np.savez(paths[-1], image=x, label=np.arange(n) % 10)
    done = python("-c", PEAK, slice_path, tmp_path, *paths)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1.3 * sizes[1] * 32 * 32 * 3
