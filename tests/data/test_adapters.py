"""What people hand over in Python: data sets and loaders of any library, networks of another, attacks of a third."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms

from robustmail import AT, PGD, Recipe, art, digits, evaluate, fit, load_data, torchattack, verify
from robustmail.data.adapters import read_data
from robustmail.data.dataset import channels_first
from robustmail.data.testsets import TestSet
from robustmail.errors import DataError, ModelError, PluginError, RecipeError
from robustmail.evaluation.attack_specs import attack_spec
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.runner import run_evaluation
from robustmail.evaluation.task import EvaluationTask
from robustmail.fields import describe
from robustmail.models.classifier import Classifier

N = 40
CHANNELS_LAST = np.random.default_rng(0).integers(0, 256, (N, 6, 5, 3), dtype=np.uint8)
LABELS = [i % 3 for i in range(N)]
EXPECTED = torch.from_numpy(CHANNELS_LAST.transpose(0, 3, 1, 2).copy())


class Pictures(Dataset):  # type: ignore[type-arg]
    """A data set as people write it: PIL images through a transform, on request in rows."""

    def __init__(self, transform: Any = None, row: Any = tuple, images: Any = CHANNELS_LAST) -> None:
        self.transform, self.row, self.images = transform, row, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        image = Image.fromarray(self.images[i])
        return self.row((self.transform(image) if self.transform else image, LABELS[i]))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, transform: Any, shuffled: bool = False) -> None:
        self.of, self.shuffled = Pictures(transform), shuffled

    def __iter__(self) -> Any:
        order = list(range(N))
        if self.shuffled:
            random.shuffle(order)
        return (self.of[i] for i in order)


class Rows:
    """As much of Hugging Face's Dataset as is used: rows are dicts, whole columns come by name."""

    def __init__(self, image: str, label: str, pack: Any = Image.fromarray) -> None:
        self.column_names, self.pack = [image, "id", label], pack

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, id, label = self.column_names
        return {image: self.pack(CHANNELS_LAST[i]), id: str(i), label: LABELS[i]}


