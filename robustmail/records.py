"""What training and evaluation tell the world: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "PLAIN",
    "BenchReport",
    "BenchRow",
    "ATTACKED",
    "AttackResult",
    "AttackProgress",
    "RunStarted",
    "CellStarted",
    "CellFinished",
    "EpochFinished",
    "RunFinished",
    "Forecast",
    "ProgressUpdate",
    "Record",
    "StepFinished",
    "WaitingForFolder",
    "WeightStats",
]


@dataclass(frozen=True)
class RunStarted:
    """A run begins, or goes on at (epoch, step)."""

    name: str
    formula: str
    model: str
    parameters: int
    data: str
    sizes: tuple[int, int, int]
    """images to train on, to validate on, to test on"""
    device: str
    epochs: int
    steps: int
    burn_in: int
    epoch: int = 0
    step: int = 0
    note: str = ""
    precision: str = ""


@dataclass(frozen=True)
class Forecast:
    """How long the rest will take, measured on the first steps."""

    training: float
    """seconds, validation included"""
    evaluation: float
    """seconds, at most"""
    per_step: float
    on_cpu: bool


@dataclass(frozen=True)
class WeightStats:
    """What the weights do to a batch."""

    ess: float
    """effective sample size (sum w)^2 / sum w^2, as a share of the batch"""
    top: float
    """share of the weighted loss that the heaviest 3 % of the examples carry"""
    right: float | None
    """mean weight of examples whose adversarial image is classified correctly; None if there are none"""
    wrong: float | None
    """mean weight of the others"""


@dataclass(frozen=True)
class StepFinished:
    """One training step."""

    epoch: int
    step: int
    """1 after the first step of the epoch"""
    images: int
    lr: float
    loss: float
    weighted: float
    plain: float
    adv: float
    """training accuracy on the adversarial images, 0 ... 1"""
    nat: float | None
    """the same on the natural images, where they were looked at: by the loss, or at every tenth step in eval mode after
    the update"""
    margin: str
    histogram: tuple[int, ...]
    span: tuple[float, float]
    weights: WeightStats | None
    seconds: float


@dataclass(frozen=True)
class EpochFinished:
    """One epoch with its validation: a row of metrics.csv."""

    row: dict[str, Any]
    best: bool
    note: str = ""
    """what should be known of it"""


@dataclass(frozen=True)
class AttackProgress:
    """An evaluation under way: `done` of `n` images tried by this stage, `standing` not broken yet."""

    attack: str
    stage: str
    done: int
    n: int
    standing: int


@dataclass(frozen=True)
class ProgressUpdate:
    """Something else under way: `done` of `n` images."""

    what: str
    done: int
    n: int


@dataclass(frozen=True)
class AttackResult:
    """The verdict of one attack over the test set."""

    name: str
    correct: int
    n: int
    accuracy: float
    low: float
    """lower end of the 95 % Wilson interval"""
    high: float
    seconds: float
    settings: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    """what it consists of: columns of the ledger"""


ATTACKED = {
    "name": str, "correct": int, "n": int, "accuracy": float, "low": float, "high": float, "seconds": float,
    "settings?": {"*": str}, "stages?": [str],
}  # fmt: skip
"""`AttackResult` as it stands in a results.json, for `untrusted.check_shape`"""


@dataclass(frozen=True)
class RunFinished:
    """The run is over."""

    folder: str
    rows: tuple[AttackResult, ...]
    weights: str
    epoch: int
    """the 0-based epoch whose weights were evaluated"""
    before: bool = False
    """it had been finished before, and nothing was done"""
    burn_in: int = 0
    """how many epochs came before the first in which examples had weights"""
    note: str = ""
    """what should be known of the weights"""


@dataclass(frozen=True)
class CellStarted:
    """A grid of runs goes on with one of them."""

    name: str
    number: int
    """1 for the first"""
    of: int


@dataclass(frozen=True)
class CellFinished:
    """One run of a grid is over, well or not."""

    name: str
    error: str
    """the line that says why it failed; empty where it did not"""
    done: int
    of: int


@dataclass(frozen=True)
class WaitingForFolder:
    """A run of a grid waits for a process, say one that a killed command left behind, that works in its folder."""

    folder: str


PLAIN = "plain loop"
"""the contender of a benchmark that all others are compared with"""


@dataclass(frozen=True)
class BenchRow:
    """One contender in one task, over the repeats."""

    task: str
    who: str
    seconds: list[float]
    images_per_second: float
    """median"""
    ratio: float
    """of the plain loop's seconds to its own within a repeat: median, lowest and highest"""
    low: float
    high: float
    gflops: float | None
    """useful ones a second: what the method needs, whatever is done besides; None where that depends on the images"""
    share: float | None
    """of what the machine's matrix product does in bf16, or fp32 where that is faster"""


@dataclass(frozen=True)
class BenchReport:
    """What was measured, and where."""

    settings: dict[str, Any]
    machine: dict[str, float]
    """GFLOP/s of a matrix product"""
    rows: list[BenchRow]
    provenance: dict[str, Any]


Record = (
    RunStarted | Forecast | StepFinished | EpochFinished | AttackProgress | AttackResult | ProgressUpdate | RunFinished
    | CellStarted | CellFinished | WaitingForFolder
)  # fmt: skip
