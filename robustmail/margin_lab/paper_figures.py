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
from robustmail.data.dataset import Part, fingerprint_of
from robustmail.data.testsets import TestSet
from robustmail.errors import RecipeError
from robustmail.evaluation.attack_specs import Plan as Attempted
from robustmail.evaluation.attack_specs import check_eps, plan
from robustmail.evaluation.evaluator import attempt, images, look, room_of, trial
from robustmail.evaluation.exact_inference import exact
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.model_loading import Subject
from robustmail.fields import describe
from robustmail.functional import ce, gap
from robustmail.margin_lab.attack_paths import Path, Plan, walk
from robustmail.margin_lab.measure import exactly
from robustmail.margin_lab.results import Figure
from robustmail.margin_lab.statistics import critical_among
from robustmail.norms import Norm
from robustmail.records import Attacked, Attacking, Measuring
from robustmail.runtime.files import write_json
from robustmail.runtime.provenance import provenance
from robustmail.text import so_many

__all__ = ["FIGURES", "Sitter", "figure", "save"]

LONG = 50  # iterations of Fig. 1a
SHORT = 10  # of the training attack
SHOWN = 8  # images of Fig. 2
UNDER = ("pgd100", "cw")  # the attacks of Fig. 1c
FORMAT = 1

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """What a figure shows, its caption, and the attacks that ran for it; is there anything to draw?"""

    values: dict[str, Any]
    said: str
    attacks: dict[str, str]
    drawable: bool = True


Telling = Generator[Attacking | Attacked | Measuring, None, Drawn]


@dataclass(frozen=True)
class Sitter:
    """Whose picture is drawn: models (one, but for 1c), images, a budget, and the seed of the noise.

    Raises RecipeError for a budget of nothing.
    """

    subjects: Sequence[Subject]
    data: TestSet
    eps: float
    norm: Norm = "linf"
    seed: int = 0
    batch: int | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)

    @property
    def part(self) -> Part:
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

    def walked(self, name: str, attack: Any, part: Part | None = None) -> Generator[Measuring, None, Path]:
        """The path of an attack with every image."""
        model = self.subjects[0].model
        for record in walk(model, part or self.part, Plan(name, attack, self.seed), room_of(model, self.batch)):
            if isinstance(record, Path):
                return record
            yield record
        raise AssertionError("a walk ends with its path")

    def judged(self, x: torch.Tensor | None = None, part: Part | None = None) -> tuple[Values, Values]:
        """(PM, cross-entropy) of some images in place of the set's, [N] each, in exact float32."""
        model, part = self.subjects[0].model, part or self.part
        margins, losses = [], []
        with exact(model) as view, torch.no_grad():
            for start in range(0, len(part.y), 500):
                seen, y = images(model, Part(part.x if x is None else x, part.y), slice(start, start + 500))
                logits = view(seen)
                margins.append(gap(logits.softmax(1), y).cpu().numpy())
                losses.append(ce(logits, y).cpu().numpy())
        return np.concatenate(margins), np.concatenate(losses)


def figure(which: str, sitter: Sitter) -> Iterator[Attacking | Attacked | Measuring | Figure]:
    """Compute one of the paper's figures; the last thing yielded is what is to be drawn.

    1a: an image that PGD-50 never breaks and LM-PGD does. 1b: LPS and PM of the critical images and of all others.
    1c: accuracy of several models under PGD-100 and CW. 2: PM along the paths of images of one LPS. 4: PM by LPS.
    """
    make = FIGURES[which]
    drawn = yield from make(sitter)
    data = {"data": sitter.data.name, "data_given": sitter.data.given, "fingerprint": fingerprint_of(sitter.part)}
    yield Figure(
        which, " and ".join(subject.name for subject in sitter.subjects), len(sitter.part.y),
        {**data, "models": [{**subject.described, **subject.weights} for subject in sitter.subjects],
         "eps": sitter.eps, "norm": sitter.norm, "seed": sitter.seed},
        drawn.attacks, drawn.values, drawn.said, drawn.drawable,
        {k: v for k, v in provenance(sitter.subjects[0].device).items() if k != "date"},
    )  # fmt: skip


