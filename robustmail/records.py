"""Records that training and evaluation yield for display and logs: plain numbers and text, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
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
    "CorruptionRow",
    "EpochFinished",
    "RunFinished",
    "Forecast",
    "GrowthCurve",
    "GrowthFit",
    "GrowthPoint",
    "MemoryExceeded",
    "ProgressUpdate",
    "Record",
    "StepFinished",
    "WaitingForFolder",
    "WeightStats",
]


@dataclass(frozen=True)
class RunStarted:
    """A run has started, or continues at (epoch, step).

    parameters: number of the model's parameters.
    frozen: number of those that are not trained.
    steps: training steps per epoch.
    epoch, step: 0-based epoch to go on with, and number of its steps that are done.
    note: a warning for the user, or "".
    """

    name: str
    formula: str
    model: str
    parameters: int
    data: str
    sizes: tuple[int, int, int]
    """numbers of images to train on, to validate on, and to test on"""
    device: str
    epochs: int
    steps: int
    burn_in: int
    epoch: int = 0
    step: int = 0
    note: str = ""
    precision: str = ""
    augmentation: str = ""
    frozen: int = 0


@dataclass(frozen=True)
class Forecast:
    """How long the rest of the run will take, estimated from its first steps."""

    training: float
    """seconds, validation included"""
    evaluation: float
    """seconds, at most"""
    per_step: float
    """seconds"""
    on_cpu: bool


@dataclass(frozen=True)
class WeightStats:
    """Statistics of the example weights of a batch."""

    ess: float
    """effective sample size (sum w)^2 / sum w^2, as a share of the batch, in (0, 1]"""
    top: float
    """share of the weighted loss that is due to the 3 % of the examples with the largest weights, 0 ... 1"""
    right: float | None
    """mean weight of examples whose adversarial image is classified correctly; None if there are none"""
    wrong: float | None
    """mean weight of the other examples; None if there are none"""


@dataclass(frozen=True)
class StepFinished:
    """A training step is done."""

    epoch: int
    """0-based"""
    step: int
    """number of the epoch's steps that are done: 1 after its first"""
    images: int
    """size of the batch, over all processes"""
    lr: float
    loss: float
    """mean(w * weighted + plain)"""
    weighted: float
    """mean of w * weighted"""
    plain: float
    """mean of the objective's plain term"""
    adv: float
    """training accuracy on the adversarial images, 0 ... 1"""
    nat: float | None
    """training accuracy on the natural images: from the logits of the loss, or, at every tenth step, from a pass in
    eval mode after the update; else None"""
    margin: str
    """name of the margin in `histogram`"""
    histogram: tuple[int, ...]
    """numbers of examples by margin, in bins of equal width over `span`"""
    span: tuple[float, float]
    """the range of the histogram's margins"""
    weights: WeightStats | None
    """None without a weighter and during the burn-in"""
    seconds: float

    @property
    def mean_weight(self) -> float:
        """Mean of the weights over the batch: 1 unless they are not normalised; then a factor of the loss's size."""
        if self.weights is None:
            return 1.0
        return self.adv * (self.weights.right or 0.0) + (1 - self.adv) * (self.weights.wrong or 0.0)


@dataclass(frozen=True)
class MemoryExceeded:
    """Memory ran out in a training step, which is begun again with more micro-batches."""

    epoch: int
    """0-based"""
    step: int
    """number of the epoch's steps that are done"""
    images: int
    """in the micro-batch that did not fit, in one process"""
    accumulate: int
    """number of micro-batches of a whole batch from now on"""
    note: str
    """what that changes"""


@dataclass(frozen=True)
class EpochFinished:
    """An epoch and its validation are done."""

    row: dict[str, Any]
    """the row of metrics.csv"""
    best: bool
    """whether this epoch has the best validation accuracy under attack so far"""
    note: str = ""
    """a warning for the user, or empty"""


@dataclass(frozen=True)
class CorruptionRow:
    """Accuracy under one corruption of one severity, with Wilson's 95 % interval; on clean images, severity 0.

    fingerprint: of images and labels.
    """

    corruption: str
    severity: int
    correct: int
    n: int
    accuracy: float
    low: float
    high: float
    fingerprint: str


@dataclass(frozen=True)
class AttackProgress:
    """Progress of an attack: this stage has tried `done` of `n` images; `standing` images are not broken yet."""

    attack: str
    stage: str
    done: int
    n: int
    standing: int


@dataclass(frozen=True)
class ProgressUpdate:
    """Progress of any other work, named by `what`: `done` of `n` images."""

    what: str
    done: int
    n: int


