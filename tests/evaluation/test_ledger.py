"""A verdict belongs to its image: not to the batch, the shard, the process or the day on which it was reached."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robustmail import PGD, evaluate, torchattack
from robustmail.attacks.per_image_noise import per_image_noise
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import AttackError, ModelError, RecipeError, RunError
from robustmail.evaluation import compare as compared
from robustmail.evaluation import runner
from robustmail.evaluation.attacked_images import attacked_images, write_tensor
from robustmail.evaluation.compare import compare
from robustmail.evaluation.evaluator import attack_result
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.evaluation.ledger import BROKE, STOOD, row_seal
from robustmail.evaluation.merge import merge_shards
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.runner import run_evaluation
from robustmail.evaluation.statistics import paired
from robustmail.evaluation.storage import clear, eight_bit, read_evaluation, with_seal, write_pngs
from robustmail.evaluation.task import EvaluationTask, context_of
from robustmail.evaluation.verify import verify
from robustmail.evaluation.verify_files import verify_files
from robustmail.norms import distances, tolerance
from tests.processes import Python, python

pytestmark = pytest.mark.long

EPS = 0.1
ATTACKS = (
    "nat", "pgd10", "cw", torchattack("APGD", eps=EPS, steps=15), torchattack("APGDT", eps=EPS, steps=6),
    torchattack("Square", eps=EPS, n_queries=40),
)  # fmt: skip
NAMES = ("nat", "pgd10", "cw", "APGD", "APGDT", "Square")


def task(model, data, **knobs) -> EvaluationTask:
    return EvaluationTask(
        LoadedModel.of(model, data), data, knobs.pop("attacks", ATTACKS), knobs.pop("eps", EPS), **knobs
    )


@pytest.fixture(scope="module")
def digit_images(digit_images) -> TestSet:
    """60 handwritten digits: what holds for them holds for more, and takes longer."""
    return digit_images.first(60)


@pytest.fixture(scope="module")
def done(robust_cnn, digit_images, tmp_path_factory) -> Path:
    """A finished evaluation of 60 digits."""
    folder = tmp_path_factory.mktemp("done") / "whole"
    list(run_evaluation(task(robust_cnn, digit_images), folder))
    return folder


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """Without the checks on an evaluation itself, which take most of the time of a small one and enter no ledger."""
    monkeypatch.setattr(runner, "_measure", lambda *_: iter(()))


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def bytes_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "ledger.csv").read_bytes(), (folder / "examples.safetensors").read_bytes()


# The same to the bit


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("batch", [7, 20])
def test_the_ledger_is_the_same_to_the_byte_for_any_batch(robust_cnn, digit_images, done, tmp_path, batch):
    list(run_evaluation(task(robust_cnn, digit_images, batch=batch), tmp_path))
    assert bytes_of(tmp_path) == bytes_of(done)


def test_shards_merge_into_the_ledger_of_a_single_process(robust_cnn, digit_images, done, tmp_path):
    parts = [tmp_path / str(k) for k in (1, 2)]
    for k, part in enumerate(parts, start=1):
        list(run_evaluation(task(robust_cnn, digit_images, shard=(k, 2)), part))
    merge_shards(parts[::-1], tmp_path / "merged")
    assert bytes_of(tmp_path / "merged") == bytes_of(done)
    mine, whole = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "merged", done))
    for name in ("n", "shard", "worst_case", "eight_bit", "per_class", "margins", "curve", "believable", "measured"):
        strip = lambda v: {k: w for k, w in v.items() if k != "seconds"} if isinstance(v, dict) else v  # noqa: E731
        assert strip(mine[name]) == strip(whole[name]), name


@pytest.mark.usefixtures("unmeasured")
def test_some_but_not_all_shards_are_not_merged(robust_cnn, digit_images, tmp_path):
    list(run_evaluation(task(robust_cnn, digit_images, shard=(1, 2), attacks=("nat",)), tmp_path / "1"))
    with pytest.raises(RunError, match=r"given the shards 1 of 2.*Name each of 1"):
        merge_shards([tmp_path / "1"], tmp_path / "merged")


@pytest.mark.numeric
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_meets_the_same_fate_alone_and_in_company(robust_cnn, digit_images, norm):
    part, eps = digit_images.part.first(40), 0.1 if norm == "linf" else 0.6
    library = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}
    attacks = ("pgd10", "cw", torchattack("APGDT", steps=5, **library), torchattack("Square", n_queries=20, **library),
               torchattack("FAB", steps=3, multi_targeted=True, **library))  # fmt: skip
    whole = evaluate(robust_cnn, part, attacks, eps, norm).ledger
    alone = Split(part.x[23:31], part.y[23:31])
    few = evaluate(robust_cnn, alone, attacks, eps, norm, batch=3).ledger
    for stage, outcome in few.stages.items():
        assert torch.equal(outcome, whole.stages[stage][23:31]), stage
    assert few.broken_by == whole.broken_by[23:31]
    assert "" in few.broken_by or set(few.broken_by) != {"natural"}
    for at, found in few.examples.items():
        assert torch.equal(found, whole.examples[at + 23])


def test_a_killed_evaluation_goes_on_to_the_same_ledger(digit_images, robust_cnn, tmp_path):
    """A real process, killed for real, twice, while an attack is under way."""
    attacks, few = ("nat", "pgd100", "cw", "apgd"), digit_images.first(24)
    list(run_evaluation(task(robust_cnn, few, attacks=attacks), tmp_path / "whole"))
    torch.save(robust_cnn.net.state_dict(), tmp_path / "hardened.pth")
    words = ["eval", str(tmp_path / "hardened.pth"), "--model", "small_cnn",
             "--normalize", "none", "--data", "digits()", "--n", "24", "--eps", str(EPS),
             "--attacks", ",".join(attacks), "--out", str(tmp_path / "out"), "--batch", "8", "--plain"]  # fmt: skip
    script = (
        "import sys; from robustmail.evaluation import runner; runner.SAVE_EVERY = 0.0; "
        "sys.argv = ['robustmail', *sys.argv[1:]]; from robustmail.cli.main import main; main()"
    )
    for stage in ("pgd100", "apgd-ce"):
        process = Python("-c", script, *words)
        ledger, until = tmp_path / "out" / "ledger.csv", time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            begun = ledger.exists() and (tmp_path / "out" / "results.json").exists()
            if begun and ("stood" in (text := ledger.read_text())) and stage in text.partition("\n")[0]:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        assert not json.loads((tmp_path / "out" / "results.json").read_text())["complete"]
    last = python("-c", script, *words)
    assert last.returncode == 0, last.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.usefixtures("unmeasured")
def test_an_evaluation_that_is_asked_to_stop_saves_what_it_has(robust_cnn, digit_images, done, tmp_path):
    work = run_evaluation(task(robust_cnn, digit_images, batch=20), tmp_path)
    for _ in range(12):
        next(work)
    work.close()
    held = read_evaluation(tmp_path, strict=True)
    assert not held.results["complete"]
    assert "cw" in held.ledger.stages
    list(run_evaluation(task(robust_cnn, digit_images), tmp_path))
    assert bytes_of(tmp_path) == bytes_of(done)


@pytest.mark.usefixtures("unmeasured")
def test_attacks_can_be_added_to_a_finished_evaluation_but_not_taken_away(robust_cnn, digit_images, done, tmp_path):
    list(run_evaluation(task(robust_cnn, digit_images, attacks=ATTACKS[:3]), tmp_path))
    list(run_evaluation(task(robust_cnn, digit_images), tmp_path))
    assert bytes_of(tmp_path) == bytes_of(done)
    with pytest.raises(RunError, match="Attacks can be added at the end"):
        list(run_evaluation(task(robust_cnn, digit_images, attacks=("nat", "cw")), tmp_path))


def test_a_folder_of_another_evaluation_is_refused_with_what_differs(robust_cnn, digit_images, copy):
    with pytest.raises(RunError, match=r"holds another evaluation \(eps: 0.1 there, 0.05 here\)"):
        list(run_evaluation(task(robust_cnn, digit_images, eps=0.05), copy))
    with pytest.raises(RunError, match="other weights"):
        list(run_evaluation(task(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digit_images), copy))


def test_a_foreign_attack_sees_the_same_blocks_whatever_the_batch(robust_cnn, digit_images):
    seen: list[list[int]] = []

    def noisy(model, x, y):
        seen.append([len(x)])
        return (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)

    first = evaluate(robust_cnn, digit_images.part, (noisy,), EPS, batch=200).ledger
    sizes, seen[:] = list(seen), []
    second = evaluate(robust_cnn, digit_images.part, (noisy,), EPS, batch=11).ledger
    assert sizes == seen
    assert torch.equal(first.stages["noisy"], second.stages["noisy"])


def test_per_image_noise_is_a_function_of_the_image_and_differs_between_images():
    x = torch.rand(5, 1, 4, 4)
    with per_image_noise(x, 0, "start"):
        whole = torch.rand(x.shape)
    with per_image_noise(x[3:], 0, "start"):
        part = torch.rand(x[3:].shape)
    assert torch.equal(whole[3:], part)
    assert not torch.equal(whole[0], whole[1])
    with per_image_noise(x, 1, "start"):
        assert not torch.equal(whole, torch.rand(x.shape))
    assert torch.rand(2).shape == (2,)  # torch's own again


def test_a_pass_of_any_number_of_images_is_made_of_slices_of_one_size(robust_cnn):
    sizes: list[int] = []
    handle = robust_cnn.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with exact_inference(robust_cnn, 8) as view:
        logits = view(torch.rand(21, 1, 8, 8))
    handle.remove()
    assert (sizes, len(logits)) == ([8, 8, 8], 21)


def test_when_memory_runs_out_the_batch_is_halved_and_the_verdicts_stay(robust_cnn, digit_images):
    class Narrow(nn.Module):
        """Takes five images at once, no more."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.most, self.refused = robust_cnn, 5, 0

        def forward(self, x):
            if len(x) > self.most:
                self.refused += 1
                raise torch.OutOfMemoryError(f"tried to allocate for {len(x)} images")
            return self.model(x)

    narrow = Narrow()
    free, tight = (evaluate(m, digit_images.part.first(60), ("pgd10", "cw"), EPS) for m in (robust_cnn, narrow))
    assert narrow.refused > 0
    assert free.ledger.broken_by == tight.ledger.broken_by
    narrow.most = 0
    with pytest.raises(ModelError, match="out of memory with a single image"):
        evaluate(narrow, digit_images.part.first(4), ("nat",), EPS)


