"""What comes from a file that robustmail reads is data: it never names code that is then run, and never a path that is
then opened outside of what the user named. Every refusal is one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustmail.checkpoints.file_formats import read_file
from robustmail.errors import RobustmailError, RunError
from robustmail.evaluation.storage import write_pngs
from robustmail.report.export import FORMATS, export
from robustmail.report.page import write_page
from robustmail.runtime.files import append, atomic_write, atomic_write_json, folder_lock
from robustmail.runtime.untrusted import data_source, inside, parse_json, quoted
from robustmail.train.run import run, status
from robustmail.train.state import State
from tests.security.folders import EXECUTED, altered, call, places, put, recipe, rewritten, trained

OURS = ("results.json", "ledger.csv", "examples.safetensors")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with foreign code beside its weights, an evaluation of it, and two shards."""
    from robustmail.cli.main import main

    folder = tmp_path_factory.mktemp("honest")
    os.environ["EXECUTED"] = str(folder / "executed")
    trained(folder / "run")
    for out, more in ("e", ()), ("s1", ("--shard", "1/2")), ("s2", ("--shard", "2/2")):
        words = ["eval", folder / "run", "--attacks", "nat,pgd2", "--n", "60", "--plain", "--out", folder / out, *more]
        with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["robustmail", *map(str, words)])
            with pytest.raises(SystemExit) as left:
                main()
        assert not left.value.code
    return folder


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: Path) -> Any:
    """Whatever a test does, no planted code leaves its trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(f"{EXECUTED}y = 1\ndef net(classes, channels): ...\n")
    yield
    assert not (honest / "executed").exists()


class Touch:
    """A pickle that leaves a trace where it is loaded."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(os.environ["EXECUTED"]),)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, _, said = call(capsys, *words)
    assert (code, said.count("\n")) == (2, 1), (words, code, said)
    assert said.rstrip("\n").isprintable()
    return said


# Under a tracer

VERBS = (
    ("inspect run/best.safetensors", 0), ("inspect own.safetensors", 0), ("inspect bomb.pt", 2),
    ("eval run --n 40 --attacks nat,pgd2 --out again --plain", 0), ("eval own.safetensors --data digits", 2),
    ("eval elsewhere.safetensors", 2), ("eval best.safetensors --n 20 --attacks nat --out beside --plain", 0),
    ("margins run --n 20 --margins pm_adv --against pgd2 --out lab --plain", 0), ("margins elsewhere.safetensors", 2),
    ("figure 4 run --n 20 --out figure --plain", 0), ("figure 1c run elsewhere.safetensors --out figure", 2),
    ("verify e", 2), ("verify e --checkpoint run/best.safetensors", 0), ("verify hostile", 2),
    ("verify e --files-only", 0), ("verify hostile --files-only", 0), ("report hostile --format model-card", 0),
    ("export run --to pt2 --out run.pt2", 0), ("export own.safetensors --to torchscript", 2),
    ("report hostile --format robustbench", 2), ("push hostile hf://me/net --yes", 2),
    ("compare e again", 0), ("compare e e", 0), ("merge s1 s2 --out merged", 0), ("report e run --format html", 0),
    ("report e run hostile --format table", 0), ("report e --format csv", 0), ("show quickstart", 0),
    ("check quickstart", 0), ("list", 0), ("list runs", 0), ("show run/recipe.json", 0),
    ("table 1 --scale mini --out grid", 0),
    ("trials quickstart --seeds 0 --out grid epochs=0", 2), ("run quickstart --out run --plain", 2),
)  # fmt: skip


