"""Judge a finished evaluation again, in two forward passes, and compare every number with what it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.data.adapters import read_data
from robustmail.data.dataset import tensor_hash
from robustmail.data.image_files import Preprocess
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.data_loading import open_data, open_recorded_data
from robustmail.evaluation.evaluator import batch_sizer, clean_pass
from robustmail.evaluation.evaluator import image_batch as seen
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.ledger import Ledger, rows_as_text, write_rows
from robustmail.evaluation.model_loading import LoadedModel, reload_model
from robustmail.evaluation.storage import StoredEvaluation, read_evaluation
from robustmail.evaluation.task import context_of, describe_data, fingerprint_and_hashes
from robustmail.evaluation.verify_files import (
    CHECKED,
    Verified,
    broken_rows,
    check_balls,
    check_places,
    check_results,
    row_error,
    unchecked,
)
from robustmail.runtime.devices import pick_device
from robustmail.runtime.progress import progress
from robustmail.runtime.untrusted import beside, data_source, is_code, verify_command

__all__ = ["verify"]

CLOSE = 1e-4  # two logits so near, relative to their size, may change places on another machine
MARGIN = 1e-3
JUDGED = ("the model predicts what the ledger says, of all images and of all examples",)


def verify(
    folder: str | Path,
    model: nn.Module | None = None,
    images: Any = None,
    *,
    checkpoint: str | Path | None = None,
    data: str | None = None,
    factory: str | None = None,
    device: str = "auto",
) -> Verified:
    """Check an evaluation made by somebody else, in two forward passes: no attack is run again.

    A folder does not decide what is opened: only weights inside of it and built-in data need not be passed.

    folder: of the evaluation.
    model: the model, if it is in memory; it takes images in [0, 1] and stays on its device.
    images: the images and labels, as `evaluate` takes data.
    checkpoint: file of the weights, or hf://OWNER/NAME/FILE@REVISION.
    data: the images by name or path, as `load_data` takes them.
    factory: file.py:factory that builds the network.
    device: "auto", "cpu", "cuda", ...; where the checkpoint is loaded.

    Raises RunError, with the command to use: something has to be passed. Raises RunError, naming the row: weights,
    data, an image, an example, its distance, a prediction, eps or a number in results.json is not what it was.
    """
    held = read_evaluation(Path(folder), strict=True)
    spec = held.results["spec"]
    if images is not None and not isinstance(images, TestSet):
        part = read_data("verify", images)
        images = TestSet("images", part, int(part.y.max()) + 1)
    there = checkpoint or beside(held.folder, spec["checkpoint"])
    if wanted := _wanted(held, model is not None, images is not None or bool(data), there, factory):
        wrong = f"was made with {', '.join(wanted)}, and a file may not say what to open"
        todo = f"If you trust it: {verify_command(held.folder, spec)}; without it: --files-only."
        raise RunError(str(folder), wrong, todo)
    found: TestSet = images or (
        open_data(data, _preprocess(spec)) if data else open_recorded_data(spec["data_given"], str(folder))
    )
    found = found.first_at_most(spec["n"]).checked()
    named = spec | ({"model": factory} if factory else {})
    subject = (
        LoadedModel.of(model, found) if model is not None else reload_model(named, found, there, pick_device(device))
    )
    moved = there is not None and str(there) != spec["checkpoint"]
    return _verify(held, subject, found, moved, images is not None or bool(data))


def _preprocess(spec: dict[str, Any]) -> Preprocess | None:
    """How the images were resized: numbers and a word, which are checked."""
    return Preprocess(**given) if (given := spec.get("preprocess")) else None


def _wanted(
    held: StoredEvaluation, model: bool, data: bool, checkpoint: str | Path | None, factory: str | None
) -> list[str]:
    """What the folder names and does not contain, so that the caller has to pass it."""
    spec, found = held.results["spec"], []
    if not model and spec["checkpoint"] and checkpoint is None:
        found.append(f"the weights {spec['checkpoint']}")
    if not data and spec["data_given"] and data_source(spec["data_given"]) is None:
        found.append(f"the data {spec['data_given']}")
    if not model and is_code(spec["model"]) and factory is None:
        found.append(f"the code {spec['model']}")
    return found


def _verify(held: StoredEvaluation, subject: LoadedModel, data: TestSet, moved: bool, brought: bool) -> Verified:
    """moved: the weights are in another file than the recorded one. brought: the caller passed the data."""
    results, ledger = held.results, held.ledger
    check_results(held, subject.classes)
    if not moved and subject.sha256 and results["weights"]["sha256"] != subject.sha256:
        raise RunError(str(subject.spec["checkpoint"]), "is not the file that was evaluated: its bytes differ")
    if results["weights"]["fingerprint"] != subject.fingerprint:
        raise RunError(str(subject.spec["checkpoint"]), "holds other weights than those that were evaluated")
    check_places(held)
    if int(ledger.index.max()) >= len(data.part.y):
        raise RunError(
            data.name, f"has {len(data.part.y)} images, the ledger speaks of image {int(ledger.index.max())}"
        )
    mine = data.part.take(ledger.index)
    fingerprint, hashes = fingerprint_and_hashes(data.part)
    images = [hashes[i] for i in ledger.index.tolist()]
    for at, row in enumerate(held.rows):
        if images[at] != row["image"]:
            raise row_error(held, at, f"the image in {data.name} is another one")
        if int(mine.y[at]) != int(ledger.label[at]):
            raise row_error(held, at, f"the label in {data.name} is {int(mine.y[at])}, not {int(ledger.label[at])}")
    if fingerprint != results["data"]["fingerprint"]:
        raise RunError(data.name, "its images or labels are not those that were evaluated")
    _check_data_facts(held, subject, data, fingerprint)
    if held.stored != tuple(ledger.index[sorted(ledger.examples)].tolist()):
        raise RunError(str(held.folder / "examples.safetensors"), "holds examples that the ledger does not speak of")
    examples = {at: tensor_hash(x) for at, x in ledger.examples.items()}
    text = write_rows(ledger, images, examples, context_of(subject.fingerprint, results["spec"]))
    if text != rows_as_text(held.rows):
        raise RunError(
            str(held.folder / "ledger.csv"), "is not what robustmail writes of these verdicts: it was altered"
        )
    room = batch_sizer(subject.model, mine)
    clean = clean_pass(subject.model, mine, room, ledger.index)
    if not torch.equal(clean.margin, clean_pass(subject.model, mine, room, ledger.index).margin):
        raise RunError(str(held.folder), "cannot be judged again: asked twice, the model answers differently",
                       "Switch off what is random in it, or what depends on the passes before.")  # fmt: skip
    close = _check_clean(held, clean)
    close += _check_examples(held, subject, mine, room.pass_size)
    return Verified(len(ledger), len(ledger.examples), close, tuple(unchecked(held, brought=brought)), CHECKED + JUDGED)


def _check_data_facts(held: StoredEvaluation, subject: LoadedModel, data: TestSet, fingerprint: str) -> None:
    """Whether the results describe the model and the images as they are (raises RunError)."""
    results, expected = held.results, describe_data(data, subject.classes, fingerprint)
    if data.given is None or data.given != results["spec"]["data_given"]:  # brought along, under whatever name
        expected |= {name: results["data"][name] for name in ("name", "class_names")}
    actual = {**expected, "spec": results["data"]["name"]}
    for name, value in {**results["data"], "spec": results["spec"]["data"]}.items():
        if actual.get(name) != value:
            wrong = f"says of the data: {name} {value}, they have {actual.get(name)}: it was altered"
            raise RunError(str(held.folder / "results.json"), wrong)
    if results["weights"]["file"] != results["spec"]["checkpoint"]:
        raise RunError(str(held.folder / "results.json"), "names two files of weights: it was altered")
    if subject.spec["checkpoint"] not in (None, results["spec"]["checkpoint"]):
        return  # moved, so that its name may be another
    if subject.spec["checkpoint"] and subject.name != results["name"]:
        raise RunError(str(held.folder / "results.json"), f"is called {results['name']!r}, not {subject.name!r}")


def _check_clean(held: StoredEvaluation, clean: Ledger) -> int:
    ledger, close = held.ledger, 0
    for at in (clean.predicted != ledger.predicted).nonzero().flatten().tolist():
        if abs(float(clean.margin[at])) > MARGIN:
            raise row_error(held, at, f"the model says {int(clean.predicted[at])}, not {int(ledger.predicted[at])}")
        close += 1
    far = (clean.margin - ledger.margin).abs() > MARGIN
    if far.any():
        at = int(far.nonzero()[0])
        wrong = f"its margin is {float(clean.margin[at]):.4f}, not {float(ledger.margin[at]):.4f}"
        raise row_error(held, at, wrong)
    return close


def _check_examples(held: StoredEvaluation, subject: LoadedModel, part: Any, size: int) -> int:
    ledger, close = held.ledger, 0
    rows = torch.tensor(broken_rows(held), dtype=torch.int64)
    for start, some in zip(range(0, len(rows), 256), rows.split(256), strict=False):
        progress("adversarial images", start, len(rows))
        x, _ = seen(subject.model, part, some)
        examples = torch.stack([ledger.examples[int(at)] for at in some]).to(x)
        check_balls(held, x, examples, some)
        with exact_inference(subject.model, size) as view, torch.no_grad():
            logits = view(examples)
        for k, at in enumerate(some.tolist()):
            predicted, recorded = int(logits[k].argmax()), int(ledger.broken_as[at])
            if predicted != recorded:
                if not _is_close(logits[k], recorded):
                    raise row_error(held, at, f"the model says {predicted} of its example, not {recorded}")
                close += 1
    return close


def _is_close(logits: Tensor, recorded: int) -> bool:
    return float(logits.max() - logits[recorded]) <= CLOSE * max(1.0, float(logits.abs().max()))
