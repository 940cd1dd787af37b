"""Grids on a real Slurm of this machine: two nodes of one core each, jobs killed, requeued, and a node drained."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from robustmail.trials.slurm import PATIENCE, QueuedJob, is_queued
from tests.processes import python
from tests.trials.conftest import TINY, hashes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={port0} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Slurm of two nodes without accounting, named by SLURM_CONF."""
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"no Slurm on this machine: {', '.join(absent)} missing (tox -e slurm installs it)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    ports = dict(zip(("port", "port0", "port1"), _free_ports(3), strict=True))
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder, **ports))
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    files = [
        f"--{name}={folder}/munge.{end}"
        for name, end in [
            ("socket", "socket"),
            ("key-file", "key"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        ]
    ]
    started = [
        subprocess.Popen(["munged", "--foreground", "--force", *files]),
        subprocess.Popen(["slurmctld", "-D", "-f", conf]),
        *(subprocess.Popen(["slurmd", "-D", "-N", node, "-f", conf]) for node in ("n0", "n1")),
    ]
    os.environ["SLURM_CONF"] = str(conf)
    try:
        _until(lambda: _said("sinfo", "-h", "-o", "%T").strip() == "idle", "the nodes are idle")
        yield folder
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        del os.environ["SLURM_CONF"]


@pytest.mark.slow
def test_jobs_killed_and_requeued_and_a_drained_node_leave_the_bits_of_a_local_grid(
    cluster: Path, tmp_path: Path
) -> None:
    grid = ("trials", "at", "mail_at", "--seeds", "0:2", *TINY, "data=digits(validation=30)", "epochs=12")
    here = python("-m", "robustmail", *grid, "--out", "here", "--plain", cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    slurm = (*grid, "--out", "there", "--executor", "slurm", "--jobs", "2", "--plain")
    first = subprocess.Popen(
        [sys.executable, "-m", "robustmail", *slurm],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = tmp_path / "there" / "runs"
    _until(lambda: len(_running()) == 2 and len(list(runs.rglob("state.pt"))) >= 2, "two jobs have saved")
    killed, requeued = _running()
    _kill(killed)
    _said("scontrol", "requeue", requeued)
    _said("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    _until(lambda: requeued in _said("squeue", "-h", "-o", "%i"), "the requeued job waits")
    _said("scontrol", "release", requeued)
    out, err = first.communicate(timeout=500)
    assert first.returncode != 0, "one job was killed"
    assert out.count("its process died") >= 1, out + err
    assert "sacct" not in err
    _said("scontrol", "update", "nodename=n1", "state=resume")
    second = python("-m", "robustmail", *slurm, cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    finished = sorted(path.parent.relative_to(runs) for path in runs.rglob("results.json"))
    assert len(finished) == 4
    for run in finished:
        assert hashes(runs / run) == hashes(tmp_path / "here" / "runs" / run)


def test_a_job_without_a_result_has_ended_only_once_the_queue_has_not_known_it_several_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    answers = iter(["RUNNING", "", "", "RUNNING", "", "", ""])
    asked = SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(**{**vars(asked), "stdout": next(answers)}))
    monkeypatch.setattr("robustmail.trials.slurm.LOOK_EVERY", -1.0)
    paths = SimpleNamespace(result_pickle=tmp_path / "none.pkl", stderr=tmp_path / "log.err")
    job = QueuedJob(SimpleNamespace(job_id="7", paths=paths), nullcontext)
    assert PATIENCE == 3
    assert [job.done() for _ in range(7)] == [False] * 6 + [True]
    with pytest.raises(RuntimeError, match=r"job 7 left Slurm's queue without a result"):
        job.result()


def test_a_queue_that_cannot_be_asked_is_no_sign_that_a_job_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert is_queued("7")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def _kill(job: str) -> None:
    """Kill the Python processes of a job, as the kernel does where memory is short."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"SLURM_JOB_ID={job}".encode() in (process / "environ").read_bytes().split(b"\0")
            if mine and b"submitit" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue  # it has ended


def _running() -> list[str]:
    return _said("squeue", "-h", "-t", "R", "-o", "%i").split()


def _until(holds: Callable[[], bool], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.2)
