"""Any file, any process, the same answer: every layout that people keep weights in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import layouts


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("layouts")
    return folder, layouts.write(folder)


FILES = [*(f"{name}.pth" for name in {**layouts.FLAT, **layouts.NESTED}),
         *(f"{name}.safetensors" for name in layouts.FLAT)]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_logits_of_its_network(name: str, written: tuple[Path, torch.Tensor]) -> None:
    folder, expected = written
    for found in layouts.logits(folder / name):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_process_in_which_sets_have_another_order_gives_the_same_bits(written: tuple[Path, torch.Tensor]) -> None:
    here = list(layouts.digests(written[0]))
    words = [sys.executable, "-m", "tests.checkpoints.layouts", written[0]]
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": other, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines() == here
    assert len(here) == len(FILES)