TENSOR = transforms.ToTensor()
HALVES = Subset(Pictures(TENSOR), range(N // 2)), Subset(Pictures(TENSOR), range(N // 2, N))


def together(rows: list[Any]) -> dict[str, Any]:
    return {"pixel_values": [TENSOR(image) for image, _ in rows], "labels": torch.tensor([y for _, y in rows])}


GOOD = {
    "arrays": lambda: (EXPECTED.numpy(), LABELS),
    "channels last": lambda: (CHANNELS_LAST, np.array(LABELS)),
    "a list of PIL images": lambda: ([Image.fromarray(image) for image in CHANNELS_LAST], LABELS),
    "columns": lambda: {"image": torch.from_numpy(CHANNELS_LAST), "label": torch.tensor(LABELS)[:, None]},
    "PIL images": lambda: Pictures(),
    "tensors": lambda: Pictures(TENSOR),
    "two halves": lambda: ConcatDataset(HALVES),
    "tensor data set": lambda: TensorDataset(EXPECTED.float() / 255, torch.tensor(LABELS)),
    "three things an item": lambda: Pictures(TENSOR, lambda item: (*item, {"name": "x"})),
    "numpy images, labels of shape [1]": lambda: Pictures(np.asarray, lambda item: (item[0], np.array([item[1]]))),
    "Hugging Face": lambda: Rows("image", "label"),
    "Hugging Face, CIFAR-100": lambda: Rows("img", "fine_label"),
    "Hugging Face, arrays": lambda: Rows("pixel_values", "labels", lambda image: TENSOR(image)),
    "a list of rows": lambda: [Rows("image", "label")[i] for i in range(N)],
    "loader": lambda: DataLoader(Pictures(TENSOR), batch_size=7),
    "loader that shuffles and drops the rest": lambda: DataLoader(Pictures(TENSOR), 7, shuffle=True, drop_last=True),
    "loader without batches": lambda: DataLoader(Pictures(TENSOR), batch_size=None),
    "loader with an own collate": lambda: DataLoader(Pictures(), 6, collate_fn=together),
    "loader with a process": lambda: DataLoader(Pictures(TENSOR), 20, num_workers=1),
    "loader of a stream": lambda: DataLoader(Stream(TENSOR), 9),
    "stream": lambda: Stream(TENSOR),
    "generator of batches": lambda: iter([(EXPECTED[:30], torch.tensor(LABELS[:30])), (EXPECTED[30:], LABELS[30:])]),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_whatever_holds_labelled_images_is_read_in_its_own_order_and_draws_nothing(make):
    state = torch.get_rng_state()
    part = read_data("evaluate", make())
    images = part.x if part.x.dtype == torch.uint8 else (part.x * 255).round().to(torch.uint8)
    assert torch.equal(images, EXPECTED)
    assert part.y.tolist() == LABELS
    assert part.x.is_contiguous()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("make", [GOOD["tensors"], GOOD["loader"], GOOD["stream"], GOOD["columns"]])
def test_only_the_first_n_images_are_taken(make):
    assert read_data("evaluate", make(), 8).y.tolist() == LABELS[:8]
    with pytest.raises(DataError, match="there are 40 images"):
        read_data("evaluate", make(), 41)


def test_a_data_set_of_many_images_is_not_read_to_the_end_for_a_few():
    class Counted(Pictures):
        read = 0

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, i: int) -> Any:
            self.read += 1
            return super().__getitem__(i % N)

    counted = Counted(TENSOR)
    read_data("evaluate", counted, 5)
    assert counted.read <= 2 * 32 + 5


def test_grey_images_among_coloured_ones_are_coloured_and_alone_they_are_grey():
    grey, colour = Image.fromarray(CHANNELS_LAST[0, ..., 0]), Image.fromarray(CHANNELS_LAST[1])
    mixed = read_data("evaluate", [(grey, 0), (colour, 1), (grey, 1)])
    assert mixed.x.shape == (3, 3, 6, 5)
    assert torch.equal(mixed.x[0, 0], mixed.x[0, 2])
    assert read_data("evaluate", [(grey, 0), (grey, 1)]).x.shape == (2, 1, 6, 5)
    assert read_data("evaluate", (torch.zeros(3, 6, 5), [0, 1, 2])).x.shape == (3, 1, 6, 5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((9, 32, 32, 3), (9, 3, 32, 32)), ((9, 28, 28, 1), (9, 1, 28, 28)), ((9, 4, 7, 3), (9, 3, 4, 7)),
     ((9, 3, 32, 32), (9, 3, 32, 32)), ((9, 3, 4, 4), (9, 3, 4, 4)), ((9, 1, 7, 3), (9, 1, 7, 3)),
     ((9, 64, 1, 1), (9, 64, 1, 1)), ((9, 28, 28), (9, 1, 28, 28))],
)  # fmt: skip
def test_one_rule_says_where_the_channels_are(shape, expected):
    assert channels_first(torch.zeros(shape)).shape == expected


CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NORMALISED = transforms.Compose([TENSOR, transforms.Normalize(*CIFAR10)])
TOLD = (
    r"mean \(0.4914, 0.4822, 0.4465\) and std \(0.2471, 0.2435, 0.2616\).*Take Normalize out.*Classifier\(model, \(\(0"
)


class Drawn(Pictures):
    def __getitem__(self, i: int) -> Any:
        return TENSOR(Image.fromarray(self.images[i])) + 0.1 * torch.rand(()), 0


class Broken(Pictures):
    def __getitem__(self, i: int) -> Any:
        raise FileNotFoundError("17.png")


def augmented(transform: Any) -> Pictures:
    return Pictures(transforms.Compose([transform, TENSOR]))


BAD = {
    "normalised": (Pictures(NORMALISED), TOLD),
    "normalised, in a subset, in a loader": (DataLoader(Subset(Pictures(NORMALISED), [3, 2, 1]), 2), TOLD),
    "normalised within [0, 1]": (
        Pictures(transforms.Compose([TENSOR, transforms.Normalize([-1.0], [2.0])])), r"mean \(-1.0,\) and std \(2.0,\)",
    ),
    "normalised arrays": ((EXPECTED.float() / 128 - 1, LABELS), r"outside \[0, 1\]. Undo the normalisation"),
    "floats to 255": ((EXPECTED.float(), LABELS), r"span \[0, 255\], outside \[0, 1\]. Divide them by 255"),
    "flipped at random": (augmented(transforms.RandomHorizontalFlip(0.1)), r"gives other .*\(RandomHorizontalFlip\)"),
    "cropped at random, in a loader": (DataLoader(augmented(transforms.RandomCrop(4)), 8), r"other .*\(RandomCrop\)"),
    "random without a name": (Drawn(), "Drawn gives other images when it is read again. Read it without"),
    "random collate": (
        DataLoader(Pictures(TENSOR), 8, collate_fn=lambda rows: [(rows[0][0] * random.random())[None], torch.zeros(1)]),
        "DataLoader gives other images",
    ),
    "a stream that shuffles": (Stream(TENSOR, shuffled=True), r"Stream gives other images.*pass list\(data\)"),
    "a sampler": (
        DataLoader(Pictures(TENSOR), 4, sampler=torch.utils.data.WeightedRandomSampler([1.0] * N, N)),
        r"chooses images by a WeightedRandomSampler. Pass loader.dataset, or torch.utils.data.Subset\(",
    ),
    "an own batch sampler": (DataLoader(Pictures(TENSOR), batch_sampler=[[0, 1], [5]]), "images by a list"),
    "with replacement": (
        DataLoader(Pictures(TENSOR), 4, sampler=torch.utils.data.RandomSampler(LABELS, replacement=True)),
        "images by a RandomSampler",
    ),
    "sizes": (Pictures(images=[CHANNELS_LAST[0], CHANNELS_LAST[1][:4]]), r"differ in size: \[4, 5, 3\], \[6, 5, 3\]"),
    "16 bits": (([Image.fromarray(np.zeros((4, 4), np.uint16))] * 2, [0, 1]), "pixels of mode I;16. Save"),
    "no labels": (TensorDataset(EXPECTED), "an item is a tuple of one thing"),
    "one-hot": (Pictures(TENSOR, lambda item: (item[0], torch.eye(3)[item[1]])), r"Pass y.argmax\(1\) of one-hot"),
    "texts": ([(image, "cat") for image in EXPECTED], "a label is the text 'cat'"),
    "unlabelled": ([(image, -1) for image in EXPECTED], "has the label -1"),
    "no such column": (Rows("picture", "label"), "no column is called image: there are picture, id, label"),
    "splits": (dict.fromkeys(("train", "test"), Rows("image", "label")), r"pass one of them, as data\['test'\]"),
    "empty": (Pictures(images=[]), "the Pictures is empty"),
    "broken": (Broken(), "the Broken fails after 0 items .FileNotFoundError: 17.png"),
    "a name": ("cifar10", r"Pass load_data\('cifar10'\)"),
    "a number": (7, "data are a int"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "wrong"), BAD.values(), ids=BAD)
def test_data_that_would_be_misread_are_refused_with_what_to_write(data, wrong):
    with pytest.raises(DataError, match=wrong) as caught:
        read_data("evaluate", data)
    assert "\n" not in str(caught.value)


def test_evaluate_judges_a_loader_as_it_judges_arrays(fitted_model):
    model, part = fitted_model
    expected = evaluate(model, part, "nat,pgd3", eps=2 / 255).ledger
    rows = [{"image": x, "label": y} for x, y in zip(*part, strict=True)]
    for data in (
        DataLoader(TensorDataset(*part), 5, shuffle=True),
        TensorDataset(*part),
        (part.x.permute(0, 2, 3, 1), part.y),
        rows,
    ):
        assert evaluate(model, data, "nat,pgd3", eps=2 / 255).ledger.broken_by == expected.broken_by


@pytest.mark.long
def test_verify_takes_what_evaluate_takes(fitted_model, tmp_path):
    model, part = fitted_model
    data = TestSet("sixteen", part, 10)
    list(run_evaluation(EvaluationTask(LoadedModel.of(model, data), data, ("nat", "pgd3"), 8 / 255), tmp_path))
    for images in (DataLoader(TensorDataset(*part), 5, shuffle=True), part, (part.x.permute(0, 2, 3, 1), part.y)):
        assert verify(tmp_path, model, images).images == 16
    with pytest.raises(DataError, match=r"verify: images span \[0, 255\]"):
        verify(tmp_path, model, TensorDataset(part.x.float(), part.y))


def test_what_load_data_returns_is_data(fitted_model):
    found = load_data("digits").first(20)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert len(evaluate(linear, found, "nat").ledger) == 20


@dataclass
class Output:
    """As Hugging Face's ImageClassifierOutput."""

    logits: torch.Tensor
    loss: None = None


class HuggingFace(nn.Module):
    """A network of which the logits are a part of what it returns."""

    def __init__(self, net: nn.Module, pack: Any = Output) -> None:
        super().__init__()
        self.net, self.pack = net, pack

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.pack(self.net(pixel_values))


@pytest.mark.parametrize("pack", [Output, lambda z: {"loss": None, "logits": z}], ids=["output", "dict"])
def test_a_network_of_hugging_face_is_judged_by_its_logits(fitted_model, pack):
    model, part = fitted_model

    def mine(seen, x, y):
        return (x + 1 / 255 * seen(x).sum() * 0).clamp(0, 1)  # an attack of one's own gets logits, too

    expected = evaluate(model, part, ("nat", "pgd3", mine), eps=2 / 255)
    for wrapped in (HuggingFace(model, pack), Classifier(HuggingFace(model, pack)).eval()):
        found = evaluate(wrapped, part, ("nat", "pgd3", mine), eps=2 / 255)
        assert found.ledger.broken_by == expected.ledger.broken_by


def test_a_network_of_hugging_face_is_trained_in_every_precision():
    recipe = Recipe(data=digits(), model=lambda classes, channels: HuggingFace(nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(144, classes))), attack=PGD(eps=0.1, alpha=0.1, steps=1),
        objective=AT(), epochs=1, batch=700, validate="pgd1")  # fmt: skip
    for precision in ("fp32", "bf16"):
        assert list(fit(recipe.but(precision=precision)))


