"""Judge a finished evaluation again, in two forward passes, and hold every number against what it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.data.adapters import read_data
from robustmail.data.dataset import tensor_hash
from robustmail.data.image_files import Preprocess
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, is_built_in
from robustmail.evaluation.data_loading import open_data, open_recorded_data
from robustmail.evaluation.evaluator import BLOCK, attack_result, batch_sizer, clean_pass
from robustmail.evaluation.evaluator import image_batch as seen
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.ledger import BROKE, UNTRIED, Ledger, rows_as_text, write_rows
from robustmail.evaluation.model_loading import LoadedModel, reload_model
from robustmail.evaluation.storage import StoredEvaluation, read_evaluation, summed_again
from robustmail.evaluation.task import context_of, describe_data, fingerprint_and_hashes
from robustmail.records import AttackResult
from robustmail.runtime.devices import pick_device
from robustmail.runtime.untrusted import beside, data_source, is_code, verify_command

__all__ = ["Verified", "verify"]

CLOSE = 1e-4  # two logits so near, relative to their size, may change places on another machine
MARGIN = 1e-3


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    images, examples: how many were checked. close: rows whose logits are too close to decide on this machine.
    unchecked: what no file can prove, in sentences.
    """

    images: int
    examples: int
    close: int
    unchecked: tuple[str, ...] = ()


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
        raise RunError(str(folder), wrong, f"If you trust it: {verify_command(held.folder, spec)}")
    found: TestSet = images or (
        open_data(data, _preprocess(spec)) if data else open_recorded_data(spec["data_given"], str(folder))
    )
    found = found.first_at_most(spec["n"]).checked()
    named = spec | ({"model": factory} if factory else {})
    subject = (
        LoadedModel.of(model, found) if model is not None else reload_model(named, found, there, pick_device(device))
    )
    moved = there is not None and str(there) != spec["checkpoint"]
    return _verify(held, subject, found, moved)


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


