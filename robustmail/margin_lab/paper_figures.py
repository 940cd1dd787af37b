"""Compute the data of the paper's figures for another model and other images; `robustmail.report.figures` draws it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from robustmail.attacks.lm_pgd import LMPGD
from robustmail.attacks.pgd import PGD
from robustmail.data.dataset import Split
from robustmail.data.image_files import data_fingerprint
from robustmail.data.testsets import TestSet
from robustmail.errors import RecipeError
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, check_eps
from robustmail.evaluation.evaluator import batch_sizer, clean_pass, evaluate_attacks, image_batch, run_attack
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.fields import describe
from robustmail.functional import ce, gap
from robustmail.margin_lab.attack_paths import AttackPath, PathSpec, run_path
from robustmail.margin_lab.measure import json_floats
from robustmail.margin_lab.results import Figure
from robustmail.margin_lab.statistics import critical_among
from robustmail.norms import Norm
from robustmail.records import AttackProgress, AttackResult, ProgressUpdate
from robustmail.runtime.files import atomic_write_json
from robustmail.runtime.provenance import provenance
from robustmail.text import plural

__all__ = ["FIGURES", "FigureInputs", "compute_figure", "save_figure"]

LONG_STEPS = 50  # of the attacks of Fig. 1a
STEPS = 10  # of the training attack
N_SHOWN = 8  # images of Fig. 2
FIG_1C_ATTACKS = ("pgd100", "cw")
BATCH = 500
FORMAT = 2

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FigureData:
    """What a figure shows, its caption, the settings of the attacks that ran, and whether there is anything to draw."""

    values: dict[str, Any]
    caption: str
    attacks: dict[str, str]
    drawable: bool = True


FigureProgress = Generator[AttackProgress | AttackResult | ProgressUpdate, None, FigureData]


@dataclass(frozen=True)
class FigureInputs:
    """What a figure is computed from.

    subjects: models; several only for Fig. 1c.
    data: images.
    eps: radius of the ball, above 0, in pixels of [0, 1].
    norm: "linf" or "l2".
    seed: of the attacks' noise.
    batch: images under attack at once; changes no number.

    Raises RecipeError: eps not positive.
    """

    subjects: Sequence[LoadedModel]
    data: TestSet
    eps: float
    norm: Norm = "linf"
    seed: int = 0
    batch: int | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)

    @cached_property
    def part(self) -> Split:
        """The images with their labels."""
        return self.data.part.loaded()

    @property
    def pgd(self) -> PGD:
        """The training attack."""
        return PGD(eps=self.eps, alpha=self.eps / 4, steps=STEPS, norm=self.norm)

    def lm_pgd(self, which: str, steps: int = STEPS, search: Literal["best", "first"] = "best") -> LMPGD:
        """Build LM-PGD for a figure. Raises RecipeError in another norm than l-inf."""
        if self.norm != "linf":
            raise RecipeError(
                f"figure {which}", f"needs LM-PGD, which is not defined in {self.norm}", "Pass --norm linf."
            )
        return LMPGD(eps=self.eps, alpha=self.eps / 4, steps=steps, search=search)

    def attack_path(
        self, name: str, attack: Any, part: Split | None = None
    ) -> Generator[ProgressUpdate, None, AttackPath]:
        """Attack every image of `part`, by default all images, with a trace; yields progress, returns the path."""
        model = self.subjects[0].model
        spec = PathSpec(name, attack, self.seed)
        for record in run_path(model, part or self.part, spec, batch_sizer(model, self.part, self.batch)):
            if isinstance(record, AttackPath):
                return record
            yield record
        raise AssertionError("run_path ends with a path")

    def pm_and_loss(self, x: torch.Tensor | None = None, part: Split | None = None) -> tuple[Floats, Floats]:
        """Compute (PM, cross-entropy), [N] each, in exact float32.

        x: replaces the images of `part`, [N, C, H, W].
        part: by default all images.
        """
        model, part = self.subjects[0].model, part or self.part
        split = part if x is None else Split(x, part.y)
        margins, losses = [], []
        with exact_inference(model) as view, torch.no_grad():
            for start in range(0, len(part.y), BATCH):
                images, y = image_batch(model, split, slice(start, start + BATCH))
                logits = view(images)
                margins.append(gap(logits.softmax(1), y).cpu().numpy())
                losses.append(ce(logits, y).cpu().numpy())
        return np.concatenate(margins), np.concatenate(losses)


def compute_figure(
    which: str, inputs: FigureInputs
) -> Iterator[AttackProgress | AttackResult | ProgressUpdate | Figure]:
    """Compute one of the paper's figures; yields progress, then the figure.

    1a: an image that PGD-50 never breaks and LM-PGD-50 does.
    1b: LPS and PM of the critical images and of all others.
    1c: accuracy of several models under PGD-100 and CW.
    2: PM along the attack paths of images with the same LPS.
    4: PM by LPS.

    Raises RecipeError: the figure needs LM-PGD, and the norm is not l-inf.
    """
    data = yield from FIGURES[which](inputs)
    spec = {
        "data": inputs.data.name,
        "data_given": inputs.data.given,
        "fingerprint": data_fingerprint(inputs.part),
        "models": [{**subject.spec, **subject.weights} for subject in inputs.subjects],
        "eps": inputs.eps,
        "norm": inputs.norm,
        "seed": inputs.seed,
    }
    yield Figure(
        which=which,
        name=" and ".join(subject.name for subject in inputs.subjects),
        n=len(inputs.part.y),
        spec=spec,
        settings=data.attacks,
        values=data.values,
        caption=data.caption,
        drawable=data.drawable,
        provenance={k: v for k, v in provenance(inputs.subjects[0].device).items() if k != "date"},
    )


def _pgd_stalls(inputs: FigureInputs) -> FigureProgress:
    """1a: steps; right, stalls, broken_by_lm, reverse: numbers of images; and of the image shown: index, label, image,
    perturbation, and by attack the loss at every iterate, [K + 1], and the first misclassified iterate."""
    pgd, lm_pgd = replace(inputs.pgd, steps=LONG_STEPS), inputs.lm_pgd("1a", LONG_STEPS, "first")
    names = {"pgd": f"PGD-{LONG_STEPS}", "lm": f"LM-PGD-{LONG_STEPS}"}
    pgd_path = yield from inputs.attack_path(names["pgd"], pgd)
    lm_path = yield from inputs.attack_path(names["lm"], lm_pgd)
    paths = {"pgd": pgd_path, "lm": lm_path}
    correct = inputs.pm_and_loss()[0] > 0
    first = {name: _first_wrong(path) for name, path in paths.items()}
    stalls = correct & (first["pgd"] > LONG_STEPS)
    broken_by_lm = stalls & (first["lm"] <= LONG_STEPS) & lm_path.broken.numpy()
    reverse = correct & pgd_path.broken.numpy() & (first["lm"] > LONG_STEPS)
    values: dict[str, Any] = {
        "steps": LONG_STEPS,
        "right": int(correct.sum()),
        "stalls": int(stalls.sum()),
        "broken_by_lm": int(broken_by_lm.sum()),
        "reverse": int(reverse.sum()),
    }
    caption = (
        f"Of {plural(len(correct), 'image')}, {values['right']:,} are correct without an attack. {names['pgd']} never "
        f"breaks {values['stalls']:,} of these; {names['lm']} breaks {values['broken_by_lm']:,} of those. "
        f"The other way round: {values['reverse']:,}."
    )
    attacks = {names["pgd"]: describe(pgd), names["lm"]: describe(lm_pgd)}
    if not broken_by_lm.any():
        return FigureData(values, caption, attacks, drawable=False)
    index = int(np.where(broken_by_lm, first["lm"], LONG_STEPS + 1).argmin())
    x, _ = image_batch(inputs.subjects[0].model, inputs.part, slice(index, index + 1))
    values |= {
        "index": index,
        "label": int(inputs.part.y[index]),
        "class_name": inputs.data.class_name(int(inputs.part.y[index])),
        "image": x[0].cpu().tolist(),
        "perturbation": (lm_path.x_adv[index] - x[0].cpu()).tolist(),
    }
    for name, path in paths.items():
        last_loss = inputs.pm_and_loss(path.x_adv)[1][index]
        losses = -path.trace.p_true[:, index].clamp(min=1e-30).log()
        values |= {f"loss_{name}": [*map(float, losses), float(last_loss)], f"wrong_{name}": int(first[name][index])}
    return FigureData(values, caption, attacks)


def _critical_images(inputs: FigureInputs) -> FigureProgress:
    """1b: steps; lps, pm (PM_adv), critical: a value per image each."""
    lm_pgd = inputs.lm_pgd("1b")
    cw = attack_spec("cw", inputs.eps, inputs.subjects[0].classes, inputs.norm)
    path = yield from inputs.attack_path("PGD", inputs.pgd)
    lm_path = yield from inputs.attack_path("LM-PGD", lm_pgd)
    ledger = yield from _attack_ledger(inputs, cw)
    broken = ~ledger.stands.numpy() | lm_path.broken.numpy()
    critical, lps = critical_among(ledger.right.numpy(), path.broken.numpy(), broken), _lps(path)
    values = {
        "steps": STEPS,
        "lps": lps.tolist(),
        "pm": json_floats(inputs.pm_and_loss(path.x_adv)[0]),
        "critical": critical.tolist(),
    }
    n_highest = int((lps[critical] == STEPS).sum())
    caption = (
        f"{plural(int(critical.sum()), 'critical image')} of {len(critical):,}: correct at the end of PGD-{STEPS}, "
        f"broken by LM-PGD or CW. LPS gives its largest value to {n_highest:,} of them."
    )
    return FigureData(values, caption, {"PGD": describe(inputs.pgd), "LM-PGD": describe(lm_pgd), **cw.settings})


def _attack_ledger(inputs: FigureInputs, attack: AttackSpec) -> Generator[AttackProgress, None, Ledger]:
    """Run an attack on every correct image; returns the outcome of each."""
    model = inputs.subjects[0].model
    sizer = batch_sizer(model, inputs.part, inputs.batch)
    ledger = clean_pass(model, inputs.part, sizer)
    yield from run_attack(model, inputs.part, ledger, attack, inputs.seed, sizer, keep_examples=False)
    return ledger


def _accuracies(inputs: FigureInputs) -> FigureProgress:
    """1c: rows of {place, model, attack, accuracy, low, high, correct}; place: index of the model."""
    rows: list[dict[str, Any]] = []
    settings: dict[str, str] = {}
    for place, subject in enumerate(inputs.subjects):
        specs = [attack_spec(name, inputs.eps, subject.classes, inputs.norm) for name in FIG_1C_ATTACKS]
        for spec in specs:
            settings |= spec.settings
        for record in evaluate_attacks(subject.model, inputs.part, specs, inputs.seed):
            yield record
            if isinstance(record, AttackResult):
                numbers = {k: v for k, v in asdict(record).items() if k in ("accuracy", "low", "high", "correct")}
                rows.append({"place": place, "model": subject.name, "attack": record.name, **numbers})
    caption = f"Accuracy on {plural(len(inputs.part.y), 'image')} under PGD-100 and CW, with 95 % Wilson intervals."
    return FigureData({"rows": rows}, caption, settings)


def _pm_along_paths(inputs: FigureInputs) -> FigureProgress:
    """2: steps; lps: that of the images shown; same: number of images with this LPS; images: indices of those shown;
    pm: [image][iterate]; spread: smallest and largest PM at the end."""
    path = yield from inputs.attack_path("PGD", inputs.pgd)
    lps = _lps(path)
    counts = np.bincount(lps, minlength=STEPS + 1)[1:STEPS]
    if not counts.any():
        caption = f"No image has an LPS between 1 and {STEPS - 1}."
        return FigureData({"steps": STEPS}, caption, {"PGD": describe(inputs.pgd)}, drawable=False)
    shown_lps = 1 + int(counts.argmax())
    same = np.flatnonzero(lps == shown_lps)
    end_pm = inputs.pm_and_loss(path.x_adv)[0][same]
    by_pm = same[np.argsort(end_pm, kind="stable")]
    chosen = by_pm[np.unique(np.linspace(0, len(by_pm) - 1, min(N_SHOWN, len(by_pm))).round().astype(int))]
    part = inputs.part.take(torch.from_numpy(chosen))
    # An image's random start is its own, so the iterate k of PGD-10 is the end of PGD-k; step size 0 gives the start.
    prefixes = [replace(inputs.pgd, alpha=0.0, steps=1), *(replace(inputs.pgd, steps=k) for k in range(1, STEPS + 1))]
    columns = []
    for attack in prefixes:
        prefix = yield from inputs.attack_path("PM along the path", attack, part)
        columns.append(inputs.pm_and_loss(prefix.x_adv, part)[0])
    values = {
        "steps": STEPS,
        "lps": shown_lps,
        "same": len(same),
        "images": chosen.tolist(),
        "pm": [json_floats(row) for row in np.stack(columns, 1)],
        "spread": [float(end_pm.min()), float(end_pm.max())],
    }
    caption = (
        f"{len(same):,} of {plural(len(lps), 'image')} have LPS {shown_lps}. At the end of PGD-{STEPS} their PM ranges "
        f"from {end_pm.min():.2f} to {end_pm.max():.2f}. Shown: {len(chosen)}."
    )
    settings = {f"PGD, {plural(k, 'step')}": describe(attack) for k, attack in enumerate(prefixes)}
    return FigureData(values, caption, {"PGD": describe(inputs.pgd), **settings})


def _pm_by_lps(inputs: FigureInputs) -> FigureProgress:
    """4: steps; lps, pm_nat, pm_adv: a value per image each."""
    path = yield from inputs.attack_path("PGD", inputs.pgd)
    lps, pm_nat, pm_adv = _lps(path), inputs.pm_and_loss()[0], inputs.pm_and_loss(path.x_adv)[0]
    values = {"steps": STEPS, "lps": lps.tolist(), "pm_nat": json_floats(pm_nat), "pm_adv": json_floats(pm_adv)}
    caption = f"PM of {plural(len(lps), 'image')} by their LPS under PGD-{STEPS}; box: quartiles, line: 5 to 95 %."
    return FigureData(values, caption, {"PGD": describe(inputs.pgd)})


FIGURES: dict[str, Callable[[FigureInputs], FigureProgress]] = {
    "1a": _pgd_stalls,
    "1b": _critical_images,
    "1c": _accuracies,
    "2": _pm_along_paths,
    "4": _pm_by_lps,
}


def save_figure(figure: Figure, folder: Path) -> Path:
    """Write figure-WHICH.json, the same bytes for the same figure; returns its path."""
    path = folder / f"figure-{figure.which}.json"
    atomic_write_json(path, {"format": FORMAT, **asdict(figure)})
    return path


def _lps(path: AttackPath) -> npt.NDArray[np.int64]:
    """LPS of every image, [N]."""
    lps: npt.NDArray[np.int64] = path.trace.first_wrong.numpy()
    return lps


def _first_wrong(path: AttackPath) -> npt.NDArray[np.int64]:
    """The first misclassified iterate, [N], the end included; steps + 1 where there is none."""
    lps = _lps(path)
    never_wrong = (lps == len(path.trace.correct)) & ~path.broken.numpy()
    first: npt.NDArray[np.int64] = lps + never_wrong
    return first
