"""Synthetic folders, as robustmail eval and robustmail run leave them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from robustmail.evaluation.class_accuracies import KINDS, class_row, worst_classes

Folder = Callable[..., Path]
EPS = 8 / 255


def row(name: str, correct: int, n: int, **settings: str) -> dict[str, Any]:
    share, half = correct / n, 1 / (n + 4) ** 0.5
    low, high = max(0.0, share - half), min(1.0, share + half)
    return {"name": name, "correct": correct, "n": n, "accuracy": share, "low": low, "high": high, "seconds": 1.5,
            "settings": settings, "stages": []}  # fmt: skip


def evaluated(path: Path, n: int = 40, classes: int = 3, shape: tuple[int, int, int] = (3, 8, 8), right: float = 0.8,
              stand: float = 0.5, **changes: Any) -> Path:  # fmt: skip
    """A finished evaluation of n images, of which some shares are right and stand; `changes` to its results.json."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    correct, standing = round(right * n), round(stand * n)
    fates = ["stands"] * standing + ["broken"] * (correct - standing) + ["wrong"] * (n - correct)
    with open(path / "ledger.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = "index label predicted margin broken_by broken_as distance pgd100 apgd-t rounded image example seal"
        writer.writerow(names.split())
        for i, fate in enumerate(fates):
            label, other = i % classes, (i + 1) % classes
            by = {"stands": "", "wrong": "natural", "broken": ("pgd100", "apgd-t")[i % 2]}[fate]
            margin = -0.4 if fate == "wrong" else 0.3 + 0.7 * i / n
            tried = {"": ("stood", "stood"), "natural": ("", ""), "pgd100": ("broke", ""), "apgd-t": ("stood", "broke")}
            writer.writerow([i, label, other if fate == "wrong" else label, margin, by, other if by else "",
                             EPS if fate == "broken" else "", *tried[by], "", "a", "b", "c"])  # fmt: skip
    broken = [i for i, fate in enumerate(fates) if fate == "broken"]
    original = rng.integers(0, 256, (len(broken), *shape), dtype=np.uint8)
    moved = rng.choice([-EPS, EPS], original.shape)
    x = np.clip(original / 255 + moved, 0, 1).astype(np.float32)
    save_file({"index": np.array(broken, np.int64), "x": x, "original": original}, path / "examples.safetensors")
    pgd = {"pgd100": "torchattack('PGD', eps=8/255, steps=100)", "seed": "0", "standing": f"{correct} after natural"}
    aa = {"apgd-ce": "torchattack('APGD', eps=8/255)", "apgd-t": "torchattack('APGDT', eps=8/255)", "seed": "0"}
    size = max(1, n // classes)
    per_class = [class_row(c, size, round(right * size), c % (size + 1)) for c in range(classes)]
    check = {"name": "zero-gradients", "light": "yellow", "measured": "6 % of the gradients are zero", "meaning": "so"}
    results = {
        "format": 1, "kind": "evaluation", "complete": True, "name": "small", "n": n, "shard": None,
        "spec": {"checkpoint": "small.pth", "model": "a small CNN", "data": "digits()", "attacks": ["nat", "aa"],
                 "eps": EPS, "norm": "linf", "n": n, "seed": 0},
        "weights": {"file": "small.pth", "sha256": "00ff", "fingerprint": "abc"},
        "data": {"name": "digits", "classes": classes, "class_names": None, "shape": list(shape), "fingerprint": "f1"},
        "attacks": [
            row("nat", correct, n), row("pgd100", min(n, standing + 1), n, **pgd), row("aa", standing, n, **aa)],
        "worst_case": row("worst case", standing, n), "eight_bit": row("worst case, 8-bit images", standing, n),
        "per_class": per_class, "worst_classes": {kind: worst_classes(per_class, kind) for kind in KINDS},
        "margins": [{"low": -0.5, "high": 0.1, "n": n, "natural": right, "robust": stand}],
        "curve": {"attack": "PGD(steps=20)", "n": n, "points": [
            {"eps": e / 255, "accuracy": stand, "low": 0.0, "high": 1.0} for e in (0, 4, 8, 16)]},
        "believable": {"light": "yellow", "gap": 1.5, "flags": [check], "examined": [
            {"name": "probabilities", "light": "green", "measured": "logits"}]},
        "provenance": {"versions": {"torch": "2"}, "commit": "c0ffee", "date": "2026-01-01", "command": "robustmail"},
    }  # fmt: skip
    (path / "results.json").write_text(json.dumps(results | changes))
    return path


def trained(path: Path, **changes: Any) -> Path:
    """A training run's folder."""
    path.mkdir(parents=True, exist_ok=True)
    recipe = {"model": "'small_cnn'", "attack.eps": "Stairs({0: 0.05, 5: 0.1})"}
    results = {
        "format": 3, "kind": "evaluation", "complete": True, "name": "quick/3", "n": 359, "shard": None,
        "spec": {"checkpoint": "quick/3/best.safetensors", "model": "small_cnn", "data": "digits()", "attacks": ["nat"],
                 "eps": 0.1, "norm": "l2", "n": 359, "seed": 3},
        "weights": {"file": "quick/3/best.safetensors", "sha256": "00ff", "fingerprint": "abc"},
        "training": {"epoch": 15, "burn_in": 0, "chosen_by": "pgd10", "note": ""},
        "attacks": [row("nat", 300, 359), row("pgd20", 200, 359, pgd20="torchattack('PGDL2', eps=0.1, steps=20)")],
        "worst_case": row("worst case", 200, 359),
        "provenance": {"seed": 3, "data": {"name": "digits", "fingerprint": "f1"}, "recipe": recipe, "text": "R()"},
    }  # fmt: skip
    (path / "results.json").write_text(json.dumps(results | changes))
    return path


@pytest.fixture
def evaluation(tmp_path: Path) -> Folder:
    """Makes the folder of an evaluation, by its name."""
    return lambda folder="small", /, **facts: evaluated(tmp_path / folder, **facts)


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    """Makes the folder of a training run, by its name."""
    return lambda folder="runs/quick/3", /, **changes: trained(tmp_path / folder, **changes)
