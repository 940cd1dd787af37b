"""Jobs in Slurm's queue, where accounting may be off and a job may vanish without a result."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["QueuedJob", "is_queued"]

LOOK_EVERY = 5.0  # seconds between two questions to the queue
PATIENCE = 3  # looks in a row without the job: its result may reach a network disk after the queue has forgotten it


@dataclass
class QueuedJob:
    """A submitted job that has ended once it has a result, or once the queue does not know it any more.

    submitit asks `sacct`, which knows nothing on a cluster without accounting; a killed job would be awaited for ever.
    job: submitit's. quietly: inside it, what submitit writes to stderr goes to a file.
    """

    job: Any
    quietly: Callable[[], AbstractContextManager[None]]
    looked: float = 0.0
    missed: int = 0

    def done(self) -> bool:
        """Whether the job has a result, or will have none."""
        if Path(self.job.paths.result_pickle).exists():
            return not is_queued(self.job.job_id)  # stopped to be requeued: a later start writes another result
        if time.monotonic() - self.looked > LOOK_EVERY:
            self.looked = time.monotonic()
            self.missed = 0 if is_queued(self.job.job_id) else self.missed + 1
        return self.missed >= PATIENCE

    def result(self) -> Any:
        """What the job returned. Raises RuntimeError: it left the queue without a result."""
        if not Path(self.job.paths.result_pickle).exists():
            raise RuntimeError(
                f"job {self.job.job_id} left Slurm's queue without a result, see {self.job.paths.stderr}"
            )
        with self.quietly():
            return self.job.result()

    def cancel(self) -> None:
        """Take the job out of the queue."""
        self.job.cancel()


def is_queued(job_id: str) -> bool:
    """Whether Slurm's queue holds the job, waiting or running; True while the queue cannot be asked."""
    try:
        asked = subprocess.run(["squeue", "-h", "-o", "%T", "-j", job_id], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    return asked.stdout.strip() not in ("", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
