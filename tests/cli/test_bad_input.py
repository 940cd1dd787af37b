"""A user's mistake is one line on stderr, exit code 2 and nothing on disk; the verbs that only read work."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from robustmail import __version__, catalog
from robustmail.cli import main
from tests.processes import Python

PLUGINS = """
import torch
from robustmail import Terms


def square(step):
    return step.probs_adv


def nan(step):
    return step.probs_adv[:, 0] * float("nan")


def typo(step):
    return step.probs_advv[:, 0]


def graphless(step):
    return Terms(step.logits_adv.detach().sum(1))


def leap(model, x, y):
    return x + 2


def net():
    return torch.nn.Flatten()
"""
RECIPES = {
    "syntax.py": "x = 1\nrecipe = Recipe(",
    "empty.py": "import robustmail",
    "number.py": "recipe = 3",
    "other.py": "from robustmail import load_recipe\nmine = load_recipe('quickstart')",
    "raises.py": "x = 1\nx / 0",
    "name.py": "from robustmail import *\nrecipe = Recipe(attack=torchatack('PGD'))",
    "import.py": "from robustmail import TRADESS",
    "import2.py": "from robustmail import Clasifier",
    "knob.py": "from robustmail import TRADES\nTRADES(betta=5)",
    "value.py": "from robustmail import PGD\n\nPGD(eps=8)",
    "leaves.py": "raise SystemExit(5)",
}


class Said(NamedTuple):
    code: object
    out: str
    err: str


@pytest.fixture
def robustmail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Said]:
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["robustmail", *shlex.split(words)])
        code: object = "it came back"
        try:
            main.main()
        except SystemExit as left:
            code = left.code
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def workbench(tmp_path: Path) -> Path:
    """A folder with broken plugins, recipes and data."""
    for name, text in {"my.py": PLUGINS, **RECIPES}.items():
        (tmp_path / name).write_text(text)
    x, y = np.zeros((20, 8, 8, 1), dtype=np.uint8), np.arange(20) % 6
    np.savez(tmp_path / "six.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "six.npz").read_bytes()[:900])
    return tmp_path


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def assert_refused(said: Said, fragment: str) -> None:
    """Exit code 2 and one line with the fragment, of which " ... " leaves something out."""
    assert said.code == 2, said
    assert said.err.startswith("robustmail: ")
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    assert [part for part in fragment.split(" ... ") if part not in said.err] == []
    assert "Traceback" not in said.out + said.err


COMMANDS = {
    "verb": ("chek quickstart", "No such command 'chek'. Did you mean 'check'?"),
    "no recipe": ("run", "Missing argument 'RECIPE'"),
    "option": ("run quickstart --plian", "--plian: no such option. Did you mean '--plain'?"),
    "field as an option": ("run quickstart --sed 2", "--sed: no such option. Did you mean '--seed'?"),
    "field in a field as an option": ("check quickstart --weighter.slpoe=3", "Did you mean 'slope'?"),
    "field as an option without a value": (
        "show quickstart --epochs",
        "--epochs: needs a value. Write --epochs VALUE.",
    ),
    "option of another verb": ("eval model.pth --sed 2", "No such option ... --sed"),
    "option without its value": ("run quickstart --out", "'--out' requires an argument"),
    "kind to list": ("list margin", "list margin: no such kind. Did you mean 'margins'?"),
    "address of the hub in a dry run": (
        "eval hf://a --dry-run",
        "hf://a: not a file of the hub. Write hf://OWNER/NAME",
    ),
    "option of the other bench": ("bench --evaluation --batch 32", "bench --batch: is not used by --evaluation"),
    "option that a plan does not use": ("bench --paper --repeats 2", "bench --repeats: is not used by --paper"),
    "option of the plan alone": ("bench --growth --small", "bench --small: is not used by --growth"),
    "option of the plan without it": ("bench --dry-run", "bench --dry-run: is an option of --paper"),
    "two benches at once": ("bench --growth --evaluation", "does not go with"),
    "quick and a model": ("bench --quick --model resnet18", "bench --model: is not used by --quick"),
    "recipe": ("run quikstart", "recipe 'quikstart': no such file, nor a built-in recipe. Did you mean 'quickstart'?"),
    "recipe to copy": ("copy quikstart", "no such built-in recipe. Did you mean 'quickstart'?"),
    "recipe's variable": ("check mail_at:cod", "defines no 'cod'. It has recipe, wrn, code: write mail_at:recipe."),
    # recipe files
    "syntax error": ("check syntax.py", "syntax.py:2: not valid Python: '(' was never closed"),
    "file without a recipe": ("check empty.py", "empty.py: defines no 'recipe'. Write recipe = Recipe(...)."),
    "recipe that is none": ("check number.py", "number.py: 'recipe' is no Recipe but int"),
    "recipe under another name": ("check other.py", "defines no 'recipe'. It has mine: write other.py:mine."),
    "file that is not there": ("check nothing.py", "recipe 'nothing.py': no such file"),
    "file that raises": ("check raises.py", "raises.py:2: ZeroDivisionError: division by zero"),
    "name in a file": (
        "check name.py",
        "name.py:2: NameError: name 'torchatack' is not defined. Did you mean 'torchattack'?",
    ),
    "import in a file": ("check import.py", "import.py:1: ImportError ... Did you mean 'TRADES'?"),
    "import of what is no plugin": ("check import2.py", "import2.py:1: ImportError ... Did you mean 'Classifier'?"),
    "knob in a file": ("check knob.py", "unexpected keyword argument 'betta'. Did you mean 'beta'?"),
    "value in a file": ("check value.py", "value.py:3: PGD (given eps=8): images live in [0, 1]"),
    # data
    "missing data": ("run quickstart \"data=npz('no.npz')\"", "npz('no.npz'): no such file"),
    "truncated data": ("run quickstart \"data=npz('truncated.npz')\"", "npz('truncated.npz'): not a readable npz file"),
    "label outside": (
        "run quickstart \"data=npz('six.npz', classes=2)\"",
        "npz('six.npz') (train): labels span 0 ... 5",
    ),
    "too much held out": ("run quickstart data.validation=9999", "(given validation=9999): train has 1438 images. Set"),
    "channels": ("run quickstart 'normalize=((.5,.5),(1,1))'", "one mean and one std for each of 1 channels"),
}
OVERRIDES = {  # of the quickstart
    # fields
    "field": ("epohcs=5", "epohcs=5: the recipe has no 'epohcs'. Did you mean 'epochs'?"),
    "nested field": ("weighter.slpoe=5", "weighter.slpoe=5: no field 'slpoe' in Sigmoid. Did you mean 'slope'?"),
    "field before the dot": ("wieghter.slope=5", "no 'wieghter.slope'. Did you mean 'weighter.slope'?"),
    "field of a number": ("epochs.x=5", "no 'epochs.x'. Did you mean 'epochs'?"),
    "no value": ("epochs", "an override is path=value. Write e.g. weighter.slope=5"),
    "empty value": ("epochs=", "'': cannot be read"),
    # names
    "margin": ("margin=pm_avd", "margin=pm_avd: 'pm_avd': no such plugin among the margins. Did you mean 'pm_adv'?"),
    "weight": ("'weighter=Sigmod(slope=5)'", "no such plugin among the weighters. Did you mean 'Sigmoid'?"),
    "objective": ("objective=TRADE", "no such plugin among the objectives. Did you mean 'TRADES'?"),
    "data set": ("data=digitz", "no such plugin among the data. Did you mean 'digits'?"),
    "library attack": ("'attack=torchattack(\"PDG\")'", "torchattacks has no such attack. Did you mean 'PGD'?"),
    "library knob": ("'attack=torchattack(\"PGD\", esp=0.1)'", "no knob 'esp'. Did you mean 'eps'?"),
    "knob in a call": ("'attack=PGD(esp=0.1)'", "PGD: no field 'esp'. Did you mean 'eps'?"),
    "model": ("model=cifar_resnet81", "model='cifar_resnet81': no such model. Did you mean 'cifar_resnet18'?"),
    "evaluation": ("evaluate=nat,pgdd20", "no such attack ... Did you mean 'pgd20'?"),
    "validation attack": ("validate=foo", "no such attack ... There are: aa, apgd, apgd-t,"),
    "plugin in a file": ("margin=my.py:squar", "my.py: has no 'squar'. Did you mean 'square'?"),
    "plugin file": ("margin=mine.py:square", "margin=mine.py:square: mine.py: cannot be read: No such file"),
    # values
    "text for a number": ("attack.eps=abc", "attack.eps=abc: 'abc' is neither a literal nor a known name. eps must"),
    "fraction of an epoch": ("epochs=2.5", "epochs=2.5: epochs must be a whole number"),
    "number in letters": ("epochs=three", "'three' is neither a literal nor a known name. epochs must be a whole"),
    "truth for a number": ("epochs=True", "epochs must be a whole number"),
    "number for a data set": ("data=3", "data must be a callable"),
    "missing knobs": ("weighter=Sigmoid", "Sigmoid: missing 2 required keyword-only arguments"),
    "eps in bytes": ("attack.eps=8", "(given eps=8): images live in [0, 1] ... Write eps=8/255."),
    "negative eps": ("attack.eps=-1/255", "eps is negative"),
    "negative step": ("attack.alpha=-0.1", "alpha is negative"),
    "evaluation eps in bytes": ("eps=8", "Recipe (given eps=8)"),
    "no epochs": ("epochs=0", "epochs must be at least 1"),
    "negative seed": ("seed=-1", "seed must be at least 0"),
    "choice": ("select=bset", "select must be 'best' or 'last'"),
    "negative weights": ("weighter.scale=-1", "scale must be a finite number, at least 0"),
    "margin without weight": ("weighter=None", "a margin does nothing without a weighter. Add weighter=Sigmoid"),
    "stairs without a first step": ("'optimizer.lr=Stairs({3: 0.1})'", "that starts at 0. Write Stairs({0: 0.1,"),
    "text in stairs": ("'optimizer.lr=Stairs({0: \"a\"})'", "lr must be a number"),
    "division by zero": ("attack.eps=8/0", "'8 / 0': division by zero"),
    "code": ("'epochs=__import__(\"os\")'", "is neither a literal nor a known name. epochs must be a whole number"),
    "a lambda": ("'epochs=(lambda: 3)()'", "Overrides are read, not run"),
    "an attribute": ("epochs=sys.path", "is not a literal, a name or a call of one"),
    "a power": ("epochs=9**9**9**9", "is not a literal, a name or a call of one"),
    "a quote too few": ('"data=npz(\'six.npz)"', "cannot be read. Put texts in quotes inside a call"),
    # plugins that break their contract
    "margin of wrong shape": ("margin=my.py:square", "square (my.py:6): returned shape [4, 10] for a batch of 4"),
    "margin of NaN": ("margin=my.py:nan", "margin nan (my.py:10): returned NaN or infinity"),
    "margin that fails": (
        "margin=my.py:typo",
        "margin typo (my.py:15): failed with AttributeError ... 'probs_advv'. Did you mean 'probs_adv'?",
    ),
    "objective without graph": ("objective=my.py:graphless", "returned a loss without a graph. Do not detach"),
    "objective of tensors": ("objective=pm_adv", "returned Tensor, not Terms(weighted, plain)"),
    "attack out of the box": ("attack=my.py:leap eps=0.1", "attack leap (my.py:22): left the box: pixels span [2,"),
    "attack without eps": ("attack=my.py:leap", "the attack leap has no eps to evaluate with. Add eps=8/255"),
    "lps without a trace": ("margin=lps", "lps: the attack kept no trace of its steps. Use attack=PGD(...)"),
    # devices
    "device": ("device=gpu", "device='gpu': no such device. Use auto, cpu, cuda, cuda:1 or mps"),
    "unsupported device": ("device=meta", "meta is not supported"),
}
WRONG = COMMANDS | {name: (f"check quickstart {words}", said) for name, (words, said) in OVERRIDES.items()}


@pytest.mark.parametrize(("words", "fragment"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing_behind(
    workbench: Path, robustmail: Callable[[str], Said], words: str, fragment: str
) -> None:
    before = tree(workbench)
    assert_refused(robustmail(words), fragment)
    assert tree(workbench) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(robustmail: Callable[[str], Said]) -> None:
    assert_refused(
        robustmail("check quickstart device=cuda"), "device='cuda': this machine has 0 CUDA devices. Use device=auto"
    )


LEAVING = """
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import typer
from robustmail import SGD, Step, load_recipe