def test_room_shrinks_to_one_slice_before_the_slice_itself():
    sizer = BatchSizer(torch.device("cpu"), 100)
    sizes = []
    for _ in range(4):
        sizer.shrink(MemoryError())
        sizes.append((sizer.batch, sizer.pass_size))
    assert sizes == [(50, 8), (25, 8), (12, 8), (8, 8)]


# What a row says


def test_examples_are_inside_the_ball_and_break_their_image(robust_cnn, done, digit_images):
    held = read_evaluation(done, strict=True)
    assert len(held.ledger.examples) > 5
    for at, found in held.ledger.examples.items():
        clean = digit_images.part.x[at].float() / 255
        assert (found - clean).abs().max() <= EPS + 1e-5
        assert robust_cnn(found[None]).argmax() == held.ledger.broken_as[at] != held.ledger.label[at]
        assert held.ledger.broken_by[at] in held.ledger.stages


def test_an_image_is_charged_to_the_first_attack_that_broke_it(done):
    ledger = read_evaluation(done).ledger
    for at, by in enumerate(ledger.broken_by):
        tried = [stage for stage, outcome in ledger.stages.items() if outcome[at] == BROKE]
        assert by == ("natural" if ledger.predicted[at] != ledger.label[at] else tried[0] if tried else "")


