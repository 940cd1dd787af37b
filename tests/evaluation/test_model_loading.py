"""What people bring becomes a model that can be judged; what is not known is said or asked, never guessed unsaid."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet, from_path
from robustmail.errors import DataError, ModelError
from robustmail.evaluation.attack_specs import NAMES, attack_spec
from robustmail.evaluation.data_loading import load_data
from robustmail.evaluation.evaluator import evaluate
from robustmail.evaluation.model_loading import load_model, reload_model
from robustmail.evaluation.normalization import (
    NORMALIZATIONS,
    Score,
    best_fit,
    format_normalization,
    parse_normalization,
    refuse_double_normalization,
    score,
    usual_normalizations,
)
from robustmail.evaluation.reading_choice import _choice_notes
from robustmail.models.classifier import Classifier, build

pytestmark = pytest.mark.long

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"
FACTS = {  # file: (correct of the first 1,000, convention); measured with networks written by hand
    "resnet20-12fca82f.th": (915, "imagenet"),
    "resnet4b.pth": (771, "cifar10"),
    "cifar_conv_small_pgd.pth": (630, "cifar10-per-image"),
}


@pytest.fixture(scope="module")
def trained(slice_path) -> tuple[nn.Module, TestSet]:
    """A small network that knows 80 real images when they are normalised as ImageNet's are."""
    data = load_data(str(slice_path))
    torch.manual_seed(0)
    model = build("small_cnn", 10, 3, NORMALIZATIONS["imagenet"])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    x = data.part.x.float() / 255
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), data.part.y).backward()
        optimizer.step()
    return model.net, data


@pytest.fixture
def file(trained, tmp_path) -> Path:
    path = tmp_path / "small.pth"
    torch.save({"state_dict": trained[0].state_dict()}, path)
    return path


@pytest.mark.parametrize("name", FACTS)
def test_third_party_checkpoints_are_read_without_help(name, mini_path):
    if not (CHECKPOINTS / name).is_file():
        pytest.skip("needs three checkpoints in ../shared/checkpoints")
    data = load_data(str(mini_path)).first(1000)
    subject = load_model(CHECKPOINTS / name, data, probe=True)
    correct, convention = FACTS[name]
    assert subject.spec["normalize"] == convention
    assert evaluate(subject.model, data.part, ("nat",))["nat"].correct == pytest.approx(correct, abs=1)
    again = reload_model(subject.spec, data)
    assert again.fingerprint == subject.fingerprint
    assert again.sha256 == subject.sha256


def test_without_a_word_on_normalisation_it_is_asked_for(file, trained):
    with pytest.raises(ModelError, match=r"does not say how images are normalised.*--probe"):
        load_model(file, trained[1])


def test_probing_finds_the_convention_and_says_how(file, trained):
    few = trained[1].first(20)  # too few to tell one convention from its like
    with pytest.raises(ModelError, match=r"small_cnn.*in doubt.*do not exclude images normalised as.*--accept-reading"):
        load_model(file, few, probe=True)
    subject = load_model(file, few, probe=True, accept_reading=True)
    assert any(text.startswith("IN DOUBT: ") for text in subject.notes)
    assert subject.doubts
    assert subject.spec["normalize"] in ("imagenet", "cifar10", "cifar100", "svhn", "cifar10-per-image")
    assert any("of those tried on 20 images" in text for text in subject.notes)
    assert any(text.startswith("read off the tensors: small_cnn") for text in subject.notes)


def test_what_the_user_says_is_taken(file, trained):
    subject = load_model(file, trained[1], normalize="0.485,0.456,0.406/0.229,0.224,0.225")
    assert subject.spec["normalize"] == "imagenet"
    torch.testing.assert_close(subject.model.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))


class Normalising(nn.Module):
    def __init__(self, net: nn.Module, inline: bool) -> None:
        super().__init__()
        self.net, self.inline = net, inline
        if not inline:
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALIZATIONS["imagenet"])
        return self.net((x - mean) / std)


@pytest.mark.parametrize("inline", [False, True], ids=["as buffers", "inside forward"])
def test_normalising_twice_is_refused(trained, tmp_path, inline):
    net, data = trained
    torch.save(Normalising(net, inline).state_dict(), tmp_path / "file.pth")
    (tmp_path / "own.py").write_text(
        "from tests.evaluation.test_model_loading import Normalising\nfrom robustmail.models.classifier import build\n"
        f"def factory():\n    return Normalising(build('small_cnn', 10, 3).net, {inline})\n"
    )
    model = f"{tmp_path / 'own.py'}:factory"
    bare = load_model(tmp_path / "file.pth", data, model, normalize="none")
    assert evaluate(bare.model, data.part, ("nat",))["nat"].accuracy > 0.8
    with pytest.raises(ModelError, match="normalise"):
        load_model(tmp_path / "file.pth", data, model, normalize="imagenet")
    if not inline:
        assert "the network normalises by itself" in load_model(tmp_path / "file.pth", data, model).notes[0]


