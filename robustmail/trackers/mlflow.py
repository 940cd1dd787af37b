"""MLflow: a database in the run's folder, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from robustmail.trackers.tracker import Opened, Outcome, TrackedRun, Unseen, check_installed

__all__ = ["mlflow"]

FLUSH_EVERY = 1.0  # seconds; a write takes milliseconds, as long as a training step of a fast GPU
MOST = 1000  # metrics in one call


class mlflow:
    """MLflow, in SQLite in the run's folder unless MLFLOW_TRACKING_URI is set; it has no histograms.

    MLFLOW_EXPERIMENT_NAME names the experiment. Steps that a killed run trains again are kept once; of its last second
    they may be missing.
    """

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read when mlflow is imported
        check_installed("mlflow", "mlflow", "sqlalchemy", "alembic")

    def start(self, run: TrackedRun) -> Opened:
        from mlflow.tracking import MlflowClient

        folder = run.folder.resolve()
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{folder / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._metrics: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()
        found = self._found(run.id, None if given else folder) if run.id else None
        self._id = found or self._created(run, None if given else (folder / "artifacts").as_uri())
        self._unseen = Unseen(self._last_steps() if found else None)
        return Opened(self._id, f"see it with: mlflow ui --backend-store-uri {uri}")

    def _found(self, run_id: str, folder: Path | None) -> str | None:
        """The id, if the store has that run; a local one only if its artifacts lie in the folder."""
        from mlflow.exceptions import MlflowException

        try:
            info = self._client.get_run(run_id).info
        except MlflowException:
            return None
        artifacts = Path(url2pathname(urlparse(info.artifact_uri).path))
        if folder is not None and not artifacts.resolve().is_relative_to(folder):  # moved, or made by a stranger
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _created(self, run: TrackedRun, artifacts: str | None) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "robustmail")
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name, artifacts)
        run_id: str = self._client.create_run(where, run_name=run.name).info.run_id
        self._client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in run.config.items()])
        return run_id

    def _last_steps(self) -> dict[str, int]:
        names = self._client.get_run(self._id).data.metrics
        return {name: max(m.step for m in self._client.get_metric_history(self._id, name)) for name in names}

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        named = {re.sub(r"[^\w./ -]", "_", name): value for name, value in scalars.items()}
        now = int(time.time() * 1000)
        self._metrics += [(name, value, now, step) for name, value in self._unseen(named, step).items()]
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        from mlflow.entities import Metric

        while self._metrics:
            batch, self._metrics = self._metrics[:MOST], self._metrics[MOST:]
            self._client.log_batch(self._id, metrics=[Metric(*metric) for metric in batch])
        self._flushed = time.monotonic()

    def histogram(self, name: str, counts: Sequence[int], span: tuple[float, float], step: int) -> None:
        """MLflow has none."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], step: int) -> None:
        self._client.log_dict(self._id, {"columns": list(columns), "data": [list(row) for row in rows]}, f"{name}.json")

    def image(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(path))

    def finish(self, outcome: Outcome) -> None:
        self._flush()
        self._client.set_terminated(
            self._id, {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        )
