"""Folders that somebody else may have sent: an honest run and evaluation, and ways to make them hostile."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from robustmail import AT, PGD, SGD, Recipe, digits
from robustmail.cli.main import main
from robustmail.evaluation.storage import with_seal
from robustmail.train.run import run

EXECUTED = "open(__import__('os').environ['EXECUTED'], 'a').write(__file__ + chr(10))\n"
"""Code that leaves a trace wherever it is run."""
STANDING = (*range(0, 2000, 50),)

recipe = Recipe(
    data=digits(validation=150, pad=1, flip=False), model="small_cnn", objective=AT(),
    attack=PGD(eps=0.1, alpha=0.05, steps=2),
    epochs=1, batch=64, optimizer=SGD(lr=0.05), validate="pgd2", evaluate=("nat", "pgd2"), test_size=40,
)  # fmt: skip


def trained(folder: Path) -> Path:
    """A finished run with the code that it was made of, which says when it is run."""
    source = folder.parent / "mine.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(f"import neighbour\n{EXECUTED}def net(classes, channels): ...\n")
    list(run(recipe, folder, "mine", source))
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command, in this process."""
    before, sys.argv = sys.argv, ["robustmail", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def rewritten(path: Path, to: Path, **facts: Any) -> Path:
    """A file of weights whose metadata say something else; None takes a fact away."""
    with safe_open(path, "pt") as file:
        there = json.loads(file.metadata()["robustmail"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    said = {name: value for name, value in (there | facts).items() if value is not None}
    save_file(tensors, to, {"robustmail": json.dumps(said)})
    return to


def altered(folder: Path, to: Path, change: Callable[[dict[str, Any]], None], seal: bool = True) -> Path:
    """A copy of an evaluation whose results say something else, sealed again: anybody can."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    results = json.loads((to / "results.json").read_text())
    change(results)
    (to / "results.json").write_text(json.dumps(with_seal(results) if seal else results))
    return to


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in parsed JSON; of a list, to the first."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Replace what lies at the end of a way."""
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new