def test_the_worst_case_counts_images_that_stand_under_everything(done):
    results, ledger = json.loads((done / "results.json").read_text()), read_evaluation(done).ledger
    stands = ledger.right.clone()
    for outcome in ledger.stages.values():
        stands &= outcome == STOOD
    assert results["worst_case"]["correct"] == int(stands.sum()) <= min(a["correct"] for a in results["attacks"])


def test_rounded_examples_are_whole_bytes_inside_the_ball(copy, digit_images):
    from PIL import Image

    (copy / "png").mkdir(exist_ok=True)
    (copy / "png" / "99999.png").write_bytes(b"of an image that stands now")
    assert write_pngs(copy) == len(list((copy / "png").iterdir())) == len(read_evaluation(copy).ledger.examples)
    for path in sorted((copy / "png").iterdir()):
        with Image.open(path) as image:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(8, 8)
        assert (pixels / 255 - digit_images.part.x[int(path.stem)][0] / 255).abs().max() <= EPS + 1e-6


def test_a_cleared_folder_keeps_nothing_but_its_lock(copy):
    write_pngs(copy)
    clear(copy)
    assert [path.name for path in copy.iterdir()] in ([], ["lock"])


def test_an_attack_that_leaves_the_ball_is_refused_whether_it_has_an_eps_or_not(robust_cnn, digit_images):
    def far(model, x, y):
        return (x + 0.3).clamp(0, 1)

    with pytest.raises(AttackError, match="left its ball"):
        evaluate(robust_cnn, digit_images.part.first(30), (far,), EPS)

    class Leaves:
        eps = EPS

        def __call__(self, model, x, y):
            return (x + 0.3).clamp(0, 1)

    with pytest.raises(AttackError, match="left its ball"):
        evaluate(robust_cnn, digit_images.part.first(30), (Leaves(),), EPS)