def test_a_network_that_returns_a_tuple_is_told_what_to_return(fitted_model):
    with pytest.raises(ModelError, match=r"returned tuple, expected logits .*, or an output that has .logits. Return"):
        evaluate(Classifier(HuggingFace(fitted_model[0], lambda z: (z, z))), fitted_model[1], "nat")


def theirs(model: nn.Module, name: str = "PGD", **knobs: Any) -> Any:
    """An attack of torchattacks, bound to a model."""
    import torchattacks

    return getattr(torchattacks, name)(model, **knobs)


def of_art(model: nn.Module, name: str = "ProjectedGradientDescent", clip: Any = (0, 1), **knobs: Any) -> Any:
    """An attack of ART, bound to a model."""
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    preprocessing = knobs.pop("preprocessing", (0.0, 1.0))
    bound = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=clip, preprocessing=preprocessing
    )
    return getattr(evasion, name)(bound, **knobs)


TAKEN = {
    "PGD": (lambda m: theirs(m, eps=4 / 255, alpha=1 / 255, steps=7),
            "torchattack('PGD', eps=4/255, alpha=1/255, steps=7, random_start=True)"),
    "APGD": (lambda m: theirs(m, "APGD", eps=4 / 255, rho=0.5, norm="L2"),
             "norm='L2', eps=4/255, steps=10, n_restarts=1, seed=0, loss='ce', eot_iter=1, rho=0.5"),
    "FAB": (lambda m: theirs(m, "FAB", n_classes=7), "seed=0, multi_targeted=False, n_classes=7)"),
    "Square": (lambda m: theirs(m, "Square", resc_schedule=False), "resc_schedule=False"),
    "DIFGSM": (lambda m: theirs(m, "DIFGSM", resize_rate=0.8), "resize_rate=0.8"),
    "SPSA": (lambda m: theirs(m, "SPSA", nb_iter=2), "nb_iter=2"),
    "ART's PGD": (lambda m: of_art(m, eps=4 / 255, eps_step=1 / 255, max_iter=3, num_random_init=1),
                  "norm=inf, eps=4/255, eps_step=1/255, decay=None, max_iter=3, targeted=False, num_random_init=1"),
    "ART's Square": (lambda m: of_art(m, "SquareAttack", max_iter=9), "adv_criterion=None, loss=None, max_iter=9"),
    "ART's Carlini": (lambda m: of_art(m, "CarliniL2Method", confidence=0.5), "art('CarliniL2Method', confidence=0.5"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), TAKEN.values(), ids=TAKEN)