@pytest.fixture
def hostile(honest: Path, tmp_path: Path) -> Path:
    """A folder that runs code in every way that a folder has, as the current one."""
    for name in "run", "e", "s1", "s2":
        shutil.copytree(honest / name, name)
    shutil.copy("run/best.safetensors", "best.safetensors")
    rewritten(Path("best.safetensors"), Path("own.safetensors"), model="recipe.py:net")
    rewritten(Path("best.safetensors"), Path("elsewhere.safetensors"), source="x.py:y")
    altered(Path("e"), Path("hostile"), lambda r: r["spec"].update(data_given="x.py:y", model="x.py:net"))
    torch.save(Touch(), "bomb.pt")
    for folder in ".", "run", "e", "grid/runs/quickstart/0":
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in "recipe", "conftest", "sitecustomize", "usercustomize", "small_cnn", "digits", "neighbour":
            Path(folder, f"{name}.py").write_text(EXECUTED)
        for name in "torch", "numpy", "timm", "safetensors", "rich", "matplotlib", "recipes", "git":
            Path(folder, name).mkdir()
            Path(folder, name, "__init__.py").write_text(EXECUTED)
    Path("matplotlibrc").write_text("text.usetex: True\nbackend: module://neighbour\n")
    git = f"[core]\n\trepositoryformatversion = 0\n\tfsmonitor = touch {honest / 'executed'}\n"
    for name in ".git", ".git/objects", ".git/refs":
        os.mkdir(name)
    Path(".git/HEAD").write_text("ref: refs/heads/main\n")
    Path(".git/config").write_text(git)
    return tmp_path


def outside(paths: list[str], *folders: Path) -> list[str]:
    return [path for path in paths if not any(map(Path(path).is_relative_to, folders))]


