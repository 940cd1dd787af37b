"""What the trackers' own files hold, read back: {name of a scalar: [(step, value), ...]} in the order of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

Scalars = dict[str, list[tuple[int, float]]]

BLOCK, HEAD = 32768, 7  # of a W&B file: LevelDB's log format, after seven bytes of its own


def of_tensorboard(folder: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def of_wandb(folder: Path) -> Scalars:
    found: Scalars = {}
    for row in wandb_history(folder):
        for name, value in row.items():
            if isinstance(value, (int, float)):
                found.setdefault(name, []).append((row["_step"], value))
    return found


def wandb_history(folder: Path) -> Iterator[dict]:
    """The rows that offline runs have logged; the Python library writes these files, and only its other half reads."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted((folder / "wandb" / "wandb").glob("offline-run-*/*.wandb")):
        for content in _log_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                yield {**row, "_step": row.get("_step", record.history.step.num)}


def _log_records(content: bytes) -> Iterator[bytes]:
    at, whole = HEAD, b""
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:  # the rest of a block is empty
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def of_mlflow(folder: Path) -> Scalars:
    client, run = mlflow_run(folder)
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }


def mlflow_run(folder: Path):
    """(client, the only run) of the database."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return client, run


def of_trackio(folder: Path) -> Scalars:
    found: Scalars = {}
    for row in trackio_rows():
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                found.setdefault(name, []).append((row["step"], value))
    return found


def trackio_rows() -> list[dict]:
    """The rows of the only run in the folder of this process."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_run_records("robustmail")
    return SQLiteStorage.get_logs("robustmail", run["name"])
