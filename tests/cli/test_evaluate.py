"""inspect, eval, verify, compare, merge and report on the command line: what they say, and what bad input gets."""

from __future__ import annotations

import csv
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustmail.cli.options import open_inputs
from robustmail.models.classifier import build
from robustmail.runtime.rng import fork_rng
from tests.cli.test_bad_input import assert_refused, robustmail, tree  # noqa: F401  a fixture

pytestmark = pytest.mark.long

OWN = """
import torch
from torch import nn
from robustmail.models.classifier import build

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build("small_cnn", 10, 1).net

    def forward(self, x):
        return self.net((x - 0.5) / 0.5)


class Hungry(Wrapped):
    def forward(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


class Fails(Wrapped):
    def forward(self, x):
        raise ValueError("planted")


class Nan(Wrapped):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Features(Wrapped):
    def forward(self, x):
        return self.net.forward_features(x)


def broken():
    raise ArithmeticError("planted")


def nothing():
    return 3


def seven():
    return build("small_cnn", 7, 1).net


def far(model, x, y):
    return x + 0.5


class Far:
    eps = 0.1

    def __call__(self, model, x, y):
        return (x + 0.3).clamp(0, 1)


def idle(model, x, y):
    return None


def leaves():
    raise SystemExit(0)


class Stubborn(Wrapped):
    def load_state_dict(self, *args, **knobs):
        raise KeyError("planted")


def jump(model, x, y):
    raise LookupError("planted")
"""


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with a checkpoint, data and much that is wrong with either."""
    with fork_rng():
        torch.manual_seed(0)
        net = build("small_cnn", 10, 1).net
    torch.save({"state_dict": net.state_dict()}, tmp_path / "small.pth")
    torch.save({f"net.{k}": v for k, v in net.state_dict().items()}, tmp_path / "wrapped.pth")
    torch.save(
        {"state_dict": {**net.state_dict(), "conv1.weight": net.conv1.weight * float("nan")}}, tmp_path / "nan.pth"
    )
    content = (tmp_path / "small.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    with open(tmp_path / "bomb.pth", "wb") as file:
        pickle.dump({"state_dict": Bomb()}, file)
    torch.save({"model": net, "bomb": Bomb()}, tmp_path / "whole.pth")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "syntax.py").write_text("def factory(:")
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "ten.npz", x=x, y=y)
    np.savez(tmp_path / "twenty.npz", x=x, y=np.arange(20))
    np.savez(tmp_path / "colour.npz", x=np.repeat(x, 3, -1), y=y)
    np.savez(tmp_path / "floats.npz", x=x.astype(np.float32) / 127.5 - 1, y=y)
    np.savez(tmp_path / "keys.npz", a=x, b=y)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("words")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "state.pt").write_text("a run's")
    return tmp_path


GOOD = "eval small.pth --data ten.npz --normalize none --model small_cnn --attacks nat,pgd2"
WRAPPED = "eval wrapped.pth --data ten.npz --attacks nat,pgd2 --normalize none --model own.py"
VERIFY = "verify a --checkpoint small.pth --data ten.npz"
WRONG = {
    # files
    "no file": ("eval no.pth --data ten.npz", "no.pth: no such file"),
    "truncated": ("eval short.pth --data ten.npz", "short.pth: ... cut short"),
    "HTML": ("eval page.pth --data ten.npz", "page.pth: a web page saved in place of the file"),
    "empty": ("inspect empty.pth", "empty.pth: ... empty"),
    "malicious pickle": ("inspect bomb.pth", "bomb.pth: a plain pickle ... pathlib.Path.touch"),
    "malicious pickle to evaluate": ("eval bomb.pth --data ten.npz", "bomb.pth: a plain pickle"),
    "whole module of doubtful activations": (
        "eval whole.pth --data ten.npz --normalize none", "whole.pth: is read as ... in doubt",
    ),
    "NaN weights": ("eval nan.pth --data ten.npz --normalize none", "nan.pth: conv1.weight"),
    "another set of weights": (f"{GOOD} --weights ema", "small.pth ... 'ema'"),
    "a folder that is no run's": ("eval taken --data ten.npz", "taken: no file of weights among thesis.tex"),
    # models
    "normalisation unsaid": ("eval small.pth --data ten.npz", "does not say how images are normalised ... --probe"),
    "convention": (f"{GOOD} --normalize cifar1O".replace("--normalize none ", ""), "Did you mean 'cifar10'"),
    "three channels' convention": (f"{GOOD.replace('none', 'cifar10')}", "needs one mean and one std for each of 1"),
    "another architecture": (f"{GOOD} --model cifar_resnet18_w8", "small.pth: does not fit the model"),
    "another class count": (f"{GOOD} --model own.py:seven", "10 classes ... 7"),
    "no such model": (f"{GOOD} --model cifar_resnet81", "no such model. Did you mean"),
    "model file without a function": (f"{GOOD} --model own.py", "no function of the file named. Write own.py:FUNCTION"),
    "model file": (f"{GOOD} --model none.py:factory", "none.py: cannot be read"),
    "model file that raises": (f"{GOOD} --model syntax.py:factory", "syntax.py:1: not valid Python"),
    "factory that raises": (f"{GOOD} --model own.py:broken", "ArithmeticError: planted"),
    "factory of nothing": (f"{GOOD} --model own.py:nothing", "int"),
    "forward that raises": (f"{WRAPPED}:Fails", "the model: fails on images of 1 x 8 x 8: ValueError: planted"),
    "NaN logits": (f"{WRAPPED}:Nan", "NaN or infinite logits"),
    "no logits": (f"{WRAPPED}:Features", "returned [1, 128, 2, 2] for 1 images, expected logits"),
    # data
    "no data": ("eval small.pth --normalize none", "no data stored in it. Pass --data"),
    "data that are not there": (GOOD.replace("ten.npz", "none.npz"), "none.npz: no such file"),
    "data in no folder": (GOOD.replace("ten.npz", "none/there"), "none/there: no such file or folder"),
    "data that are words": (GOOD.replace("ten.npz", "own.py"), "own.py: not a readable npz file. It is"),
    "data set's name": (GOOD.replace("ten.npz", "cifra10"), "Did you mean 'cifar10'?"),
    "keys": (GOOD.replace("ten.npz", "keys.npz"), "keys.npz: has a, b. Its keys must be x_test and y_test"),
    "images outside [0, 1]": (GOOD.replace("ten.npz", "floats.npz"), "images span [-1, 1], outside [0, 1]"),
    "more classes than the model": (GOOD.replace("ten.npz", "twenty.npz"), "the model has 10 classes, the data label"),
    "colour": ("eval small.pth --data colour.npz --normalize none", "the model: fails on images of 3 x 8 x 8"),
    "too few images": (f"{GOOD} --n 21", "ten.npz (given n=21): has 20 images. Pass --n 20"),
    "no images": (f"{GOOD} --n 0", "--n 0: less than 1"),
    # attacks
    "attack": (f"{GOOD},apdg", "attack 'apdg': ... Did you mean 'apgd'?"),
    "attack twice": (f"{GOOD},nat", "nat is named twice"),
    "attack without its bracket": (f"{GOOD},pgd2(eot=2", "--attacks ... a bracket is not closed"),
    "knob": (f"{GOOD},pgd2(eott=2)", "pgd2 has no knob 'eott'. Did you mean 'eot'?"),
    "code as a knob": (f"{GOOD},pgd2(eot=open)", "eot must be a number or a text in quotes"),
    "data as an attack": (f"{GOOD},npz('ten.npz')", "no attack 'npz'"),
    "restarts of all of AutoAttack": (f"{GOOD},aax2", "attack 'aax2': has no restarts of its own"),
    "one eps twice": (f"{GOOD} --eps 0.1,0.1", "--eps 0.1,0.1: several eps differ from one another"),
    "a negative one of several eps": (f"{GOOD} --eps=-0.1,0.1", "none is below 0. Write 0,4/255,8/255"),
    "a word among several eps": (f"{GOOD} --eps 0,eight", "--eps eight: not a number"),
    "several eps without an attack": (f"{GOOD.replace(',pgd2', '')} --eps 0,0.1", "several eps, but no attack"),
    "several eps and a shard": (f"{GOOD} --eps 0,0.1 --shard 1/2", "--shard goes with one eps only"),
    "transfer from nowhere": (f"{GOOD} --transfer no.pth", "no.pth: no such file"),
    "transfer from another number of classes": (
        f"{GOOD} --transfer small.pth --transfer-model own.py:seven --transfer-normalize none", "7"),
    "eps in bytes": (f"{GOOD} --eps 8", "images live in [0, 1] ... Write eps=8/255"),
    "negative eps": (f"{GOOD} --eps=-1/255", "eps is negative"),
    "eps in words": (f"{GOOD} --eps eight", "--eps eight: not a number. Write 8/255"),
    "infinite eps": (f"{GOOD} --eps inf", "is no finite number"),
    "eps beyond floats": (f"{GOOD} --eps 1e400", "is no finite number"),
    "eps of no attack": (f"{GOOD[:-5]} --eps 8", "evaluate (given eps=8)"),
    "no attack named": (GOOD.replace("nat,pgd2", "''"), "--attacks: no name given"),
    "attack of nothing": (f"{GOOD},own.py:idle", "returned NoneType, expected images"),
    "model that leaves": (f"{WRAPPED}:leaves", "SystemExit"),
    "model that cannot load": (f"{WRAPPED}:Stubborn", "load_state_dict raised KeyError"),
    "norm": (f"{GOOD} --norm l3", "--norm l3: no such norm. There are: linf, l2"),
    "attack that leaves its ball": (f"{GOOD},own.py:Far --eps 0.1", "Far: left its ball: an image lies 76.50/255 away"),
    "attack that leaves the box": (f"{GOOD},own.py:far", "far: left the box"),
    "attack that fails": (f"{GOOD},own.py:jump", "attack jump ... LookupError: planted"),
    "shard": (f"{GOOD} --shard 5/4", "--shard 5/4: not K/N"),
    "more shards than parts": (f"{GOOD} --shard 1/2", "20 images make 1 block of 50 ... Use 1 shard at most"),
    "device": (f"{GOOD} --device tpu", "device='tpu'"),
    # folders
    "folder in use": (f"{GOOD} --out trained", "trained: is no evaluation's: it holds state.pt, a run's"),
    "nothing to verify": ("verify taken", "taken: holds no evaluation"),
    "nothing to compare": ("compare taken taken", "taken: holds no evaluation"),
    "nothing to merge": ("merge taken --out new", "taken: holds no evaluation"),
    "nothing to report": ("report taken", "taken"),
    "format": ("report taken --format tex", "Did you mean 'latex'?"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "fragment"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_line_and_exit_code_2_and_runs_no_code(bench, robustmail, words, fragment):  # noqa: F811
    before = tree(bench)
    assert_refused(robustmail(words), fragment)
    left = [path for path in tree(bench) if path not in before and "evals" not in path.parts]
    assert left == []
    assert not list(bench.glob("evals/*/results.json")), "nothing that looks like a result"


@pytest.fixture
def done(bench, robustmail) -> Path:  # noqa: F811
    said = robustmail(f"{GOOD} --eps 0.1 --out a")
    assert said.code == 0, said
    return bench


def test_eval_says_what_it_did_and_where_it_is(done, robustmail):  # noqa: F811
    said = robustmail(f"{GOOD} --eps 0.1 --out a")  # finished before: told again, nothing is done
    assert said.code == 0
    assert "at eps 0.1 Linf" in " ".join(said.out.split())
    assert "a/report.html" in said.out
    assert said.err == ""
    assert {path.name for path in (done / "a").iterdir()} == {
        "examples.safetensors", "ledger.csv", "lock", "report.html", "results.json"}  # fmt: skip
    results = json.loads((done / "a" / "results.json").read_text())
    assert results["complete"]
    assert results["spec"]["normalize"] == "none"
    assert results["provenance"]["command"].startswith("robustmail eval small.pth")


def test_several_eps_give_a_curve_that_is_reported_and_verified(bench, robustmail):  # noqa: F811
    said = robustmail(f"{GOOD} --eps 0,0.05,0.1 --out c --transfer small.pth --transfer-model small_cnn "
                      "--transfer-normalize none")  # fmt: skip
    assert said.code == 0, said
    assert "accuracy in % by eps on 20 images" in said.out
    assert {path.name for path in (bench / "c").iterdir()} == {
        "curve.csv", "curve.json", "curve.png", "curve.svg", "eps-0.05", "eps-0.1", "lock"}  # fmt: skip
    rows = list(csv.DictReader((bench / "c" / "curve.csv").read_text().splitlines()))
    assert [row["attack"] for row in rows[:4]] == ["nat", "pgd2", "pgd2 from small", "worst case"]
    for name in ("pgd2", "pgd2 from small", "worst case"):
        correct = [int(row["correct"]) for row in rows if row["attack"] == name]
        assert correct == sorted(correct, reverse=True)
    assert robustmail("report c").out.count("curve.json") == 1
    compared = list(csv.DictReader(io.StringIO(robustmail("report c --format csv").out)))
    assert [row["eps"] for row in compared if row["attack"] == "pgd2"] == ["0.05", "0.1"]
    said = robustmail(VERIFY.replace("verify a", "verify c"))
    assert said.out.count("in order. 20 images") == 2, said


def test_a_result_is_verified_compared_reported_and_begun_anew(done, robustmail):  # noqa: F811
    assert robustmail(VERIFY).out.startswith("a: in order. 20 images")
    assert robustmail(f"{GOOD.replace('pgd2', 'pgd5')} --eps 0.1 --out b").code == 0
    said = robustmail("compare a b --json")
    assert [row["name"] for row in json.loads(said.out)["rows"]] == ["natural", "worst case"]
    said = robustmail("compare a b").out
    assert "p is McNemar's" in said
    assert said.count("A: a\nB: b\n") == 1
    rows = list(csv.DictReader(io.StringIO(robustmail("report a b --format csv").out)))
    assert [row["attack"] for row in rows[:2]] == ["nat", "pgd2"]
    assert robustmail("report a --format html").out.strip() == "a/report.html"
    assert robustmail("report a b --format latex --out t.tex").code == 0
    assert r"\toprule" in (done / "t.tex").read_text()
    assert_refused(robustmail(f"{GOOD} --eps 0.2 --out a"), "a: holds another evaluation (eps: 0.1 there, 0.2 here)")
    assert robustmail(f"{GOOD} --eps 0.2 --out a --fresh").code == 0
    assert json.loads((done / "a" / "results.json").read_text())["spec"]["eps"] == 0.2


def test_moved_weights_and_data_are_found_where_they_are_said_to_be(done, robustmail):  # noqa: F811
    (done / "small.pth").rename(done / "moved.pth")
    (done / "ten.npz").rename(done / "there.npz")
    assert_refused(robustmail("verify a"), f"a: was made with the weights small.pth, the data ten.npz ... {VERIFY}")
    assert_refused(robustmail(VERIFY), "ten.npz: no such file")
    assert robustmail("verify a --checkpoint moved.pth --data there.npz").code == 0


@pytest.mark.parametrize("name", ["small.pth", "ten.npz"])
def test_altered_weights_and_data_are_found(done, robustmail, name):  # noqa: F811
    path = done / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert_refused(robustmail(VERIFY), name)


def test_damaged_results_are_not_reported(done, robustmail):  # noqa: F811
    path = done / "a" / "examples.safetensors"
    path.write_bytes(b"")
    assert_refused(robustmail("report a"), "examples.safetensors: damaged or missing")
    (done / "a" / "ledger.csv").unlink()
    assert_refused(robustmail("report a"), "ledger.csv")


def test_a_whole_evaluation_is_no_shard_and_its_page_stays_with_it(done, robustmail):  # noqa: F811
    assert_refused(robustmail("merge a --out new"), "a: is a whole evaluation, not a shard. There is nothing to merge")
    assert_refused(robustmail("report a --format html --out page.html"), "a page goes into its evaluation's own folder")


def test_memory_that_runs_out_changes_no_verdict(bench, robustmail):  # noqa: F811
    for name in ("Wrapped", "Hungry"):
        assert robustmail(f"{WRAPPED}:{name} --eps 0.1 --out {name}").code == 0
    texts = [(bench / name / "ledger.csv").read_text() for name in ("Wrapped", "Hungry")]
    rows = [list(csv.DictReader(io.StringIO(text))) for text in texts]
    for name in ("predicted", "broken_by", "broken_as", "pgd2"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]], name


def test_inspect_is_a_letter_or_json(bench, robustmail):  # noqa: F811
    said = robustmail("inspect small.pth")
    assert said.code == 0
    assert "small_cnn" in said.out
    assert "robustmail eval small.pth --data IMAGES.npz" in said.out, "one channel is no CIFAR"
    assert json.loads(robustmail("inspect small.pth --json").out)["weights"] == "state_dict"
    sick = robustmail("inspect nan.pth")
    assert "These weights cannot be used" in sick.out
    assert sick.code == 1


def test_a_run_of_ours_is_evaluated_with_no_options_at_all(bench, robustmail, monkeypatch):  # noqa: F811
    from robustmail.cli import evaluate

    monkeypatch.setattr(evaluate, "DEFAULT_ATTACKS", "nat,pgd3")
    short = "run quickstart epochs=1 burn_in=0 optimizer.lr=0.05 evaluate=nat test_size=30 --plain"
    assert robustmail(short).code == 0
    assert (said := robustmail("eval runs/quickstart/0 --n 40")).code == 0
    results = json.loads((bench / "evals" / "quickstart-0" / "results.json").read_text())
    assert (results["spec"]["eps"], results["spec"]["norm"], results["spec"]["model"]) == (0.1, "linf", "small_cnn")
    assert results["name"] == "quickstart/0", "every run's weights are called best"
    command = "verify evals/quickstart-0 --checkpoint runs/quickstart/0/best.safetensors"
    assert f"Check the stored examples: robustmail {command}" in said.out
    assert robustmail(command).code == 0


def test_an_image_folder_is_data(bench, robustmail):  # noqa: F811
    from PIL import Image

    for i in range(10):
        (bench / "pictures" / str(i)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(bench / "pictures" / str(i) / "a.png")
    assert robustmail(f"{GOOD.replace('ten.npz', 'pictures')} --png").code == 0


def test_a_module_in_memory_is_evaluated_like_a_file(bench):
    from robustmail import evaluate

    found = evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (torch.rand(9, 1, 8, 8), torch.arange(9) % 3),
                     attacks=("nat", "pgd5", "apgd"), eps=8 / 255)  # fmt: skip
    assert found["apgd"].correct <= found["nat"].correct
    assert found.worst.correct <= found["apgd"].correct


def test_an_eps_in_the_files_norm_is_not_taken_for_another(bench, robustmail):  # noqa: F811
    assert robustmail("run quickstart epochs=1 burn_in=0 evaluate=nat test_size=30 --plain").code == 0
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        assert open_inputs(Path("runs/quickstart/0"), n=2, norm=norm)[2:4] == (eps, norm)


def test_a_models_own_file_is_part_of_what_is_evaluated_and_may_move(bench, robustmail):  # noqa: F811
    command = f"{WRAPPED}:Wrapped --eps 0.1 --out a"
    assert robustmail(command).code == 0
    (bench / "own.py").rename(bench / "moved.py")
    verify = VERIFY.replace("small", "wrapped")
    assert_refused(robustmail(verify), f"was made with the code own.py:Wrapped ... {verify} --model own.py:Wrapped")
    assert_refused(robustmail(f"{verify} --model own.py:Wrapped"), "own.py: cannot be read")
    assert robustmail(f"{verify} --model moved.py:Wrapped").code == 0
    (bench / "own.py").write_text(OWN.replace("(x - 0.5) / 0.5", "(x - 0.5) / 0.4"))
    assert_refused(robustmail(command), "a: holds another evaluation (source: ... there, ... here)")


def test_a_training_run_of_an_older_version_is_told_so(done, robustmail):  # noqa: F811
    (done / "run").mkdir()
    old = {"complete": True, "attacks": [], "weights": {"file": "best.safetensors", "epoch": 3}}
    (done / "run" / "results.json").write_text(json.dumps(old))
    for verb in ("compare a", "report", "verify"):
        said = "run/results.json: was written by an older version of robustmail, in another format. Delete it"
        assert_refused(robustmail(f"{verb} run"), said)


def test_a_sorted_set_is_told_before_the_attacks(bench, robustmail):  # noqa: F811
    content = np.load(bench / "ten.npz")
    np.savez(bench / "sorted.npz", x=content["x"], y=np.arange(20) // 5)
    said = robustmail(f"{GOOD.replace('ten.npz', 'sorted.npz')} --n 5")
    assert said.code == 0
    assert "the first 5 images have 1 of the 4 classes: the set is sorted" in said.out