def test_two_attacks_of_one_name_are_told_apart(robust_cnn, digit_images):
    weak, strong = PGD(eps=EPS, alpha=0.01, steps=1), PGD(eps=EPS, alpha=0.02, steps=20)
    rows = evaluate(robust_cnn, digit_images.part.first(60), (weak, strong), EPS)
    assert [row.name for row in rows] == ["PGD", "PGD-2"]
    assert rows[1].correct <= rows[0].correct


# Verify


def test_what_was_written_verifies(done, robust_cnn, digit_images):
    found = verify(done, robust_cnn, digit_images)
    assert (found.images, found.close) == (60, 0)
    assert found.examples == len(read_evaluation(done).ledger.examples)


def test_files_are_compared_with_one_another_where_weights_and_data_are_missing(done):
    """No model and no data are there; what that leaves open is said."""
    found = verify_files(done)
    assert (found.images, found.examples) == (60, len(read_evaluation(done).ledger.examples))
    assert "that the model (a model in memory) predicts what the ledger says" in found.unchecked[0]
    assert "that the images are digits" in found.unchecked[1]


def test_what_the_verifier_brought_or_judged_is_told(done, robust_cnn, digit_images):
    own = verify(done, robust_cnn, digit_images)
    assert "the model predicts what the ledger says, of all images and of all examples" in own.checked
    assert any("as you passed them yourself" in text for text in own.unchecked)
    assert not any("the model (" in text for text in own.unchecked)


@pytest.mark.parametrize(("name", "value"), [("distance", "0.01"), ("broken_as", None), ("index", "7")])
def test_a_contradiction_among_files_is_found_without_the_model(copy, name, value):
    """By somebody who seals anew."""
    held = read_evaluation(copy, strict=True)
    at = next(iter(held.ledger.examples))
    edited(copy, at + 1, **{name: held.rows[at]["label"] if value is None else value})
    lines = [line.split(",") for line in (copy / "ledger.csv").read_text().splitlines()]
    context = context_of(held.results["weights"]["fingerprint"], held.results["spec"])
    lines[at + 1][-1] = row_seal(lines[at + 1][:-1], context)
    (copy / "ledger.csv").write_text("".join(f"{','.join(line)}\n" for line in lines))
    with pytest.raises(RunError, match=rf"row {at + 1} \(image"):
        verify_files(copy)


def test_the_whole_set_as_one_tensor_has_the_accuracy_of_the_worst_case(done, robust_cnn, digit_images, tmp_path):
    held = read_evaluation(done, strict=True)
    images = attacked_images(held, digit_images)
    clean = digit_images.part.x.float() / 255
    assert (images.shape, images.dtype) == (clean.shape, torch.float32)
    assert (images - clean).abs().max() <= EPS + 1e-6
    assert (robust_cnn(images).argmax(1) == digit_images.part.y).sum() == held.results["worst_case"]["correct"]
    write_tensor(images, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), images)
    with pytest.raises(RunError, match=r"row 1 \(image 0\): the image in .* is another one"):
        attacked_images(held, replace(digit_images, part=Split(digit_images.part.x.flip(0), digit_images.part.y)))


def edited(folder: Path, row: int, **cells: str) -> None:
    lines = (folder / "ledger.csv").read_text().splitlines()
    names, values = lines[0].split(","), lines[row].split(",")
    for name, value in cells.items():
        values[names.index(name)] = value
    lines[row] = ",".join(values)
    (folder / "ledger.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "cells", [{"predicted": "7"}, {"broken_by": "pgd10"}, {"margin": "0.5"}, {"distance": "0.01"}, {"seal": "0" * 16},
              {"pgd10": "broke"}, {"label": "1"}, {"image": "0" * 16}],
    ids=lambda cells: next(iter(cells)),
)  # fmt: skip
def test_a_changed_cell_is_found_and_its_row_named(copy, robust_cnn, digit_images, cells):
    edited(copy, 3, **cells)
    with pytest.raises(RunError, match=r"row 3 \(image 2\)"):
        verify(copy, robust_cnn, digit_images)