def leave():
    HOW


def attack(model, x, y):
    return x if len(x) == 4 else leave()


def margin(step: Step):
    return step.probs_adv.amax(1) if len(step.y) == 4 else leave()


def network(classes, channels):
    leave()


@contextmanager
def perturb(model, loss):
    yield
    if len(list(model.parameters())) != 2:
        leave()


class Stuck(torch.optim.SGD):
    def step(self):
        leave()


@dataclass(frozen=True)
class Optimizer:
    lr: float = 0.1

    def __call__(self, parameters):
        return Stuck(parameters, lr=self.lr)


@dataclass(frozen=True)
class Picky:
    k: float = 1.0

    def __post_init__(self):
        if self.k == 2.0:
            leave()

    def __call__(self, margin):
        return torch.ones_like(margin)


class Late:
    def turns(self):
        return (0,)

    def at_epoch(self, epoch, /):
        return leave() if epoch > 0 else 0.1


mail = load_recipe("quickstart").but(epochs=1, evaluate=("nat",), validate="pgd2", burn_in=0)
attacked = mail.but(attack=attack, eps=0.1)
margined = mail.but(margin=margin)
weighted = mail.but(weighter=Picky())
modelled = mail.but(model=network)
perturbed = mail.but(perturbation=perturb)
optimized = mail.but(optimizer=Optimizer())
scheduled = mail.but(optimizer=SGD(lr=Late()))
sourced = mail.but(data=leave)
"""
WAYS_OUT = (
    "sys.exit(0)", "quit()", "raise KeyboardInterrupt", "raise GeneratorExit", "raise BaseException",
    "raise typer.Exit(0)",
)  # fmt: skip
QUICK = ["check leave.py:margin", "show leave.py:weighted weighter.k=2", "run leave.py:optimized"]
ALL = [
    *QUICK, "check leave.py:attack", "check leave.py:attacked",
    *(f"run leave.py:{name}" for name in ("modelled", "perturbed", "scheduled", "sourced", "margined")),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS_OUT)
def test_whatever_a_plugin_does_to_leave_is_one_line(
    tmp_path: Path, robustmail: Callable[[str], Said], way: str
) -> None:
    (tmp_path / "leave.py").write_text(LEAVING.replace("HOW", way))
    for words in ALL if way == WAYS_OUT[0] else QUICK:
        said = robustmail(words)
        error = [line for line in said.err.splitlines() if "leave.py:" in line or "model=network" in line]
        assert (said.code, len(error)) == (2, 1), (words, said)
        assert said.err.endswith(f"{error[0]}\n")
    (tmp_path / "leave.py").write_text(f"import sys\n\nimport typer\n\n{way}")
    assert_refused(robustmail("check leave.py"), "leave.py:5: ")


def test_ctrl_c_is_no_plugins_doing(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(
        "import time\nfrom robustmail import load_recipe\n\n\ndef attack(model, x, y):\n"
        "    print('waiting', flush=True)\n    time.sleep(60)\n\n\n"
        "recipe = load_recipe('quickstart').but(attack=attack, eps=0.1)\n"
    )
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job of a shell ignores it
    words = ["-c", f"{default}; from robustmail.cli.main import main; main()", "check", "wait.py"]
    waiting = Python(*words, cwd=tmp_path)
    assert waiting.stdout.readline() == "waiting\n"
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate()
    assert waiting.returncode == 130
    assert "stopped; nothing was begun that could go on. Begin again with: robustmail" in said


def test_ctrl_c_before_a_verb_has_begun_is_one_line(monkeypatch, capsys) -> None:
    def interrupted(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(main.typer.main, "get_command", interrupted)
    monkeypatch.setattr(sys, "argv", ["robustmail", "list"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as left:
            main.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (left.value.code, capsys.readouterr().err) == (
        130,
        "robustmail: stopped; nothing was begun that could go on. Begin again with: robustmail list\n",
    )


@pytest.mark.long
def test_a_recipe_in_latin_1_works_on_a_terminal_in_ascii(tmp_path: Path) -> None:
    text = "# coding: latin-1\ndef güte(margin):\n    return margin * 0 + 1\n"
    (tmp_path / "mine.py").write_bytes(text.encode("latin-1"))
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}  # tox sets the last
    words = [sys.executable, "-m", "robustmail", "check", "mine.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **bare}, check=False)
    assert (done.stdout, done.returncode) == ("g?te: weighter, passes all 7 laws on margins from -1 to 1\n", 0), (
        done.stderr
    )


DEEPER = {
    "list as a key": ("check quickstart 'optimizer.lr=Stairs({[0]: 1})'", "cannot be a key"),
    "number for a library attack": ("check quickstart 'attack=torchattack(3)'", "torchattacks has no such attack"),
    "recipe that exits": ("check leaves.py", "leaves.py:1: SystemExit: 5"),
    "negative steps": ("check quickstart attack.steps=-1", "steps must be at least 1"),
    "negative learning rate": ("run quickstart optimizer.lr=-1", "lr must be a finite number, at least 0"),
    "negative padding": ("run quickstart data.pad=-1", "digits (given pad=-1): pad must be at least 0"),
    "classes in letters": ("run quickstart \"data=npz('six.npz', classes='x')\"", "classes must be a whole number"),
    "optimiser as data": ("run quickstart data=SGD()", "data must be a source, called without arguments"),
    "data as optimiser": ("run quickstart optimizer=digits()", "optimizer must be an optimizer"),
    "model function that fails": ("run quickstart model=my.py:net", "cannot be built for 10 classes and 1 channels"),
    "infinite learning rate": ("check quickstart optimizer.lr=inf", "lr must be a finite number, at least 0"),
    "negative beta": ("check quickstart objective.beta=-1", "beta must be a finite number, at least 0"),
    "no deviation": (
        "check quickstart normalize=((0.5,),(0.0,))", "a standard deviation must be positive"),
    "an attack twice": ("check quickstart evaluate=nat,nat", "an attack is named twice"),
    "a batch of one": ("run quickstart batch=1 model=cifar_resnet18_w8", "does not take a batch of 1 x 1 x 8 x 8"),
    "schedule where none goes": ("check quickstart 'batch=Stairs({0: 1})'", "batch cannot change with the epoch"),
    "model for larger images": (
        "run quickstart model=test_vit epochs=1 evaluate=nat", "model=test_vit: does not take a batch of"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "fragment"), DEEPER.values(), ids=DEEPER)
def test_a_mistake_that_only_a_closer_look_finds_is_one_line_too(
    workbench: Path, robustmail: Callable[[str], Said], words: str, fragment: str
) -> None:
    before = tree(workbench)
    assert_refused(robustmail(words), fragment)
    assert tree(workbench) == before


@pytest.mark.parametrize(
    "words", ["--traceback check quickstart epohcs=5", "check quickstart epohcs=5 --traceback"], ids=["first", "last"]
)
def test_a_traceback_is_printed_on_request(robustmail: Callable[[str], Said], words: str) -> None:
    code, _, err = robustmail(words)
    assert code == 2
    assert err.startswith("Traceback (most recent call last)")
    assert "in apply_overrides" in err
    assert err.splitlines()[-1].startswith("robustmail: epohcs=5: ")


def test_an_error_of_ours_is_called_unexpected_and_exits_with_1(
    robustmail: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "recipe_files", lambda: 1 / 0)
    code, _, err = robustmail("list")
    assert (code, err) == (
        1,
        "robustmail: unexpected ZeroDivisionError: division by zero. Add --traceback to see where\n",
    )


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("", ["Usage: robustmail", "run ", "check ", "copy "]),
        ("--help", ["Usage: robustmail", "--traceback", "--version"]),
        ("run --help", ["RECIPE", "[PATH=VALUE]", "--out", "--fresh", "--yes", "--plain"]),
        ("--version", [f"robustmail {__version__}"]),
        ("list", ["recipes", "margins", "pm_adv", "weighters", "Tanh", "models", "cifar_wrn34_10", "svhn", "AWP"]),
        ("list margins", ["pm_adv", "Lead of the true class on the adversarial image", "lps", "kappa"]),
        ("list recipes", [*catalog.recipe_files(), "MAIL-TRADES on 1,797 handwritten digits"]),
        (
            "check quickstart",
            ["quickstart: dry run passed in 4 phases (something changes at epochs 11, 15, 19)\n"],
        ),
        ("check at epochs=74", ["at: dry run passed in 1 phase\n"]),
        ("check at epochs=75", ["at: dry run passed in 2 phases (something changes at epoch 75)\n"]),
        (
            "show quickstart weighter.slope=5",
            [
                "weighter.slope            5",
                "optimizer.lr              Stairs({0: 0.05, 14: 0.01, 18: 0.001})",
                "loss = mean( w * 5 KL(nat || adv) + CE(nat) )",
                "w = u / mean(u), u = sigmoid(-5 pm_adv); from epoch 11 on, 1 before",
                "from epoch 11: 13 forward and 12 backward passes a step (11 + 10 in the attack)",
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_verbs_that_only_read_work(
    tmp_path: Path, robustmail: Callable[[str], Said], words: str, fragments: list[str]
) -> None:
    code, out, err = robustmail(words)
    assert (code, err) == (0, "")
    assert [fragment for fragment in fragments if fragment not in out] == []
    assert tree(tmp_path) == []


def test_a_list_of_one_kind_names_that_kind_alone(robustmail: Callable[[str], Said]) -> None:
    names = [line.split()[0] for line in robustmail("list margins").out.splitlines()]
    since_mail = ["logit_margin", "p_adv", "entropy", "loss_adv", "energy", "target_confidence", "vulnerability"]
    assert names == ["pm_adv", "pm_nat", "pm_dif", "lps", "kappa", *since_mail]


def test_a_copy_is_the_recipe_and_never_overwrites(tmp_path: Path, robustmail: Callable[[str], Said]) -> None:
    code, out, _ = robustmail("copy quickstart")
    mine = tmp_path / "quickstart.py"
    assert (code, out) == (0, "quickstart.py: edit it, then robustmail run quickstart.py\n")
    assert mine.read_text() == catalog.recipe_files()["quickstart"].read_text()
    assert robustmail("check quickstart.py").code == 0
    mine.write_text("edited")
    assert_refused(robustmail("copy quickstart"), "quickstart.py: exists already. Name another file")
    assert mine.read_text() == "edited"
    assert robustmail("copy quickstart other.py").code == 0
    assert_refused(robustmail("copy quickstart no/such/folder.py"), "no/such: no such folder. Make it first")
    assert tree(tmp_path) == [tmp_path / "other.py", mine]


LIGHT = """
import sys
from robustmail.cli.main import main
try:
    main()