@pytest.mark.long
def test_no_verb_opens_or_starts_anything_else(hostile: Path, honest: Path) -> None:
    child = Path(__file__).with_name("traced.py")
    words = [sys.executable, child, json.dumps(VERBS), "seen.json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(Path("seen.json").read_text())
    wrong = [(words, code, said) for (words, wanted), (code, said) in zip(VERBS, seen["said"], strict=True)
             if code != wanted or (wanted == 2 and said.count("\n") != 1)]  # fmt: skip
    assert not wrong
    assert [path for path in seen["run"] if path.startswith(str(hostile))] == []
    package, home = Path(__file__).parents[2], Path.home()
    caches = (hostile, home / ".cache", home / ".art", home / ".config" / "matplotlib", Path("/dev"))
    system = map(Path, (sys.prefix, sys.base_prefix, "/proc", "/sys", "/usr", "/lib", "/etc"))
    assert outside(seen["read"], *caches, *system, package) == []
    assert outside(seen["written"], *caches) == []
    harmless = {"uname", "ldconfig"}  # Python's platform and ctypes ask them
    started = [words for words in seen["started"] if Path(words[0]).name not in harmless]
    assert [words for words in started if words[:3] != ["git", "-C", str(package)]] == []
    assert seen["connected"] == []


@pytest.mark.long
def test_python_m_robustmail_imports_no_torch_of_the_current_folder(hostile: Path, honest: Path) -> None:
    words = [sys.executable, "-m", "robustmail", "inspect", "best.safetensors"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert "small_cnn" in done.stdout, done.stderr[-2000:]


# Names of data


@pytest.mark.parametrize("text", ["digits()", "digits", "cifar10(root='data', validation=500)", "digits(validation=9)",
                                  "subset(of=digits(validation=None), train=50)"])  # fmt: skip
def test_a_built_in_name_with_literals_is_data(text: str) -> None:
    assert callable(data_source(text))


@pytest.mark.parametrize("text", [
    "x.py:y", "npz('x.npz')", "npz(path='x.npz')", "image_folder('/')", "cifar10(root='/elsewhere')", "cifar10('..')",
    "subset(of=npz('x.npz'), train=5)", "torchattack('PGD')", "__import__('os').system('true')", "digits().x", "no",
    "digits(**{})", "digits(pad=open('x'))", "digits(" * 90, "digits()" + " " * 300, "digits(9, 9, 9, 9)", "", None, 3,
    "lambda: 1", "digits(pad=9**9**9**9)", "[digits()]", "subset(of='digits', train=5)",
])  # fmt: skip
def test_whatever_else_a_file_calls_its_data_is_not_opened(text: object) -> None:
    assert data_source(text) is None


@pytest.mark.parametrize("verb", ["eval", "margins", "figure 4"])
@pytest.mark.parametrize("source", ["x.py:y", "npz('x.npz')", "cifar10(root='/elsewhere')"])
def test_data_that_a_file_names_need_an_option_which_is_given(honest, capsys, verb: str, source: str) -> None:
    path = rewritten(honest / "run" / "best.safetensors", Path("w.safetensors"), source=source)
    said = refused(capsys, *verb.split(), path)
    assert f"Add {quoted('--data', source)} if you trust it" in said


# Names of networks


@pytest.mark.parametrize(("model", "says"), [
    ("net", "network is net, which is code. Pass --model file.py:factory if"),
    ("x.py:net", "network is net, which is code"),
    ("hf-hub:timm/resnet18.a1_in1k", "which is code"), ("hf_hub:resnet18", "which is code"),
    ("local-dir:.", "which is code"), ("timm:resnet18", "which is code"), ("../x", "which is code"),
    ("resnet18.a1_in1k", "does not fit the model"),
])  # fmt: skip
def test_a_network_that_a_file_names_is_one_of_timms_or_ours(honest, capsys, model: str, says: str) -> None:
    path = rewritten(honest / "run" / "best.safetensors", Path("w.safetensors"), model=model)
    assert says in refused(capsys, "eval", path, "--data", "digits", "--n", 20)


def test_a_network_of_the_recipe_beside_the_weights_needs_an_option_which_is_given(honest, capsys) -> None:
    Path("theirs").mkdir()
    shutil.copy("x.py", "theirs/recipe.py")
    path = rewritten(honest / "run" / "best.safetensors", Path("theirs/best.safetensors"), model="recipe.py:net")
    said = refused(capsys, "eval", path)
    assert "its network is net of the recipe beside it, which is code. Pass --model theirs/recipe.py:net if" in said


@pytest.mark.long
def test_a_run_of_a_built_in_network_is_evaluated_without_its_recipe(honest, capsys) -> None:
    assert "import neighbour" in (honest / "run" / "recipe.py").read_text()
    code, out, _ = call(capsys, "eval", honest / "run", "--n", 20, "--attacks", "nat", "--out", "e", "--plain")
    assert code == 0
    weights = honest / "run" / "best.safetensors"
    command = quoted("robustmail", "verify", "e", "--checkpoint", weights)
    assert f"Check the stored examples: {command}" in out
    assert call(capsys, *command.split()[1:])[0] == 0


def test_numbers_in_metadata_allocate_nothing(honest, capsys) -> None:
    path = rewritten(honest / "run" / "best.safetensors", Path("w.safetensors"), classes=9_999_999, channels=9_000_000)
    with little_memory():
        assert "does not fit the model" in refused(capsys, "eval", path, "--n", 20)


# verify


def test_verify_opens_nothing_that_a_folder_names_outside_of_it(honest, capsys) -> None:
    def hostile(results: dict[str, Any]) -> None:
        results["spec"] |= {"checkpoint": "/etc/passwd", "data_given": "x.py:y", "model": "x.py:net"}
        results["weights"]["file"] = "/etc/passwd"

    said = refused(capsys, "verify", altered(honest / "e", Path("e"), hostile))
    assert "the weights /etc/passwd, the data x.py:y, the code x.py:net" in said
    assert "robustmail verify e --checkpoint /etc/passwd --data x.py:y --model x.py:net" in said
    said = refused(capsys, "verify", "e", "--checkpoint", honest / "run" / "best.safetensors")
    assert "was made with the data x.py:y, the code x.py:net, and" in said


def test_weights_that_lie_in_the_folder_are_taken_from_there(honest, capsys) -> None:
    shutil.copytree(honest / "e", "e")
    shutil.copy(honest / "run" / "best.safetensors", "e")
    assert call(capsys, "verify", "e")[0] == 0
    os.remove("e/best.safetensors")
    os.symlink(honest / "run" / "best.safetensors", "e/best.safetensors")
    assert "--checkpoint" in refused(capsys, "verify", "e")


# JSON


@pytest.mark.parametrize("text", [
    '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[" * 50 + "]" * 50, "[" * 200_000,
    '{"a": ' * 99_999, "1" * 5000, str(2**63), '"\\ud800"', '{"\\udfff": 1}', "", "{", "\x00",
])  # fmt: skip
def test_json_that_breaks_readers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


READERS = {
    "report": ("report", "{}"), "page": ("report", "{}", "--format", "html"), "verify": ("verify", "{}"),
    "compare": ("compare", "{}", "{}"), "merge": ("merge", "{}", "--out", "merged"),
    "go on": ("eval", "{run}", "--attacks", "nat,pgd2", "--n", "60", "--out", "{}"),
}  # fmt: skip


def verbs(folder: Path, honest: Path) -> list[list[str]]:
    return [[word.format(folder, run=honest / "run") for word in words] for words in READERS.values()]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"complete": NaN}', '{"a": 1, "a": 1}', "7", "null", "[]", "{}", ""])
def test_every_verb_refuses_results_of_hostile_json(honest, capsys, text: str) -> None:
    shutil.copytree(honest / "e", "e")
    Path("e/results.json").write_text(text)
    for words in verbs(Path("e"), honest):
        refused(capsys, *words)


@pytest.mark.long
def test_a_wrong_type_anywhere_is_told_in_one_line(honest, capsys) -> None:
    """Every place of results.json, each with another thing in it, sealed again as anybody can."""
    rng, wrong = random.Random(0), [None, "\x1b[31m[red]", -1, [], {}, True, 1.5, 2**62, [1], {"a": "b"}]
    there = json.loads((honest / "e" / "results.json").read_text())
    weights = honest / "run" / "best.safetensors"
    for path in places(there):
        folder = altered(honest / "e", Path("e"), lambda results, path=path: put(results, path, rng.choice(wrong)))
        with contextlib.suppress(RobustmailError):
            assert "\x1b" not in export([folder], rng.choice(list(FORMATS)))
        with contextlib.suppress(RobustmailError):
            write_page(folder)
        code, out, said = call(capsys, "verify", folder, "--checkpoint", weights)
        assert code == 0 or (code == 2 and said.count("\n") == 1), (path, said)
        assert "\x1b" not in out + said


@pytest.mark.long
def test_a_grid_and_a_run_refuse_files_of_another_shape(honest, capsys) -> None:
    grid = ("trials", "quickstart", "--seeds", "0", "--out", "grid")
    cell = Path("grid/runs/quickstart/0")
    cell.mkdir(parents=True)
    for name in "state.pt", "lock":
        (cell / name).touch()
    shutil.copytree(honest / "run", "run")
    wrong = [{"complete": True, "attacks": [{"name": 3}]}, {"complete": True}, [1], {"complete": True, "attacks": 7}]
    for content in map(json.dumps, wrong):
        for path in Path("grid/trials.json"), cell / "recipe.json":
            path.write_text(content)
            refused(capsys, *grid)
            path.unlink()
        Path("run/results.json").write_text(content)
        with pytest.raises(RunError, match="damaged"):
            list(run(recipe, Path("run"), "mine"))
        assert status(recipe, Path("run"), fresh=True, yes=True) == "replace", "as the error says"
    Path("lab").mkdir()
    for text in "[]", '{"areas": []}', "{":
        Path("lab/margins.json").write_text(text)
        refused(
            capsys, "margins", honest / "run", "--n", 20, "--margins", "pm_adv", "--against", "pgd2", "--out", "lab"
        )


def test_state_of_a_wrong_type_anywhere_is_damaged(honest, capsys) -> None:
    shutil.copytree(honest / "run", "run")
    content = torch.load("run/state.pt", weights_only=True)
    state = State.fresh(recipe, Path("run"))
    for name in content.keys() - {"average"}:  # there is none in this recipe
        torch.save({**content, name: {"a": ["b"]}}, "run/state.pt")
        with pytest.raises(RunError, match=r"damaged|differ"):
            state.load()


# Links and pipes


@pytest.mark.long
@pytest.mark.parametrize("name", OURS)
def test_a_link_that_leads_out_of_a_folder_and_a_pipe_are_not_read(honest, capsys, name: str) -> None:
    for kind, plant in ("link", lambda path: os.symlink(honest / "e" / name, path)), ("pipe", os.mkfifo):
        shutil.copytree(honest / "e", kind)
        os.remove(f"{kind}/{name}")
        plant(f"{kind}/{name}")
        for words in verbs(Path(kind), honest):
            refused(capsys, *words)
    Path("run").mkdir()
    for name in "best.safetensors", "results.json":
        os.symlink(honest / "run" / name, f"run/{name}")
    assert "leads out of run" in refused(capsys, "eval", "run")


def test_results_beside_which_no_ledger_lies_are_read_with_the_same_care(honest, capsys) -> None:
    Path("begun.json").write_text('{"complete": false}')
    for kind, plant in ("link", lambda path: os.symlink(Path("begun.json").resolve(), path)), ("pipe", os.mkfifo):
        Path(kind).mkdir()
        Path(kind, "lock").touch()
        plant(f"{kind}/results.json")
        words = ("--attacks", "nat,pgd2", "--n", "60", "--plain", "--out", kind)
        said = refused(capsys, "eval", honest / "run", *words)
        assert {"link": "is a symbolic link that leads out", "pipe": "is no regular file"}[kind] in said


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", 7, None, "x" * 999])
def test_a_name_is_no_path(tmp_path: Path, name: object) -> None:
    assert inside(tmp_path, name) is None


@pytest.mark.long
def test_no_writer_follows_a_link(honest, capsys) -> None:
    outside = Path("outside").absolute()
    outside.write_text("years of work")
    shutil.copytree(honest / "e", "e")
    shutil.copytree(honest / "run", "run")
    os.mkdir("photos")
    Path("photos/00001.png").write_text("years of work")
    for name in ("results.json.tmp", "report.html", "ledger.csv.tmp", "report.html.tmp"):
        Path(f"e/{name}").unlink(missing_ok=True)
        os.symlink(outside, f"e/{name}")
    os.symlink(Path("photos").absolute(), "e/png")
    write_page(Path("e"))
    atomic_write_json(Path("e/results.json"), json.loads(Path("e/results.json").read_text()))
    with pytest.raises(RunError, match="symbolic link"):
        write_pngs(Path("e"))
    call(capsys, "eval", honest / "run", "--attacks", "nat", "--n", 20, "--out", "e", "--fresh", "--plain")
    for name in "log.txt", "lock", "curves.png", "metrics.csv", "state.pt", "best.safetensors", "nonfinite.pt":
        Path(f"run/{name}").unlink(missing_ok=True)
        os.symlink(outside, f"run/{name}")
    with pytest.raises(RunError, match="symbolic link"):
        append(Path("run/log.txt"), "x")
    with pytest.raises(RunError, match="symbolic link"), folder_lock(Path("run")):
        pass
    for name in "curves.png", "metrics.csv", "state.pt", "best.safetensors", "nonfinite.pt":
        atomic_write(Path("run") / name, lambda path: path.write_text("ours"))
    assert (outside.read_text(), Path("photos/00001.png").read_text()) == ("years of work", "years of work")
    os.mkfifo("run/pipe")
    with pytest.raises(RunError, match=r"cannot be written|no regular file"):
        append(Path("run/pipe"), "x")


def test_a_grid_does_not_work_where_a_link_leads(capsys) -> None:
    Path("grid/runs").mkdir(parents=True)
    Path("photos").mkdir()
    os.symlink(Path("photos").absolute(), "grid/runs/quickstart")
    assert "leads out of grid" in refused(capsys, "trials", "quickstart", "--seeds", "0", "--out", "grid")
    assert not list(Path("photos").iterdir())


@pytest.mark.long
def test_other_things_in_an_evaluations_folder_stop_nothing_and_stay(honest, capsys) -> None:
    words = ["eval", honest / "run", "--attacks", "nat,pgd2", "--n", 40, "--out", "e", "--plain", "--png"]
    others = [Path("e") / name for name in (".DS_Store", "nohup.out", "png/mine.png")]
    Path("e/png").mkdir(parents=True)
    for path in others[:2]:
        path.write_text("years of work")
    assert "png, which would be overwritten, but no evaluation" in refused(capsys, *words)
    Path("e/png").rmdir()
    assert call(capsys, *words)[0] == 0
    others[2].write_text("years of work")
    assert call(capsys, *words, "--fresh")[0] == 0
    assert {path.read_text() for path in others} == {"years of work"}
    refused(capsys, "run", "quickstart", "--out", "e", "--fresh", "--yes")
    assert Path("e/ledger.csv").is_file()


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    path.parent.mkdir()

    def slow(temporary: Path) -> None:
        atomic_write(path, lambda other: other.write_text("second"))
        assert temporary.exists()
        temporary.write_text("first")

    atomic_write(path, slow)
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_what_a_killed_writer_left_goes_with_the_next_lock(tmp_path: Path) -> None:
    (tmp_path / "ledger.csv.robustmail-a1b2c3d4.tmp").write_text("half")
    (tmp_path / "notes.tmp").write_text("mine")
    with folder_lock(tmp_path):
        assert {p.name for p in tmp_path.iterdir()} == {"lock", "notes.tmp", "x.py"}


# What is announced, and what is there


@contextlib.contextmanager
def little_memory(more: int = 600 * 2**20) -> Any:
    """No more address space than is taken already and a little: what allocates gigabytes fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bomb(path: Path, member: str, start: bytes = b"", size: int = 2 * 2**30) -> Path:
    """A zip of a few MB that unpacks to gigabytes of zeros, as numpy and torch may write them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w", force_zip64=True) as to:
        to.write(start)
        for _ in range(size >> 24):
            to.write(bytes(2**24))
    return path


@pytest.mark.long
def test_archives_and_headers_that_announce_gigabytes_are_not_unpacked(capsys) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**31 - 2**24,)})
    bomb(Path("x.npz"), "x.npy", header.getvalue(), 2**28)
    bomb(Path("x.pth"), "archive/data.pkl", size=2**28)
    with zipfile.ZipFile("announced.npz", "w") as archive:
        for name in "xy":
            archive.writestr(f"{name}.npy", header.getvalue())
    Path("x.safetensors").write_bytes(struct.pack("<Q", 2**35) + b"{" + bytes(100))
    with little_memory():
        for path in "x.npz", "x.pth", "announced.npz", "x.safetensors":
            refused(capsys, "inspect", path)
        torch.save({"weight": torch.zeros(4, 4)}, "net.pth")
        for path in "x.npz", "announced.npz":
            assert "unpacks from" in (said := refused(capsys, "eval", "net.pth", "--data", path)) or "announces" in said


