"""The paper's figures with other data in them, as plain numbers; `robustmail.report.figures` draws them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from robustmail.attacks.lm_pgd import LMPGD
from robustmail.attacks.pgd import PGD
from robustmail.data.dataset import Split, data_fingerprint
from robustmail.data.testsets import TestSet
from robustmail.errors import RecipeError
from robustmail.evaluation.attack_specs import AttackSpec as Attempted
from robustmail.evaluation.attack_specs import attack_spec, check_eps
from robustmail.evaluation.evaluator import batch_sizer, clean_pass, evaluate_attack, image_batch, run_attack
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.fields import describe
from robustmail.functional import ce, gap
from robustmail.margin_lab.attack_paths import AttackPath, PathSpec, run_paths
from robustmail.margin_lab.measure import paired_auroc
from robustmail.margin_lab.results import Figure
from robustmail.margin_lab.statistics import critical_among
from robustmail.norms import Norm
from robustmail.records import AttackProgress, AttackResult, ProgressUpdate
from robustmail.runtime.files import atomic_write_json
from robustmail.runtime.provenance import provenance
from robustmail.text import plural

__all__ = ["FIGURES", "FigureInputs", "compute_figure", "save_figure"]

LONG = 50  # iterations of Fig. 1a
SHORT = 10  # of the training attack
SHOWN = 8  # images of Fig. 2
UNDER = ("pgd100", "cw")  # the attacks of Fig. 1c
FORMAT = 1

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FigureData:
    """What a figure shows, its caption, and the attacks that ran for it; is there anything to draw?"""

    values: dict[str, Any]
    said: str
    attacks: dict[str, str]
    drawable: bool = True


FigureProgress = Generator[AttackProgress | AttackResult | ProgressUpdate, None, FigureData]


@dataclass(frozen=True)
class FigureInputs:
    """Whose picture is drawn: models (one, but for 1c), images, a budget, and the seed of the noise.

    Raises RecipeError for a budget of nothing.
    """

    subjects: Sequence[LoadedModel]
    data: TestSet
    eps: float
    norm: Norm = "linf"
    seed: int = 0
    batch: int | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)

    @property
    def part(self) -> Split:
        """The images."""
        return self.data.part

    @property
    def pgd(self) -> PGD:
        """The training attack."""
        return PGD(eps=self.eps, alpha=self.eps / 4, steps=SHORT, norm=self.norm)

    def lm_pgd(self, which: str, steps: int = SHORT) -> LMPGD:
        """LM-PGD for a figure. Raises RecipeError in another norm than l-inf."""
        if self.norm != "linf":
            raise RecipeError(f"figure {which}", f"needs LM-PGD, which is not defined in {self.norm}",
                              "Pass --norm linf.")  # fmt: skip
        return LMPGD(eps=self.eps, alpha=self.eps / 4, steps=steps)

    def walked(self, name: str, attack: Any, part: Split | None = None) -> Generator[ProgressUpdate, None, AttackPath]:
        """The path of an attack with every image."""
        model = self.subjects[0].model
        for record in run_paths(
            model, part or self.part, PathSpec(name, attack, self.seed), batch_sizer(model, self.batch)
        ):
            if isinstance(record, AttackPath):
                return record
            yield record
        raise AssertionError("a walk ends with its path")

    def judged(self, x: torch.Tensor | None = None, part: Split | None = None) -> tuple[Values, Values]:
        """(PM, cross-entropy) of some images in place of the set's, [N] each, in exact float32."""
        model, part = self.subjects[0].model, part or self.part
        margins, losses = [], []
        with exact_inference(model) as view, torch.no_grad():
            for start in range(0, len(part.y), 500):
                seen, y = image_batch(model, Split(part.x if x is None else x, part.y), slice(start, start + 500))
                logits = view(seen)
                margins.append(gap(logits.softmax(1), y).cpu().numpy())
                losses.append(ce(logits, y).cpu().numpy())
        return np.concatenate(margins), np.concatenate(losses)


def compute_figure(
    which: str, sitter: FigureInputs
) -> Iterator[AttackProgress | AttackResult | ProgressUpdate | Figure]:
    """Compute one of the paper's figures; the last thing yielded is what is to be drawn.

    1a: an image that PGD-50 never breaks and LM-PGD does. 1b: LPS and PM of the critical images and of all others.
    1c: accuracy of several models under PGD-100 and CW. 2: PM along the paths of images of one LPS. 4: PM by LPS.
    """
    make = FIGURES[which]
    drawn = yield from make(sitter)
    data = {"data": sitter.data.name, "data_given": sitter.data.given, "fingerprint": data_fingerprint(sitter.part)}
    yield Figure(
        which, " and ".join(subject.name for subject in sitter.subjects), len(sitter.part.y),
        {**data, "models": [{**subject.spec, **subject.weights} for subject in sitter.subjects],
         "eps": sitter.eps, "norm": sitter.norm, "seed": sitter.seed},
        drawn.attacks, drawn.values, drawn.said, drawn.drawable,
        {k: v for k, v in provenance(sitter.subjects[0].device).items() if k != "date"},
    )  # fmt: skip