@pytest.mark.parametrize("value", [0.05, 0.2])
def test_a_changed_eps_breaks_every_seal(copy, robust_cnn, digit_images, value):
    results = json.loads((copy / "results.json").read_text())
    results["spec"]["eps"] = value
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match=r"row 1 \(image 0\).*eps or the weights were altered"):
        verify(copy, robust_cnn, digit_images)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("attacks", 1, "correct"), 159), (("attacks", 2, "accuracy"), 0.99), (("worst_case", "high"), 1.0), (("n",), 99),
     (("eight_bit", "correct"), 160), (("per_class", 0, "robust"), 0.123), (("believable", "light"), "yellow"),
     (("believable", "gap"), -1.0)],
    ids=str,
)  # fmt: skip
def test_a_number_that_does_not_follow_from_the_ledger_is_found(copy, robust_cnn, digit_images, path, value):
    results = json.loads((copy / "results.json").read_text())
    *way, last = path
    place = results
    for key in way:
        place = place[key]
    assert place[last] != value
    place[last] = value
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match="its seal is broken: it was altered"):
        verify(copy, robust_cnn, digit_images)
    (copy / "results.json").write_text(json.dumps(with_seal(results)))  # by somebody who knows how it is sealed
    with pytest.raises(RunError, match=r"does not follow from the ledger|do not fit the ledger"):
        verify(copy, robust_cnn, digit_images)


def test_a_changed_example_is_found_even_if_it_still_fools(copy, robust_cnn, digit_images):
    path = copy / "examples.safetensors"
    content = load_file(path)
    index = int(content["index"][2])
    content["x"][2, 0, 4, 4] = torch.nextafter(content["x"][2, 0, 4, 4], torch.tensor(0.5))
    save_file(content, path)
    with pytest.raises(RunError, match=rf"\(image {index}\): its example was altered"):
        verify(copy, robust_cnn, digit_images)


def test_flipped_bytes_are_found_wherever_they_are(done, robust_cnn, digit_images, tmp_path):
    rng = torch.Generator().manual_seed(0)
    for k in range(30):
        copy = Path(shutil.copytree(done, tmp_path / str(k)))
        for name in ("ledger.csv", "examples.safetensors", "results.json"):
            path, content = copy / name, bytearray((done / name).read_bytes())
            content[int(torch.randint(len(content), (), generator=rng))] ^= 1 << int(
                torch.randint(7, (), generator=rng)
            )
            path.write_bytes(bytes(content))
            with pytest.raises(RunError):
                verify(copy, robust_cnn, digit_images)
            shutil.copy(done / name, path)


def test_other_weights_and_other_images_are_found(copy, robust_cnn, digit_images):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(RunError, match="holds other weights"):
        verify(copy, other, digit_images)
    x = digit_images.part.x.clone()
    x[5, 0, 0, 0] ^= 1
    with pytest.raises(RunError, match=r"row 6 \(image 5\): the image in .* is another one"):
        verify(copy, robust_cnn, (x, digit_images.part.y))
    y = digit_images.part.y.clone()
    y[9] = (y[9] + 1) % 10
    with pytest.raises(RunError, match=r"row 10 \(image 9\): the label"):
        verify(copy, robust_cnn, (digit_images.part.x, y))


def test_a_verdict_forged_with_a_seal_of_its_own_is_found_by_judging_again(copy, robust_cnn, digit_images):
    """Whoever can write the seals cannot write an example that fools the model."""
    held = read_evaluation(copy, strict=True)
    at = int(held.ledger.stands.nonzero()[0])
    ledger = held.ledger
    clean = digit_images.part.x[at].float() / 255
    ledger.enter("pgd10", torch.tensor([at]), torch.tensor([True]), torch.tensor([(int(ledger.label[at]) + 1) % 10]),
                 torch.tensor([0.0]), clean[None])  # fmt: skip
    forged = task(robust_cnn, digit_images)
    rows = [attack_result(ledger, what, 0) for what in forged.attack_specs]
    runner._save(forged, copy, ledger, rows, held.results["measured"], 1.0, complete=True)
    with pytest.raises(RunError, match=rf"\(image {at}\): the model says"):
        verify(copy, robust_cnn, digit_images)