def test_normalisation_in_the_file_is_used_and_not_doubled(trained, tmp_path):
    net, data = trained
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in NORMALIZATIONS["imagenet"])
    content = {"0.mean": mean, "0.std": std, **{f"1.{k}": v for k, v in net.state_dict().items()}}
    torch.save(content, tmp_path / "both.pth")
    subject = load_model(tmp_path / "both.pth", data)
    assert evaluate(subject.model, data.part, ("nat",))["nat"].accuracy > 0.8
    assert any("says the file" in text for text in subject.notes)
    with pytest.raises(ModelError, match=r"normalises already \(mean and std imagenet\).*Drop --normalize"):
        load_model(tmp_path / "both.pth", data, normalize="cifar10")


def test_weights_of_another_network_or_class_count_are_refused_with_the_tensors(file, trained, tmp_path):
    with pytest.raises(ModelError, match=r"conv1.weight"):
        load_model(file, trained[1], "cifar_resnet18_w8", normalize="none")
    (tmp_path / "own.py").write_text(
        "from robustmail.models.classifier import build\ndef factory(): return build('small_cnn', 7, 3).net"
    )
    with pytest.raises(ModelError, match=r"10 classes.*7"):
        load_model(file, trained[1], f"{tmp_path / 'own.py'}:factory", normalize="none")


def test_a_fingerprint_covers_weights_statistics_and_normalisation(file, trained):
    said = {"model": "small_cnn"}
    prints = {load_model(file, trained[1], normalize=c, **said).fingerprint for c in ("none", "imagenet", "cifar10")}
    assert len(prints) == 3


def test_every_convention_can_be_named_and_spelt():
    for name, convention in NORMALIZATIONS.items():
        channels = len(convention[0]) if convention else 3
        assert parse_normalization(name, channels) == convention
        assert format_normalization(convention) == name
        assert parse_normalization(format_normalization(((0.1, 0.2), (0.3, 0.4))), 2) == ((0.1, 0.2), (0.3, 0.4))
    assert set(usual_normalizations(1)) == {"none", "half", "mnist", "bytes"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("cifar11", "Did you mean 'cifar10'"), ("0.5,0.5/0.2,0.2", "each of 3 channels"), ("0.5/0", "must be positive"),
     ("0.5/1/2", "Or write mean/std"), ("/", "Or write mean/std")],
)  # fmt: skip
def test_a_convention_that_is_none_is_refused(text, wrong):
    with pytest.raises(ModelError, match=wrong):
        parse_normalization(text, 3)


# Data


def test_test_images_come_from_files_of_several_kinds(tmp_path, slice_path):
    images = np.load(slice_path)
    x, y = images["x_test"], images["y_test"].astype(np.int64)
    kinds = {
        "keras": {"x_test": x, "y_test": y}, "short": {"x": x, "y": y[:, None]},
        "nchw": {"images": x.transpose(0, 3, 1, 2), "labels": y}, "float": {"data": x / 255, "targets": y},
    }  # fmt: skip
    expected = from_path(slice_path).part
    for name, content in kinds.items():
        np.savez(tmp_path / name, **content)
        part = from_path(tmp_path / f"{name}.npz").part
        found = part.x if part.x.dtype == torch.uint8 else (part.x * 255).round().to(torch.uint8)
        assert torch.equal(found, expected.x), name
        assert torch.equal(part.y, expected.y), name


def test_images_outside_the_unit_range_and_too_few_are_refused(tmp_path, slice_path):
    x = np.load(slice_path)["x_test"].astype(np.float32)
    np.savez(tmp_path / "wide.npz", x=x, y=np.zeros(len(x), np.int64))
    with pytest.raises(DataError, match=r"images span \[0, 255\], outside \[0, 1\]"):
        load_data(str(tmp_path / "wide.npz"))
    with pytest.raises(DataError, match=r"has 80 images.*Pass --n 80"):
        load_data(str(slice_path)).first(81)


# Names of attacks