def _stalls(sitter: Sitter) -> Telling:
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
        f"Right as they are: {values['right']:,} of {so_many(len(right), 'image')}; never made wrong by PGD-{LONG}: "
        f"{values['stalls']:,}; of these made wrong by LM-PGD-{LONG}: {values['found']:,}; the other way round: "
        f"{values['reverse']:,}."
    )
    attacks = {f"PGD-{LONG}": describe(slow), f"LM-PGD-{LONG}": describe(fast)}
    if not found.any():
        return Drawn(values, said, attacks, drawable=False)
    at = int(np.where(found, first["lm"], LONG + 1).argmin())
    x, _ = images(sitter.subjects[0].model, sitter.part, slice(at, at + 1))
    values |= {
        "index": at, "label": int(sitter.part.y[at]), "image": x[0].cpu().tolist(),
        "perturbation": (lm.x_adv[at] - x[0].cpu()).tolist(),
    }  # fmt: skip
    for name, path in {"pgd": pgd, "lm": lm}.items():
        end = sitter.judged(path.x_adv)[1][at]
        seen = -path.trace.p_true[:, at].clamp(min=1e-30).log()
        values |= {f"loss_{name}": [*map(float, seen), float(end)], f"wrong_{name}": int(first[name][at])}
    return Drawn(values, said, attacks)


def _critical(sitter: Sitter) -> Telling:
    """1b: lps, pm (PM_adv), critical: a value per image each; steps."""
    strong, cw = sitter.lm_pgd("1b"), plan("cw", sitter.eps, sitter.subjects[0].classes, sitter.norm)
    pgd = yield from sitter.walked("PGD", sitter.pgd)
    lm = yield from sitter.walked("LM-PGD", strong)
    ledger = yield from _tried(sitter, cw)
    broken = ~ledger.stands.numpy() | lm.broken.numpy()
    critical, steps = critical_among(ledger.right.numpy(), pgd.broken.numpy(), broken), _lps(pgd)
    values = {"steps": SHORT, "lps": steps.tolist(), "pm": exactly(sitter.judged(pgd.x_adv)[0]),
              "critical": critical.tolist()}  # fmt: skip
    highest = int((steps[critical] == SHORT).sum())
    said = (
        f"{so_many(int(critical.sum()), 'critical image')} of {len(critical):,}: right at the end of PGD-{SHORT}, "
        f"wrong under LM-PGD or CW. LPS gives its largest value to {highest:,} of them."
    )
    return Drawn(values, said, {"PGD": describe(sitter.pgd), "LM-PGD": describe(strong), **cw.settings})


def _tried(sitter: Sitter, what: Attempted) -> Generator[Attacking, None, Ledger]:
    """What an attack does to every image that is right."""
    model = sitter.subjects[0].model
    room = room_of(model, sitter.batch)
    ledger = look(model, sitter.part, room)
    yield from attempt(model, sitter.part, ledger, what, sitter.seed, room, keep=False)
    return ledger


def _accuracies(sitter: Sitter) -> Telling:
    """1c: rows, {place, model, attack, accuracy, low, high, correct} each."""
    rows: list[dict[str, Any]] = []
    attacks: dict[str, str] = {}
    for place, subject in enumerate(sitter.subjects):
        for attack in UNDER:
            what = plan(attack, sitter.eps, subject.classes, sitter.norm)
            attacks |= what.settings
            for record in trial(subject.model, sitter.part, what, sitter.seed):
                yield record
                if isinstance(record, Attacked):
                    some = {k: v for k, v in asdict(record).items() if k in ("accuracy", "low", "high", "correct")}
                    rows.append({"place": place, "model": subject.name, "attack": attack, **some})
    said = f"Accuracy on {so_many(len(sitter.part.y), 'image')} under PGD-100 and CW, with 95 % Wilson intervals."
    return Drawn({"rows": rows}, said, attacks)