@dataclass(frozen=True)
class AttackResult:
    """Accuracy under one attack: `correct` of `n` images are classified correctly.

    accuracy: correct / n.
    settings: stage -> the attack as text.
    """

    name: str
    correct: int
    n: int
    accuracy: float
    low: float
    """lower end of the 95 % Wilson interval of the accuracy"""
    high: float
    """upper end"""
    seconds: float
    settings: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    """the attacks that it consists of, each a column of the ledger"""


ATTACKED = {
    "name": str, "correct": int, "n": int, "accuracy": float, "low": float, "high": float, "seconds": float,
    "settings?": {"*": str}, "stages?": [str],
}  # fmt: skip
"""The shape of an `AttackResult` in a results.json, for `untrusted.check_shape`"""


@dataclass(frozen=True)
class RunFinished:
    """A run is finished."""

    folder: str
    rows: tuple[AttackResult, ...]
    weights: str
    epoch: int
    """the 0-based epoch whose weights were evaluated"""
    before: bool = False
    """whether it was finished already, so that nothing was done"""
    burn_in: int = 0
    """number of epochs before the first one with example weights"""
    note: str = ""
    """a warning about the weights, or empty"""
    results: Mapping[str, Any] = field(default_factory=dict)
    """content of the run's results.json: worst case, light, and more"""


@dataclass(frozen=True)
class CellStarted:
    """A run of a grid has started, or continues."""

    name: str
    number: int
    """1 for the first"""
    of: int


@dataclass(frozen=True)
class CellFinished:
    """A run of a grid has ended."""

    name: str
    error: str
    """the message of the error that ended it; empty if it succeeded"""
    done: int
    of: int


@dataclass(frozen=True)
class WaitingForFolder:
    """A run of a grid waits until another process, such as one left by a killed command, leaves its folder."""

    folder: str


PLAIN = "plain loop"
"""The contender of a benchmark that all others are compared with"""


@dataclass(frozen=True)
class BenchRow:
    """Timings of one contender in one task, over the repeats."""

    task: str
    who: str
    seconds: list[float]
    """one number per repeat"""
    images_per_second: float
    """median"""
    ratio: float
    """seconds of the plain loop / seconds of this contender, within a repeat: the median; low and high: the extremes"""
    low: float
    high: float
    gflops: float | None
    """useful GFLOP per second: those that the method needs; None if their number depends on the images"""
    share: float | None
    """gflops / those of a matrix product on this machine, in bf16 or fp32, whichever is faster"""


@dataclass(frozen=True)
class BenchReport:
    """Result of a benchmark."""

    settings: dict[str, Any]
    machine: dict[str, float]
    """GFLOP/s of a matrix product, by precision"""
    rows: list[BenchRow]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class EvaluationBenchRow:
    """Seconds of one stage of an evaluation on one network, ours and the reference's."""

    network: str
    stage: str
    n: int
    """images under attack"""
    ours: float
    reference: float
    ours_stand: int
    """images that stand"""
    reference_stand: int

    @property
    def ratio(self) -> float:
        """Our seconds / the reference's."""
        return self.ours / self.reference


@dataclass(frozen=True)
class GrowthPoint:
    """What one size of a curve costs."""

    size: int
    seconds: float
    """of the processor, the least of several repeats"""
    megabytes: float
    """peak memory above that of the process before"""


@dataclass(frozen=True)
class GrowthFit:
    """The exponent of size^exponent, with its 95 % interval."""

    exponent: float
    low: float
    high: float


@dataclass(frozen=True)
class GrowthCurve:
    """Cost by size."""

    what: str
    """the work"""
    by: str
    """what its size counts"""
    points: list[GrowthPoint]
    """by size, ascending"""
    seconds: GrowthFit | None
    """over all sizes: below 1 where a fixed cost is large"""
    seconds_at_last: GrowthFit | None
    """over the last decade of sizes, which tells what comes beyond"""
    megabytes_at_last: GrowthFit | None
    """the same of memory; None where it hardly grows"""

    @property
    def is_steep(self) -> bool:
        """Whether time or memory surely grow faster than the size: the interval of the last decade lies above 1."""
        return any(fit is not None and fit.low > 1 for fit in (self.seconds_at_last, self.megabytes_at_last))


Record = (
    RunStarted | Forecast | StepFinished | MemoryExceeded | EpochFinished | AttackProgress | AttackResult
    | ProgressUpdate | RunFinished | CellStarted | CellFinished | WaitingForFolder
)  # fmt: skip