def _stalls(sitter: FigureInputs) -> FigureProgress:
    """1a: steps, counts; of one image: pixels, perturbation, losses [K + 1] and first wrong iterate of each attack."""
    slow, fast = replace(sitter.pgd, steps=LONG), sitter.lm_pgd("1a", LONG)
    pgd = yield from sitter.walked(f"PGD-{LONG}", slow)
    lm = yield from sitter.walked(f"LM-PGD-{LONG}", fast)
    right = sitter.judged()[0] > 0
    first = {name: _fell_at(path) for name, path in {"pgd": pgd, "lm": lm}.items()}
    stalls, through = right & (first["pgd"] > LONG), first["lm"] <= LONG
    found = stalls & through & lm.broken.numpy()
    other = right & pgd.broken.numpy() & (first["lm"] > LONG)
    values: dict[str, Any] = {"steps": LONG, "right": int(right.sum()), "stalls": int(stalls.sum()),
                              "found": int(found.sum()), "reverse": int(other.sum())}  # fmt: skip
    said = (
        f"Right as they are: {values['right']:,} of {plural(len(right), 'image')}; never made wrong by PGD-{LONG}: "
        f"{values['stalls']:,}; of these made wrong by LM-PGD-{LONG}: {values['found']:,}; the other way round: "
        f"{values['reverse']:,}."
    )
    attacks = {f"PGD-{LONG}": describe(slow), f"LM-PGD-{LONG}": describe(fast)}
    if not found.any():
        return FigureData(values, said, attacks, drawable=False)
    at = int(np.where(found, first["lm"], LONG + 1).argmin())
    x, _ = image_batch(sitter.subjects[0].model, sitter.part, slice(at, at + 1))
    values |= {
        "index": at, "label": int(sitter.part.y[at]), "image": x[0].cpu().tolist(),
        "perturbation": (lm.x_adv[at] - x[0].cpu()).tolist(),
    }  # fmt: skip
    for name, path in {"pgd": pgd, "lm": lm}.items():
        end = sitter.judged(path.x_adv)[1][at]
        seen = -path.trace.p_true[:, at].clamp(min=1e-30).log()
        values |= {f"loss_{name}": [*map(float, seen), float(end)], f"wrong_{name}": int(first[name][at])}
    return FigureData(values, said, attacks)


def _critical(sitter: FigureInputs) -> FigureProgress:
    """1b: lps, pm (PM_adv), critical: a value per image each; steps."""
    strong, cw = sitter.lm_pgd("1b"), attack_spec("cw", sitter.eps, sitter.subjects[0].classes, sitter.norm)
    pgd = yield from sitter.walked("PGD", sitter.pgd)
    lm = yield from sitter.walked("LM-PGD", strong)
    ledger = yield from _tried(sitter, cw)
    broken = ~ledger.stands.numpy() | lm.broken.numpy()
    critical, steps = critical_among(ledger.right.numpy(), pgd.broken.numpy(), broken), _lps(pgd)
    values = {"steps": SHORT, "lps": steps.tolist(), "pm": paired_auroc(sitter.judged(pgd.x_adv)[0]),
              "critical": critical.tolist()}  # fmt: skip
    highest = int((steps[critical] == SHORT).sum())
    said = (
        f"{plural(int(critical.sum()), 'critical image')} of {len(critical):,}: right at the end of PGD-{SHORT}, "
        f"wrong under LM-PGD or CW. LPS gives its largest value to {highest:,} of them."
    )
    return FigureData(values, said, {"PGD": describe(sitter.pgd), "LM-PGD": describe(strong), **cw.settings})


def _tried(sitter: FigureInputs, what: Attempted) -> Generator[AttackProgress, None, Ledger]:
    """What an attack does to every image that is right."""
    model = sitter.subjects[0].model
    room = batch_sizer(model, sitter.batch)
    ledger = clean_pass(model, sitter.part, room)
    yield from run_attack(model, sitter.part, ledger, what, sitter.seed, room, keep_examples=False)
    return ledger