def _along(sitter: Sitter) -> Telling:
    """2: steps, lps (the one shown), images: indices, pm: [image][iterate], same: how many images have this LPS."""
    pgd = yield from sitter.walked("PGD", sitter.pgd)
    steps = _lps(pgd)
    counts = np.bincount(steps, minlength=SHORT + 1)[1:SHORT]
    if not counts.any():
        said = f"No image has an LPS between 1 and {SHORT - 1}."
        return Drawn({"steps": SHORT}, said, {"PGD": describe(sitter.pgd)}, drawable=False)
    shown = 1 + int(counts.argmax())
    same = np.flatnonzero(steps == shown)
    ends = sitter.judged(pgd.x_adv)[0][same]
    order = same[np.argsort(ends, kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))]
    part = Part(sitter.part.x[chosen], sitter.part.y[chosen])
    # The start of an image is its own, so that k steps end where the first k of ten did; no step ends at the start.
    walks = [replace(sitter.pgd, alpha=0.0, steps=1), *(replace(sitter.pgd, steps=k) for k in range(1, SHORT + 1))]
    columns = []
    for attack in walks:
        path = yield from sitter.walked("PM along the path", attack, part)
        columns.append(sitter.judged(path.x_adv, part)[0])
    values = {"steps": SHORT, "lps": shown, "same": len(same), "images": chosen.tolist(),
              "pm": [exactly(row) for row in np.stack(columns, 1)],
              "spread": [float(ends.min()), float(ends.max())]}  # fmt: skip
    said = (
        f"LPS {shown}: {len(same):,} of {so_many(len(steps), 'image')}. At the end of the same PGD-{SHORT} their PM "
        f"goes from {ends.min():.2f} to {ends.max():.2f}. Shown: {len(chosen)}."
    )
    prefixes = {f"PGD, {so_many(k, 'step')}": describe(attack) for k, attack in enumerate(walks)}
    return Drawn(values, said, {"PGD": describe(sitter.pgd), **prefixes})


def _by_lps(sitter: Sitter) -> Telling:
    """4: lps, pm_nat, pm_adv: a value per image each; steps."""
    pgd = yield from sitter.walked("PGD", sitter.pgd)
    steps, nat, adv = _lps(pgd), sitter.judged()[0], sitter.judged(pgd.x_adv)[0]
    values = {"steps": SHORT, "lps": steps.tolist(), "pm_nat": exactly(nat), "pm_adv": exactly(adv)}
    said = f"PM of {so_many(len(steps), 'image')} by their LPS under PGD-{SHORT}; box: quartiles, line: 5 to 95 %."
    return Drawn(values, said, {"PGD": describe(sitter.pgd)})


FIGURES: dict[str, Callable[[Sitter], Telling]] = {
    "1a": _stalls, "1b": _critical, "1c": _accuracies, "2": _along, "4": _by_lps,
}  # fmt: skip


def save(found: Figure, folder: File) -> File:
    """Write figure-WHICH.json, the same bytes for the same figure."""
    path = folder / f"figure-{found.which}.json"
    write_json(path, {"format": FORMAT, **asdict(found)})
    return path


def _lps(path: Path) -> npt.NDArray[np.int64]:
    """[N]: LPS of every image."""
    found: npt.NDArray[np.int64] = path.trace.first_wrong.numpy()
    return found


def _fell_at(path: Path) -> npt.NDArray[np.int64]:
    """[N]: the first iterate that is misclassified, the end included; one more than the steps where there is none."""
    steps = _lps(path)
    at_end = (steps == len(path.trace.correct)) & ~path.broken.numpy()
    found: npt.NDArray[np.int64] = steps + at_end
    return found