def _verify(held: StoredEvaluation, subject: LoadedModel, data: TestSet, moved: bool) -> Verified:
    results, ledger = held.results, held.ledger
    where = held.folder / "ledger.csv"

    def fail(at: int, wrong: str) -> RunError:
        return RunError(f"{where}, row {at + 1} (image {int(ledger.index[at])})", wrong)

    try:
        _check_sums(held, subject.classes)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # of another structure
        wrong = f"is damaged or was altered ({type(error).__name__}: {error})"
        raise RunError(str(held.folder / "results.json"), wrong) from error
    if not moved and subject.sha256 and results["weights"]["sha256"] != subject.sha256:
        raise RunError(str(subject.spec["checkpoint"]), "is not the file that was evaluated: its bytes differ")
    if results["weights"]["fingerprint"] != subject.fingerprint:
        raise RunError(str(subject.spec["checkpoint"]), "holds other weights than those that were evaluated")
    k, of = results["shard"] or (1, 1)
    if (results["shard"] and not 1 <= k <= of <= -(-results["spec"]["n"] // BLOCK)) or results["shard"] == [1, 1]:
        raise RunError(str(held.folder / "results.json"), f"says it is shard {k} of {of}, which there is not")
    places = [i for i in range(results["spec"]["n"]) if (i // BLOCK) % of == k - 1]
    for at, index in enumerate(ledger.index.tolist()):
        if at >= len(places) or index != places[at]:
            raise fail(at, "is out of its place: rows were moved, doubled or left out")
    if len(places) != len(ledger):
        raise RunError(str(where), f"has {len(ledger)} rows of {len(places)}: some were left out")
    if int(ledger.index.max()) >= len(data.part.y):
        raise RunError(
            data.name, f"has {len(data.part.y)} images, the ledger speaks of image {int(ledger.index.max())}"
        )
    mine = data.part.take(ledger.index)
    fingerprint, hashes = fingerprint_and_hashes(data.part)
    images = [hashes[i] for i in ledger.index.tolist()]
    for at, row in enumerate(held.rows):
        if images[at] != row["image"]:
            raise fail(at, f"the image in {data.name} is another one")
        if int(mine.y[at]) != int(ledger.label[at]):
            raise fail(at, f"the label in {data.name} is {int(mine.y[at])}, not {int(ledger.label[at])}")
    if fingerprint != results["data"]["fingerprint"]:
        raise RunError(data.name, "its images or labels are not those that were evaluated")
    _check_data_facts(held, subject, data, fingerprint)
    if held.stored != tuple(ledger.index[sorted(ledger.examples)].tolist()):
        raise RunError(str(held.folder / "examples.safetensors"), "holds examples that the ledger does not speak of")
    examples = {at: tensor_hash(x) for at, x in ledger.examples.items()}
    text = write_rows(ledger, images, examples, context_of(subject.fingerprint, results["spec"]))
    if text != rows_as_text(held.rows):
        raise RunError(str(where), "is not what robustmail writes of these verdicts: it was altered")
    room = batch_sizer(subject.model, mine)
    clean = clean_pass(subject.model, mine, room, ledger.index)
    if not torch.equal(clean.margin, clean_pass(subject.model, mine, room, ledger.index).margin):
        raise RunError(str(held.folder), "cannot be judged again: asked twice, the model answers differently",
                       "Switch off what is random in it, or what depends on the passes before.")  # fmt: skip
    close = _check_clean(ledger, clean, fail)
    close += _check_examples(held, subject, mine, room.pass_size, fail)
    return Verified(len(ledger), len(ledger.examples), close, tuple(_unchecked(held)))


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


def _unchecked(held: StoredEvaluation) -> Iterator[str]:
    """What cannot be checked, in sentences."""
    yield "that images which stand were attacked at all, with these settings: only attacking them again can tell"
    if held.results["measured"]:
        yield "what the model was asked for the light, and the curve of accuracy by eps"
    if own := [row["name"] for row in held.results["attacks"] if not is_built_in(row["name"])]:
        yield f"the settings of {', '.join(own)}, which are no attacks of ours"
    yield "times, versions, the machine and the command"


def _check_sums(held: StoredEvaluation, classes: int) -> None:
    """Whether results.json follows from the ledger, and the ledger's columns from one another (raises RunError)."""
    results, ledger = held.results, held.ledger
    path = str(held.folder / "results.json")
    if not results["complete"]:
        raise RunError(path, "is not finished", "Run the same robustmail eval command again.")
    for at, by in enumerate(ledger.broken_by):
        broke = [stage for stage, outcome in ledger.stages.items() if int(outcome[at]) == BROKE]
        wrong = int(ledger.predicted[at]) != int(ledger.label[at])
        if (by == "natural") != wrong or (by not in ("", "natural") and by not in broke) or (by == "" and broke):
            contradiction = f"broken_by says {by or 'stands'!r}, its columns {', '.join(broke) or 'nothing'}"
            raise RunError(f"{held.folder / 'ledger.csv'}, row {at + 1} (image {int(ledger.index[at])})", contradiction)
    rows = [AttackResult(**row) for row in results["attacks"]]
    for row in rows:
        if any((ledger.outcome(stage) == UNTRIED).all() and bool(ledger.right.any()) for stage in row.stages[:1]):
            raise RunError(path, f"says that {row.name} was run, the ledger knows nothing of it")
    if list(dict.fromkeys(stage for row in rows for stage in row.stages)) != list(ledger.stages):
        raise RunError(path, f"its attacks are not those of the ledger, {', '.join(ledger.stages) or 'none'}")
    spec, again = results["spec"], []
    for row in rows:
        what = attack_spec(row.name, spec["eps"], classes, spec["norm"]) if is_built_in(row.name) else row
        again.append(attack_result(ledger, what, spec["seed"]))
        if again[-1].stages != row.stages or again[-1].settings != row.settings:
            raise RunError(path, f"its stages or settings are not those of {row.name}: it was altered, or the attack "
                           "is another one in this version")  # fmt: skip
        _check_tried(held, row)
    expected = summed_again(held.folder, ledger, again, classes, results["measured"])
    for name, value in expected.items():
        if name != "seconds" and _plain(value) != _plain(results.get(name)):
            raise RunError(path, f"{name} does not follow from the ledger: it was altered")
    if [row.name for row in rows] != results["spec"]["attacks"] or results["n"] != len(ledger):
        raise RunError(path, "the attacks or the number of images do not fit the ledger: it was altered")


def _check_tried(held: StoredEvaluation, row: AttackResult) -> None:
    """Whether every stage tried every image that stood before it (raises RunError)."""
    for k, stage in enumerate(row.stages):
        skipped = held.ledger.standing(row.stages[:k]) & (held.ledger.outcome(stage) == UNTRIED)
        if skipped.any():
            at = int(skipped.nonzero()[0])
            raise RunError(f"{held.folder / 'ledger.csv'}, row {at + 1} (image {int(held.ledger.index[at])})",
                           f"stood before {stage} of {row.name}, but was not tried")  # fmt: skip


def _plain(value: Any) -> Any:
    """Without times, and with tuples as JSON reads them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k != "seconds"}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _check_clean(ledger: Ledger, clean: Ledger, fail: Any) -> int:
    close = 0
    for at in (clean.predicted != ledger.predicted).nonzero().flatten().tolist():
        if abs(float(clean.margin[at])) > MARGIN:
            raise fail(at, f"the model says {int(clean.predicted[at])}, not {int(ledger.predicted[at])}")
        close += 1
    far = (clean.margin - ledger.margin).abs() > MARGIN
    if far.any():
        at = int(far.nonzero()[0])
        raise fail(at, f"its margin is {float(clean.margin[at]):.4f}, not {float(ledger.margin[at]):.4f}")
    return close


def _check_examples(held: StoredEvaluation, subject: LoadedModel, part: Any, size: int, fail: Any) -> int:
    ledger, close = held.ledger, 0
    spec = AttackSpec("verify", {}, held.results["spec"]["eps"], held.results["spec"]["norm"])
    broken = [at for at, by in enumerate(ledger.broken_by) if by not in ("", "natural")]
    if missing := [at for at in broken if at not in ledger.examples]:
        raise fail(missing[0], "was broken, but has no example")
    if extra := [at for at in ledger.examples if at not in broken]:
        raise fail(extra[0], "has an example, but was not broken by an attack")
    for some in torch.tensor(broken, dtype=torch.int64).split(256) if broken else ():
        x, y = seen(subject.model, part, some)
        examples = torch.stack([ledger.examples[int(at)] for at in some]).to(x)
        with exact_inference(subject.model, size) as view, torch.no_grad():
            logits = view(examples)
        predicted, distance = logits.argmax(1).cpu(), (examples - x).flatten(1)
        distance = (distance.norm(dim=1) if spec.norm == "l2" else distance.abs().amax(1)).cpu()
        inside = spec.in_ball(x, examples).cpu() & ((examples >= 0) & (examples <= 1)).flatten(1).all(1).cpu()
        for k, at in enumerate(some.tolist()):
            if not inside[k]:
                raise fail(
                    at, f"its example lies {float(distance[k]):.6f} away, eps is {spec.eps:.6f}; or it left [0, 1]"
                )
            if abs(float(distance[k] - ledger.distance[at])) > 1e-6:
                raise fail(at, f"its example lies {float(distance[k]):.6f} away, not {float(ledger.distance[at]):.6f}")
            if int(ledger.broken_as[at]) == int(y[k]):  # near or not, the true class is no break
                raise fail(at, f"its example is recorded as {int(y[k])}, its true class, so it was not broken")
            if int(predicted[k]) != int(ledger.broken_as[at]):
                if not _is_close(logits[k], int(ledger.broken_as[at])):
                    raise fail(
                        at, f"the model says {int(predicted[k])} of its example, not {int(ledger.broken_as[at])}"
                    )
                close += 1
    return close


def _is_close(logits: Tensor, recorded: int) -> bool:
    return float(logits.max() - logits[recorded]) <= CLOSE * max(1.0, float(logits.abs().max()))