def test_a_view_that_repeats_one_number_is_not_unfolded() -> None:
    torch.save({str(k): torch.zeros(1).half().expand(2**10, 2**10) for k in range(400)}, "x.pth")
    with pytest.raises(RobustmailError, match="its tensors claim"):
        read_file("x.pth")


def test_a_pickle_in_an_npz_or_a_state_is_not_loaded(honest, capsys) -> None:
    np.savez("x.npz", x=np.array([Touch()], dtype=object), y=np.array([0]))
    refused(capsys, "eval", honest / "run", "--data", "x.npz")
    shutil.copytree(honest / "run", "run")
    torch.save({"format": 1, "model": Touch()}, "run/state.pt")
    with pytest.raises(RunError, match="damaged"):
        State.fresh(recipe, Path("run")).load()


# What is shown

NASTY = "=cmd|' /C calc'!A0 [red]x[/red] <script>alert(1)</script> \x1b]0;title\x07 $x$ \u202e"


def test_a_name_can_neither_steer_a_terminal_nor_a_browser_nor_a_spreadsheet(honest, capsys) -> None:
    def hostile(results: dict[str, Any]) -> None:
        results["name"] = NASTY
        results["data"]["class_names"] = [NASTY] * 10
        results["data"]["name"] = results["spec"]["model"] = results["provenance"]["command"] = NASTY
        results["attacks"][1]["settings"] = {NASTY: NASTY}

    folder = altered(honest / "e", Path("<script>[red]"), hostile)
    page = write_page(folder).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    for form in FORMATS:
        code, out, _ = call(capsys, "report", folder, "--format", form)
        assert code == 0
        assert not {"\x1b", "\x07", "\u202e"} & set(out)
        assert "[red]x" in out.replace("\\", "").replace("{[}", "[").replace("{]}", "]") or form == "json"
        assert form != "csv" or all(not line.split(",")[1].startswith("=") for line in out.splitlines()[1:])
    code, out, _ = call(capsys, "compare", folder, folder)
    assert "[red]" in out
    for words in (["inspect", NASTY], ["report", NASTY], ["run", NASTY], ["eval", NASTY]):
        refused(capsys, *words)
