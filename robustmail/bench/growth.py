"""Measures each curve in a process of its own, and fits how it grows: seconds ~ size^exponent.

Sizes are measured in ascending order, so the peak memory of the process is that of the size just done. Seconds are of
the processor, of one thread, so that a busy machine changes them little; of several repeats the least counts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from robustmail.bench.growing_work import BATCH, CURVES, Work, training_step
from robustmail.records import GrowthCurve, GrowthFit, GrowthPoint
from robustmail.runtime.distributed import process_group

__all__ = ["fit", "measure_growth"]

FORKS = multiprocessing.get_context("forkserver")
PROCESSES = (1, 2, 4)
STEPS = 20  # of training, timed together, where several processes work
ENOUGH, REPEATS = 1.0, 5  # seconds, after which a size is not repeated; and at most so often
SEEN = 8.0  # MB: less memory is not told from the allocator's habits


def measure_growth(
    longest: float = 1.0, only: Sequence[str] = (), progress: Callable[[str], object] = lambda _: None
) -> Iterator[GrowthCurve]:
    """Measure every curve; yields each when it is done.

    longest: leave out sizes above this share of a curve's largest, in (0, 1]. only: names of curves; by default all.
    progress: called with the name of each curve before it is measured.
    """
    FORKS.set_forkserver_preload(["robustmail.bench.growing_work"])
    for number, curve in enumerate(CURVES):
        if only and curve.name not in only:
            continue
        progress(curve.name)
        sizes = [size for size in curve.sizes if size <= longest * curve.sizes[-1]]
        with ProcessPoolExecutor(1, mp_context=FORKS) as process:
            points = process.submit(_measure, number, sizes).result()
        yield _curve(curve.what, curve.by, points)
    if not only or "training step by processes" in only:
        progress("training step by processes")
        yield _curve("training step", "processes", [_in_processes(n) for n in PROCESSES if n <= max(2, longest * 4)])


def fit(sizes: Sequence[float], values: Sequence[float]) -> GrowthFit | None:
    """Fit log value = exponent log size + constant; None for fewer than three points.

    The interval is Student's at 95 %, of the residuals.
    """
    if len(sizes) < 3:
        return None
    from scipy.stats import linregress, t

    line = linregress([math.log(size) for size in sizes], [math.log(value) for value in values])
    half = float(t.ppf(0.975, len(sizes) - 2)) * float(line.stderr)
    return GrowthFit(float(line.slope), float(line.slope) - half, float(line.slope) + half)


def _curve(what: str, by: str, points: list[GrowthPoint]) -> GrowthCurve:
    """The points with their fits: seconds over all sizes and over the last decade, memory where it is seen."""
    last = [point for point in points if point.size >= 0.099 * points[-1].size]
    seen = [point for point in last if point.megabytes >= SEEN]
    seconds, at_last = (fit([p.size for p in part], [p.seconds for p in part]) for part in (points, last))
    return GrowthCurve(what, by, points, seconds, at_last, fit([p.size for p in seen], [p.megabytes for p in seen]))


def _measure(number: int, sizes: Sequence[int]) -> list[GrowthPoint]:
    """The points of one curve, in a process that has measured nothing before."""
    torch.set_num_threads(1)
    make = CURVES[number].make
    make(sizes[0])()  # imports, and what is made once
    before, points = _peak_megabytes(), []
    for size in sizes:
        seconds = _least_seconds(make(size))
        points.append(GrowthPoint(size, seconds, _peak_megabytes() - before))
    return points


def _least_seconds(work: Work) -> float:
    """Processor seconds of one turn, the least of several."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


def _peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _in_processes(n: int) -> GrowthPoint:
    """A training step shared by n processes: processor seconds of all of them together, and their memory."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes = [FORKS.Pipe(duplex=False) for _ in range(n)]
    peers = [FORKS.Process(target=_peer, args=(rank, n, store.port, there)) for rank, (_, there) in enumerate(pipes)]
    for peer in peers:
        peer.start()
    spent = [here.recv() for here, _ in pipes]
    for peer in peers:
        peer.join()
    return GrowthPoint(n, sum(seconds for seconds, _ in spent), sum(megabytes for _, megabytes in spent))


def _peer(rank: int, n: int, port: int, report: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), RANK=str(rank),
        LOCAL_RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    with process_group("cpu"):
        work = training_step(10 * BATCH)
        work()
        before = _peak_megabytes()
        begun = time.process_time()
        for _ in range(STEPS):
            work()
        report.send(((time.process_time() - begun) / STEPS, _peak_megabytes() - before))
