"""The numbers hold on lesser processors, too: oneDNN and torch are told to leave out what this one has more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LESSER = {  # the instructions that oneDNN may use, those that torch may, and does a processor have more than that?
    "AVX2": ("avx2", torch.backends.cpu.get_cpu_capability() == "AVX512"),
    "AVX512_CORE": ("avx512", torch.cpu._is_avx512_bf16_supported()),
    "AVX512_CORE_BF16": ("avx512", torch.cpu._is_amx_tile_supported()),
}


@pytest.mark.long
@pytest.mark.parametrize("onednn", LESSER)
def test_the_numeric_tests_pass_on_a_lesser_processor(onednn):
    capability, more = LESSER[onednn]
    if not more:
        pytest.skip("this processor has no more, and the tests have run on it already")
    files = [str(path) for path in HERE.rglob("test_*.py") if "pytest.mark.numeric" in path.read_text(encoding="utf-8")]
    words = ["-m", "pytest", "-n", "0", "-m", "numeric", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, *words], cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