except SystemExit as left:
    assert left.code == 0, left.code
heavy = {"torch", "torchvision", "timm", "numpy", "torchattacks", "art", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def process(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60, env=os.environ, check=False
    )


@pytest.mark.parametrize("word", ["list", "--help", "--version"])
def test_listing_and_help_do_not_wait_for_torch(tmp_path: Path, word: str) -> None:
    done = process("-c", LIGHT, word, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "robustmail" in done.stdout or "recipes" in done.stdout


def test_a_real_process_exits_with_2_and_one_line(tmp_path: Path) -> None:
    done = process("-m", "robustmail", "chek", "quickstart", folder=tmp_path)
    assert_refused(Said(done.returncode, done.stdout, done.stderr), "Did you mean 'check'?")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("track", "said"),
    [
        ("wandb,tensorbord", "'tensorbord': no such plugin among the trackers. Did you mean 'tensorboard'?"),
        ("wandb,wandb", "wandb is named twice"),
        (",", "no name given. Write --track tensorboard,wandb."),
        ("wandb", "--track wandb: needs wandb, which is not installed. pip install 'robustmail[wandb]'"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused_before_training(track: str, said: str, robustmail, monkeypatch):
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else installed(name))
    if track == "wandb,tensorbord":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: installed("json"))
    result = robustmail(f"run quickstart --track {track}")
    assert result.code == 2
    assert said in result.err
    assert not Path("runs").exists()
