"""Python processes with torch imported already: forked off one that did it once, instead of three seconds later each.

They are processes of their own, with a process id, signals, an exit code and pipes, and can be killed. What they run
is what `python -m MODULE`, `python -c CODE` or `python FILE` would run, in a process in which nothing of ours has been.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "timm", "torchattacks", "art.attacks.evasion", "safetensors"])


class Python:
    """What of subprocess.Popen the tests need, for `python WORDS`."""

    def __init__(self, *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        pipes = [FORKS.Pipe(duplex=False) for _ in range(2)]
        given = ([str(word) for word in words], cwd or Path.cwd(), {**os.environ, **(env or {})})
        self._process = FORKS.Process(target=_run, args=(*given, *(there for _, there in pipes)))
        self._process.start()
        for _, there in pipes:
            there.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(here.fileno()), encoding="utf-8") for here, _ in pipes)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; what it said that was not read yet."""
        with ThreadPoolExecutor(2) as pool:
            said = tuple(pool.map(_all, (self.stdout, self.stderr)))
        self._process.join(timeout)
        assert self.returncode is not None, f"still alive after {timeout} s: {said}"
        return said


def _all(stream: TextIO) -> str:
    with stream:
        return stream.read()


class Peers:
    """Processes that find each other as those of torchrun do, at a store that is here."""

    def __init__(self, n: int, *words: str | Path, env: dict[str, str] | None = None) -> None:
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(n),
                  "LOCAL_WORLD_SIZE": str(n), "TORCHELASTIC_USE_AGENT_STORE": "True",
                  "TORCHELASTIC_RESTART_COUNT": "0", **(env or {})}  # fmt: skip
        self.processes = [Python(*words, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]

    @property
    def returncode(self) -> int | None:
        codes = [process.returncode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        said = [process.communicate(timeout) for process in self.processes]
        return "".join(out for out, _ in said), "".join(err for _, err in said)


def python(*words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300):
    """Run it to its end."""
    process = Python(*words, cwd=cwd, env=env)
    said = process.communicate(timeout)
    return subprocess.CompletedProcess([sys.executable, *map(str, words)], process.returncode, *said)


def _run(words: list[str], cwd: Path, env: dict[str, str], out: Connection, err: Connection) -> None:
    for there, number in ((out, 1), (err, 2)):
        os.dup2(there.fileno(), number)
        there.close()
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for seed in (torch.seed, np.random.seed, random.seed):  # as of a process that was not forked: unlike the others'
        seed()
    kind, *rest = words
    if kind in ("-m", "-c"):
        what, *rest = rest
        sys.path.insert(0, str(cwd))
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