def resealed(folder: Path, change) -> None:
    """Edit results.json as somebody would who knows how it is sealed."""
    results = json.loads((folder / "results.json").read_text())
    change(results)
    (folder / "results.json").write_text(json.dumps(with_seal(results)))


def renamed(results) -> None:
    results["attacks"][1]["name"] = results["spec"]["attacks"][1] = "aa"


def dropped(results) -> None:
    del results["attacks"][3], results["spec"]["attacks"][3]


FORGERIES = {
    "an attack renamed": (renamed, "its stages or settings are not those of aa"),
    "settings": (lambda r: r["attacks"][1]["settings"].update(pgd10="PGD, a million steps"), "not those of pgd10"),
    "an attack dropped": (dropped, "its attacks are not those of the ledger"),
    "no attacks": (lambda r: r.update(attacks=None), "damaged"),
    "measured of nothing": (lambda r: r.update(measured={"n": 1}), "damaged or was altered"),
    "shard": (lambda r: r.update(shard=[1, 1]), "says it is shard 1 of 1"),
    "data": (lambda r: r["data"].update(name="imagenet"), "says of the data: name imagenet"),
    "classes": (lambda r: r["data"].update(classes=7), "says of the data: classes 7"),
    "shape": (lambda r: r["data"].update(shape=[3, 8, 8]), "says of the data: shape"),
    "kind": (lambda r: r.update(kind="run"), "is of kind 'run'"),
    "an older version": (lambda r: r.update(format=1), r"was made by an older version \(format 1"),
}


@pytest.mark.parametrize(("change", "wrong"), FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_with_a_seal_of_its_own_is_found(copy, robust_cnn, digit_images, change, wrong):
    resealed(copy, change)
    with pytest.raises(RunError, match=wrong):
        verify(copy, robust_cnn, digit_images)


def test_other_line_ends_are_found(copy, robust_cnn, digit_images):
    path = copy / "ledger.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(RunError, match=r"not written as robustmail writes it"):
        verify(copy, robust_cnn, digit_images)


def test_an_example_or_a_tensor_too_many_is_found(copy, robust_cnn, digit_images):
    path = copy / "examples.safetensors"
    content = load_file(path)
    save_file({**content, "more": torch.zeros(1)}, path)
    with pytest.raises(RunError, match="holds 'more', which no evaluation writes"):
        verify(copy, robust_cnn, digit_images)
    stands = int(read_folder_index(copy))
    one = {"index": torch.tensor([stands]), "x": content["x"][:1], "original": content["original"][:1]}
    save_file({name: torch.cat([content[name], one[name]]) for name in content}, path)
    with pytest.raises(RunError, match="holds examples that the ledger does not speak of"):
        verify(copy, robust_cnn, digit_images)


def read_folder_index(folder: Path) -> int:
    """An image that stands."""
    lines = [line.split(",") for line in (folder / "ledger.csv").read_text().splitlines()[1:]]
    return next(int(cells[0]) for cells in lines if cells[4] == "")


def test_what_no_file_can_prove_is_said(done, robust_cnn, digit_images):
    said = " ".join(verify(done, robust_cnn, digit_images).unchecked)
    assert "only attacking them again can tell" in said
    assert "the settings of APGD, APGDT, Square" in said


@pytest.mark.usefixtures("unmeasured")
def test_a_model_that_answers_differently_each_time_is_not_called_altered(robust_cnn, digit_images, tmp_path):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.calls = robust_cnn, 0

        def forward(self, x):
            self.calls += 1
            return self.model(x) * (1 + 1e-3 * self.calls)

    few, noisy = digit_images.first(20), Noisy()
    list(run_evaluation(task(noisy, few, attacks=("nat", "pgd2")), tmp_path))
    with pytest.raises(RunError, match=r"asked twice, the model answers differently"):
        verify(tmp_path, noisy, few)


def test_a_ledger_without_its_results_is_not_begun_anew(copy, robust_cnn, digit_images):
    (copy / "results.json").unlink()
    with pytest.raises(RunError, match=r"has a ledger, but its results.json is missing"):
        list(run_evaluation(task(robust_cnn, digit_images), copy))


def test_an_attack_of_ones_own_cannot_take_a_built_in_name(robust_cnn, digit_images):
    def aa(model, x, y):
        return x

    with pytest.raises(RecipeError, match="named like a built-in attack"):
        evaluate(robust_cnn, digit_images.part.first(4), (aa,), EPS)


def test_rows_that_were_moved_are_found(copy, robust_cnn, digit_images):
    lines = (copy / "ledger.csv").read_text().splitlines()
    lines[4], lines[9] = lines[9], lines[4]
    (copy / "ledger.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"row 4 \(image 8\): is out of its place"):
        verify(copy, robust_cnn, digit_images)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.3), ("linf", 1.0)])