def test_an_attack_of_a_library_bound_to_a_model_is_used_with_its_own_settings(fitted_model, make, said):
    attack = make(fitted_model[0])
    (value,) = attack_spec(attack, 4 / 255, 10).stages.values()
    assert said in describe(value)
    assert attack_spec(value, 4 / 255, 10).stages == {type(attack).__name__: value}


def test_the_model_that_an_attack_is_bound_to_is_replaced(fitted_model):
    model, part = fitted_model
    other = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    told = {"eps": 32 / 255, "alpha": 8 / 255, "steps": 9}
    expected = evaluate(model, part, (torchattack("PGD", **told),), eps=32 / 255)
    found = evaluate(model, part, (theirs(other, **told),), eps=32 / 255)
    assert found["PGD"].settings == expected["PGD"].settings
    assert found.ledger.broken_by == expected.ledger.broken_by
    assert expected["PGD"].correct < expected["PGD"].n
    recipe = Recipe(data=digits(), model="small_cnn", attack=theirs(other, **told), objective=AT(), epochs=1)
    assert recipe == recipe.but(attack=torchattack("PGD", **told))
    assert recipe.budget == 32 / 255


def changed(attack: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(attack, name, value)
    return attack


def told(attack: Any, method: str, *args: Any, **options: Any) -> Any:
    getattr(attack, method)(*args, **options)
    return attack


class Own:
    """A class of one's own on a library's, made late, for the library is imported late."""

    def __new__(cls, model: nn.Module) -> Any:
        return type("Mine", (type(theirs(model)),), {})(model)


LEFT = {
    "a class": (
        lambda m: type(theirs(m)),
        r"of torchattacks, not .*Write torchattack\('PGD', eps=8/255, ",
    ),
    "a class of ART": (lambda m: type(of_art(m, "DeepFool")), r"of ART, not .*Write art\('DeepFool'\)"),
    "a class of one's own": (Own, "Mine: is a class of one's own on one of torchattacks, .*Write a function"),
    "targeted": (lambda m: told(theirs(m), "set_mode_targeted_random", quiet=True), "is targeted"),
    "targeted, of ART": (lambda m: of_art(m, targeted=True), "is targeted"),
    "in training mode": (lambda m: told(theirs(m), "set_model_training_mode", True), "attack_mode='train'"),
    "normalised": (
        lambda m: told(theirs(m), "set_normalization_used", [0.5] * 3, [0.2] * 3),
        r"normalises images itself.*Classifier\(model, \(\(0.5, 0.5, 0.5\), \(0.2, 0.2, 0.2\)\)\)",
    ),
    "normalised, of ART": (
        lambda m: of_art(m, preprocessing=(0.5, 0.25)),
        r"Classifier\(model, \(\(0.5,\), \(0.25,\)\)",
    ),
    "bytes": (lambda m: of_art(m, clip=(0, 255)), r"takes images in \[0.0, 255.0\]. Images are in \[0, 1\] here"),
    "eps of bytes": (lambda m: theirs(m, eps=8), "Write eps=8/255"),
    "a changed attribute": (lambda m: changed(theirs(m, "SPSA"), loss_fn=nn.CrossEntropyLoss()), "SPSA: its loss_fn"),
    "an own criterion": (lambda m: of_art(m, "SquareAttack", adv_criterion=lambda a, b: a), "its adv_criterion"),
    "what it does not keep": (lambda m: theirs(m, "PGDRS"), "does not keep its noise_type"),
}


@pytest.mark.parametrize(("make", "wrong"), LEFT.values(), ids=LEFT)
def test_an_attack_whose_settings_cannot_be_taken_over_is_refused_with_what_to_write(fitted_model, make, wrong):
    attack = make(fitted_model[0])
    for use in (lambda: evaluate(*fitted_model, (attack,)), lambda: Recipe(
        data=digits(), model="small_cnn", attack=attack, objective=AT(), epochs=1)):  # fmt: skip
        with pytest.raises((RecipeError, PluginError), match=wrong) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_the_documentation_can_be_run():
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("### What may be handed over")[2], re.DOTALL)[:1]
    assert "DataLoader(" in code
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    exec(code, {"data": load_data("digits").first(100), "evaluate": evaluate, "model": model})


def test_the_line_that_an_error_gives_makes_the_attack(fitted_model):
    net = fitted_model[0]
    pairs = [(torchattack("PGD", eps=8 / 255), theirs(net)),
             (art("DeepFool", max_iter=3, batch_size=1), of_art(net, "DeepFool", max_iter=3))]  # fmt: skip
    for written, attack in pairs:
        assert list(attack_spec(attack, 8 / 255, 10).stages.values()) == [written]


def test_labels_that_count_from_one_are_told_where_the_model_has_one_class_too_few() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.rand(6, 3, 2, 2)
    with pytest.raises(ModelError, match="Labels seem to count from 1: subtract 1"):
        evaluate(model, (x, torch.arange(6) % 3 + 1), "nat")
    with pytest.raises(ModelError, match="Bring data of the model's own classes"):
        evaluate(model, (x, torch.arange(6)), "nat")