@pytest.mark.parametrize("classes", [2, 3, 4, 10, 100])
def test_names_mean_the_same_stages_for_any_number_of_classes(classes):
    aa = attack_spec("aa", 8 / 255, classes)
    assert attack_spec("apgd", 8 / 255, classes).stages == {"apgd-ce": aa.stages["apgd-ce"]}
    second = {2: None, 3: "apgd-dlr"}.get(classes, "apgd-t")
    assert list(aa.stages) == ["apgd-ce", *([second] if second else []), "fab-t", "square"]
    assert bool(aa.note) == (classes < 4)
    assert all(aa.is_per_image(stage) for stage in aa.stages)


def test_every_name_is_an_attack():
    for name in NAMES:
        found = attack_spec(name, 8 / 255, 10)
        assert found.name == name
        assert all(found.settings.values())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_arts_carlini_and_wagner_counts_only_inside_the_ball(robust_cnn, digit_images, norm, monkeypatch):
    from robustmail.attacks.art import art
    from robustmail.evaluation import attack_specs

    knobs = {"linf": ("CarliniLInfMethod", {}), "l2": ("CarliniL2Method", {"binary_search_steps": 1})}[norm]
    monkeypatch.setattr(attack_specs, "_nearest", lambda _: art(knobs[0], max_iter=5, learning_rate=0.05, **knobs[1]))
    found = evaluate(robust_cnn, digit_images.part.first(6), ("nat", "cw-art"), eps=0.2, norm=norm)
    assert found["cw-art"].correct <= found["nat"].correct
    assert all(far <= 0.2 + 1e-4 for far, at in zip(found.ledger.distance, found.ledger.broken_by, strict=True)
               if at == "cw-art")  # fmt: skip


def test_a_classifier_of_a_subject_takes_grey_and_colour():
    part = Split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    assert len(evaluate(model, part, ("nat",)).ledger) == 3


def test_a_folder_is_read_class_by_class_in_turn_so_that_its_first_images_are_of_all(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for c, count in enumerate((3, 1, 2)):
            for i in range(count):
                path = tmp_path / split / f"class{c}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4), 10 * c + i, np.uint8)).save(path)
    for text in (str(tmp_path), f"image_folder({str(tmp_path)!r}, validation=1)"):
        part = load_data(text).part
        assert part.y.tolist() == [0, 1, 2, 0, 2, 0]
        assert part.x[:][:, 0, 0, 0].tolist() == [0, 10, 20, 1, 21, 2], "the images go with their labels"


def test_first_images_of_few_classes_are_told():
    def some(labels):
        return TestSet("some", Split(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels)), 10)

    by_class = some([i // 20 for i in range(200)])
    few = "the first 20 images have 1 of the 10 classes"
    assert by_class.first(20).class_warning(by_class) == f"{few}: the set is sorted"
    assert by_class.first(None).class_warning(by_class) == ""
    uneven = some([0] * 20 + [9 - i % 10 for i in range(100)])
    assert uneven.first(20).class_warning(uneven) == few
    mixed = some([i % 10 for i in range(200)])
    assert mixed.first(3).class_warning(mixed) == "", "three images cannot have more than three"


def test_a_probe_tells_the_numbers_that_decided():
    def score(convention, right, loss):
        model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        return Score("net", convention, model, right, loss, torch.stack([~right, right], 1).float())

    torch.manual_seed(0)
    part = Split(torch.rand(300, 1, 2, 2), torch.arange(300) % 2)
    few = torch.arange(20) % 2 == 0
    scores = [score("a", few, torch.ones(20)), score("b", few, torch.ones(20)), score("c", few & False, torch.ones(20))]
    best, _, ranked = best_fit(scores, part)
    assert [len(s.right) for s in ranked] == [300, 300, 20]
    assert best in ranked
    told = list(_choice_notes(best, [], ranked))
    assert told[0].endswith("of those tried on 300 images")
    assert told[3].endswith("c, on 20 images")


def test_a_named_normalisation_is_refused_only_where_the_network_is_better_without_it_beyond_chance():
    """Of n images a network that normalises nothing itself gets all right without, half with the normalisation."""

    class Bright(nn.Module):
        """Class 1 where the mean is above 0."""

        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([0 * mean, mean], 1)

    for n, refused in ((4, False), (40, True)):
        part = Split(torch.linspace(0.1, 0.9, n).view(n, 1, 1, 1).expand(n, 1, 4, 4), torch.ones(n, dtype=torch.int64))
        given = score("net", "half", Classifier(Bright(), ((0.5,), (0.5,))), part)
        assert given.accuracy == 0.5
        with pytest.raises(ModelError, match=r"100\.0 % are right without, 50\.0 %") if refused else nullcontext():
            refuse_double_normalization(given, {"net": Bright()}, part)