def test_any_budget_comes_to_an_end(robust_cnn, digit_images, tmp_path, norm, eps):
    few = digit_images.first(20)
    list(run_evaluation(task(robust_cnn, few, attacks=("nat", "pgd2"), eps=eps, norm=norm), tmp_path))
    assert verify(tmp_path, robust_cnn, few).images == 20


# Compare


def test_the_same_evaluation_twice_is_never_a_difference(done):
    rows, notes = compare(read_evaluation(done), read_evaluation(done))
    assert all(row.paired.tie and row.paired.difference == 0 for row in rows)
    assert [row.name for row in rows] == ["natural", *NAMES[1:], "worst case"]
    assert notes == []


@pytest.mark.usefixtures("unmeasured")
def test_a_model_that_is_broken_more_often_compares_as_worse(done, digit_images, tmp_path):
    torch.manual_seed(0)
    weak = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(weak.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(weak(digit_images.part.x.float() / 255), digit_images.part.y).backward()
        optimizer.step()
    list(run_evaluation(task(weak, digit_images, attacks=("nat", "pgd10")), tmp_path))
    rows, notes = compare(read_evaluation(done), read_evaluation(tmp_path))
    found = {row.name: row.paired for row in rows}
    assert found["pgd10"].difference > 0.1
    assert not found["pgd10"].tie
    assert found["pgd10"].low > 0
    assert notes == ["the worst case is over different attacks"]


def test_paired_numbers_are_mcnemars_and_agresti_mins():
    found = paired(100, 12, 3)
    assert found.p == pytest.approx(2 * sum([1, 15, 105, 455]) / 2**15)  # both tails of Binomial(15, 1/2)
    middle, spread = (12.5 - 3.5) / 102, (16 - (12.5 - 3.5) ** 2 / 102) ** 0.5 / 102
    assert (found.low, found.high) == pytest.approx((middle - 1.959964 * spread, middle + 1.959964 * spread))
    assert paired(50, 0, 0).p == 1.0


def test_an_example_recorded_as_its_true_class_is_no_break_however_near(copy, robust_cnn, digit_images):
    """A forger with seals of his own takes an image on the very border: both classes are near, one is the label."""
    held = read_evaluation(copy, strict=True)
    ledger = held.ledger
    at = next(at for at, by in enumerate(ledger.broken_by) if by not in ("", "natural"))
    low, high = digit_images.part.x[at].float() / 255, ledger.examples[at]
    for _ in range(40):  # halve the way until the two classes cannot be told apart
        middle = (low + high) / 2
        low, high = (low, middle) if int(robust_cnn(middle[None]).argmax()) != int(ledger.label[at]) else (middle, high)
    for example in (low, high):
        ledger.examples = ledger.examples | {at: example}
        ledger.broken_as[at] = ledger.label[at]
        ledger.distance[at] = float((example - digit_images.part.x[at].float() / 255).abs().max())
        forged = task(robust_cnn, digit_images)
        rows = [attack_result(ledger, what, 0) for what in forged.attack_specs]
        runner._save(forged, copy, ledger, rows, held.results["measured"], 1.0, complete=True)
        with pytest.raises(RunError, match=rf"\(image {at}\): its example is recorded as .* its true class"):
            verify(copy, robust_cnn, digit_images)


@pytest.mark.parametrize("seed", range(3))
def test_in_l2_rounded_examples_stay_in_the_ball_where_nearest_bytes_would_not(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(64, 192, (16, 3, 16, 16), generator=rng) / 255
    delta = torch.randn(x.shape, generator=rng)
    found = (x + 0.5 * delta / delta.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    bytes_ = eight_bit(x, found, 0.5, "l2")
    assert torch.equal((bytes_ * 255).round() / 255, bytes_)
    assert distances(x, bytes_, "l2").max() <= 0.5 + tolerance(0.5)
    assert distances(x, bytes_, "l2").min() >= 0.49, "and not far inside, or files would look robust"
    assert (distances(x, (found * 255).round() / 255, "l2") > 0.5 + tolerance(0.5)).any(), "or the test tells nothing"
    grey = x + 0.4 / 255  # of no whole 255ths: nothing is promised but whole bytes
    whole = eight_bit(grey.clamp(0, 1), found, 0.5, "l2")
    assert torch.equal((whole * 255).round() / 255, whole)
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_images_needed_are_told_where_more_than_these_are_and_for_a_power_of_80_percent():
    def row(n: int, only_first: int, only_second: int):
        first, second = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
        second[:only_first] = False
        first[only_first : only_first + only_second] = False
        return compared._row("aa", first, second)

    d, difference = 0.15, 0.05
    assert row(100, 10, 5).needed == math.ceil((1.959964 + 0.841621) ** 2 * (d - difference**2) / difference**2) == 464
    assert row(1000, 100, 50).needed is None, "that many are there"
    assert row(100, 5, 5).needed is None


# Attacks of one's own


def own(step: float):
    """One of two attacks that have one name and not one source."""
    if step:

        def mine(model, x, y):
            return (x + 0.05).clamp(0, 1)
    else:

        def mine(model, x, y):
            return x

    return mine


@pytest.mark.usefixtures("unmeasured")
def test_an_attack_of_ones_own_that_was_edited_is_another_evaluation(robust_cnn, digit_images, tmp_path):
    few, folder = digit_images.first(20), tmp_path / "a"
    once, twice = (PGD(eps=EPS, alpha=EPS, steps=steps) for steps in (1, 2))
    list(run_evaluation(task(robust_cnn, few, attacks=("nat", own(0))), folder))
    with pytest.raises(RunError, match=r"another evaluation \(attack mine: mine \(source \w+\) there, mine \(source"):
        list(run_evaluation(task(robust_cnn, few, attacks=("nat", own(1))), folder))
    list(run_evaluation(task(robust_cnn, few, attacks=("nat", own(0), "pgd2", once)), folder))
    assert verify(folder, robust_cnn, few).images == 20
    assert list(read_evaluation(folder, strict=True).results["spec"]["own"]) == ["mine", "PGD"]
    with pytest.raises(RunError, match=r"attack PGD: PGD, eps=0.1, .*steps=1.* there, PGD, .*steps=2"):
        list(run_evaluation(task(robust_cnn, few, attacks=("nat", own(0), "pgd2", twice)), folder))
    list(run_evaluation(task(robust_cnn, few, attacks=("nat", own(1))), tmp_path / "b"))
    _, notes = compare(read_evaluation(folder), read_evaluation(tmp_path / "b"))
    assert any(note.startswith("mine is another attack in each: mine (source") for note in notes)


@pytest.mark.usefixtures("unmeasured")
def test_shards_under_other_attacks_are_not_merged(robust_cnn, digit_images, tmp_path):
    for k, folder, attacks in (
        (1, "1", ("nat", "pgd2", own(0))), (2, "2", ("nat", "pgd2", own(1))), (2, "3", ("nat", "pgd2")),
    ):  # fmt: skip
        list(run_evaluation(task(robust_cnn, digit_images, shard=(k, 2), attacks=attacks), tmp_path / folder))
    with pytest.raises(RunError, match=r"another evaluation \(attack mine: "):
        merge_shards([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    with pytest.raises(RunError, match=r"was attacked by nat, pgd2, .* by nat, pgd2, mine. Run the same attacks"):
        merge_shards([tmp_path / "1", tmp_path / "3"], tmp_path / "merged")


def test_a_kill_while_an_attack_is_added_leaves_nothing_that_looks_whole(robust_cnn, digit_images, tmp_path):
    few = digit_images.first(20)
    list(run_evaluation(task(robust_cnn, few, attacks=("nat", "pgd2")), tmp_path))
    work = run_evaluation(task(robust_cnn, few, attacks=("nat", "pgd2", "cw")), tmp_path)
    next(work)  # and at this moment, the power is cut
    held = read_evaluation(tmp_path, strict=True)
    assert not held.results["complete"]
    assert held.results["spec"]["attacks"] == ["nat", "pgd2"]
    work.close()
    list(run_evaluation(task(robust_cnn, few, attacks=("nat", "pgd2", "cw")), tmp_path))
    assert verify(tmp_path, robust_cnn, few).images == 20