def _accuracies(sitter: FigureInputs) -> FigureProgress:
    """1c: rows, {place, model, attack, accuracy, low, high, correct} each."""
    rows: list[dict[str, Any]] = []
    attacks: dict[str, str] = {}
    for place, subject in enumerate(sitter.subjects):
        for attack in UNDER:
            what = attack_spec(attack, sitter.eps, subject.classes, sitter.norm)
            attacks |= what.settings
            for record in evaluate_attack(subject.model, sitter.part, what, sitter.seed):
                yield record
                if isinstance(record, AttackResult):
                    some = {k: v for k, v in asdict(record).items() if k in ("accuracy", "low", "high", "correct")}
                    rows.append({"place": place, "model": subject.name, "attack": attack, **some})
    said = f"Accuracy on {plural(len(sitter.part.y), 'image')} under PGD-100 and CW, with 95 % Wilson intervals."
    return FigureData({"rows": rows}, said, attacks)


def _along(sitter: FigureInputs) -> FigureProgress:
    """2: steps, lps (the one shown), images: indices, pm: [image][iterate], same: how many images have this LPS."""
    pgd = yield from sitter.walked("PGD", sitter.pgd)
    steps = _lps(pgd)
    counts = np.bincount(steps, minlength=SHORT + 1)[1:SHORT]
    if not counts.any():
        said = f"No image has an LPS between 1 and {SHORT - 1}."
        return FigureData({"steps": SHORT}, said, {"PGD": describe(sitter.pgd)}, drawable=False)
    shown = 1 + int(counts.argmax())
    same = np.flatnonzero(steps == shown)
    ends = sitter.judged(pgd.x_adv)[0][same]
    order = same[np.argsort(ends, kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))]
    part = Split(sitter.part.x[chosen], sitter.part.y[chosen])
    # The start of an image is its own, so that k steps end where the first k of ten did; no step ends at the start.
    walks = [replace(sitter.pgd, alpha=0.0, steps=1), *(replace(sitter.pgd, steps=k) for k in range(1, SHORT + 1))]
    columns = []
    for attack in walks:
        path = yield from sitter.walked("PM along the path", attack, part)
        columns.append(sitter.judged(path.x_adv, part)[0])
    values = {"steps": SHORT, "lps": shown, "same": len(same), "images": chosen.tolist(),
              "pm": [paired_auroc(row) for row in np.stack(columns, 1)],
              "spread": [float(ends.min()), float(ends.max())]}  # fmt: skip
    said = (
        f"LPS {shown}: {len(same):,} of {plural(len(steps), 'image')}. At the end of the same PGD-{SHORT} their PM "
        f"goes from {ends.min():.2f} to {ends.max():.2f}. Shown: {len(chosen)}."
    )
    prefixes = {f"PGD, {plural(k, 'step')}": describe(attack) for k, attack in enumerate(walks)}
    return FigureData(values, said, {"PGD": describe(sitter.pgd), **prefixes})


def _by_lps(sitter: FigureInputs) -> FigureProgress:
    """4: lps, pm_nat, pm_adv: a value per image each; steps."""
    pgd = yield from sitter.walked("PGD", sitter.pgd)
    steps, nat, adv = _lps(pgd), sitter.judged()[0], sitter.judged(pgd.x_adv)[0]
    values = {"steps": SHORT, "lps": steps.tolist(), "pm_nat": paired_auroc(nat), "pm_adv": paired_auroc(adv)}
    said = f"PM of {plural(len(steps), 'image')} by their LPS under PGD-{SHORT}; box: quartiles, line: 5 to 95 %."
    return FigureData(values, said, {"PGD": describe(sitter.pgd)})


FIGURES: dict[str, Callable[[FigureInputs], FigureProgress]] = {
    "1a": _stalls, "1b": _critical, "1c": _accuracies, "2": _along, "4": _by_lps,
}  # fmt: skip


def save_figure(found: Figure, folder: File) -> File:
    """Write figure-WHICH.json, the same bytes for the same figure."""
    path = folder / f"figure-{found.which}.json"
    atomic_write_json(path, {"format": FORMAT, **asdict(found)})
    return path


def _lps(path: AttackPath) -> npt.NDArray[np.int64]:
    """[N]: LPS of every image."""
    found: npt.NDArray[np.int64] = path.trace.first_wrong.numpy()
    return found


def _fell_at(path: AttackPath) -> npt.NDArray[np.int64]:
    """[N]: the first iterate that is misclassified, the end included; one more than the steps where there is none."""
    steps = _lps(path)
    at_end = (steps == len(path.trace.correct)) & ~path.broken.numpy()
    found: npt.NDArray[np.int64] = steps + at_end
    return found
