"""The tables of the MAIL paper: which recipe is which row, what the paper reports, and a scale for two CPU cores.

Numbers: Wang et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training", NeurIPS 2021
(arXiv 2106.07904), Tables 1 to 3: accuracy in % on CIFAR-10, mean and standard deviation over five trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["METRICS", "SCALES", "TABLES", "Line", "PaperTable", "Scale", "related_methods", "table_at"]

METRICS = {"NAT": "nat", "PGD": "pgd100", "APGD": "apgd", "CW": "cw", "AA": "aa"}
"""Columns of the paper and the attacks that they are here."""


@dataclass(frozen=True)
class Line:
    """One row of a table of the paper."""

    name: str
    """as the paper calls it"""
    row: str
    """the row of our grid: one row may stand in two tables"""
    recipe: str
    paper: tuple[tuple[float, float], ...] = ()
    """(mean, std) in %, in the order of the table's columns; empty for a method that the paper does not have"""
    overrides: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Scale:
    """How big a table is made: what is changed in its recipes, by recipe, and for all."""

    title: str
    seeds: int
    common: tuple[str, ...] = ()
    recipes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    narrow: bool = False
    """whether a table on another network than ResNet-18 has no meaning here"""
    metrics: Mapping[str, str] = field(default_factory=lambda: METRICS)
    """the columns that are measured, and the attacks that they are"""
    further: Mapping[int, tuple[Line, ...]] = field(default_factory=dict)
    """rows below those of the paper, by table"""


FULL = ("NAT", "PGD", "APGD", "CW", "AA")
LPS = "the weights are GAIRAT's, from its count of correct iterates (margin=kappa; the first crossing is margin=lps)"
MART = "our reading of the paper: beta is 5 in the baseline and 6 in MAIL-MART"
AWP = "the paper does not say which AWP it ran"

TABLES = {
    1: PaperTable(
        "LPS against probabilistic margins, ResNet-18", ("NAT", "PGD", "AA"),
        (
            Line("AT, LPS", "GAIRAT", "gairat", ((82.26, 0.60), (54.14, 0.15), (36.32, 0.57)), note=LPS),
            Line("AT, PM_nat", "MAIL-AT PM_nat", "mail_at", ((82.50, 0.20), (55.00, 0.32), (44.25, 0.45)),
                 ("margin=pm_nat",)),
            Line("AT, PM_adv", "MAIL-AT", "mail_at", ((83.15, 0.46), (55.25, 0.23), (44.10, 0.21))),
            Line("MART, LPS", "GAIR-MART", "gair_mart", ((84.45, 0.17), (53.16, 0.26), (46.00, 0.26)), note=LPS),
            Line("MART, PM_nat", "MAIL-MART PM_nat", "mail_mart", ((83.75, 0.09), (53.63, 0.21), (46.70, 0.10)),
                 ("margin=pm_nat",)),
            Line("MART, PM_adv", "MAIL-MART", "mail_mart", ((84.12, 0.46), (53.65, 0.23), (47.20, 0.21))),
            Line("TRADES, LPS", "GAIR-TRADES", "gair_trades", ((78.52, 0.20), (51.67, 0.54), (44.40, 0.20)), note=LPS),
            Line("TRADES, PM_nat", "MAIL-TRADES PM_nat", "mail_trades",
                 ((82.71, 0.52), (52.37, 0.65), (49.52, 0.11)), ("margin=pm_nat",)),
            Line("TRADES, PM_adv", "MAIL-TRADES", "mail_trades", ((80.49, 0.18), (53.67, 0.14), (50.60, 0.22))),
        ),
    ),
    2: PaperTable(
        "methods on ResNet-18", FULL,
        (
            Line("AT", "AT", "at", ((84.86, 0.17), (48.91, 0.14), (47.70, 0.06), (51.61, 0.15), (44.90, 0.53))),
            Line("TRADES", "TRADES", "trades",
                 ((84.00, 0.23), (52.66, 0.16), (52.37, 0.24), (52.30, 0.06), (48.10, 0.26))),
            Line("MART", "MART", "mart",
                 ((82.28, 0.14), (53.50, 0.46), (52.73, 0.57), (51.59, 0.16), (48.40, 0.14)), note=MART),
            Line("FAT", "FAT", "fat", ((87.97, 0.15), (46.78, 0.12), (46.68, 0.16), (49.92, 0.26), (43.90, 0.82))),
            Line("AWP", "AWP", "awp",
                 ((85.17, 0.40), (52.63, 0.17), (50.40, 0.26), (51.39, 0.18), (47.00, 0.25)), note=AWP),
            Line("GAIRAT", "GAIRAT", "gairat",
                 ((83.22, 0.06), (54.81, 0.15), (50.95, 0.49), (39.86, 0.08), (33.35, 0.57))),
            Line("MAIL-AT", "MAIL-AT", "mail_at",
                 ((84.52, 0.46), (55.25, 0.23), (53.20, 0.38), (48.88, 0.11), (44.22, 0.21))),
            Line("MAIL-TRADES", "MAIL-TRADES", "mail_trades",
                 ((81.84, 0.18), (53.68, 0.14), (52.92, 0.62), (52.89, 0.31), (50.60, 0.22))),
        ),
    ),
    3: PaperTable(
        "methods on WRN-32-10", FULL,
        (
            Line("AT", "AT WRN", "at:wrn",
                 ((87.80, 0.13), (49.43, 0.29), (49.12, 0.26), (53.38, 0.05), (48.46, 0.46))),
            Line("TRADES", "TRADES WRN", "trades:wrn",
                 ((86.36, 0.52), (54.88, 0.39), (55.02, 0.27), (56.18, 0.16), (53.40, 0.37))),
            Line("MART", "MART WRN", "mart:wrn",
                 ((84.76, 0.34), (55.61, 0.51), (55.40, 0.37), (54.72, 0.20), (51.40, 0.05)), note=MART),
            Line("FAT", "FAT WRN", "fat:wrn",
                 ((89.70, 0.17), (48.79, 0.18), (48.72, 0.36), (52.39, 0.89), (47.48, 0.30))),
            Line("AWP", "TRADES-AWP WRN", "trades_awp:wrn",
                 ((57.55, 0.23), (54.17, 0.10), (54.20, 0.16), (55.18, 0.30), (53.08, 0.17)),
                 note=f"{AWP}, and its NAT is almost surely a misprint; TRADES-AWP here, as its PGD and AA suggest"),
            Line("GAIRAT", "GAIRAT WRN", "gairat:wrn",
                 ((86.30, 0.61), (58.74, 0.46), (55.64, 0.36), (45.57, 0.18), (40.30, 0.16))),
            Line("MAIL-AT", "MAIL-AT WRN", "mail_at:wrn",
                 ((84.83, 0.39), (58.86, 0.25), (55.82, 0.31), (51.26, 0.20), (47.10, 0.22))),
            Line("MAIL-TRADES", "MAIL-TRADES WRN", "mail_trades:wrn",
                 ((84.00, 0.15), (57.40, 0.96), (56.96, 0.19), (56.20, 0.30), (53.90, 0.22))),
        ),
    ),
}  # fmt: skip

# The attacks are our own PGD throughout, with a trace, so that a method and its reweighted kin share their burn-in.
PGD = "attack=PGD(eps=8/255, alpha=2/255, steps=10)"
KL = "attack=PGD(eps=8/255, alpha=2/255, steps=10, loss='kl', start='gaussian')"


def _small_recipes(burn_in: int, patience: str) -> dict[str, tuple[str, ...]]:
    """What the small scales change, by recipe; burn_in: where the learning rate first drops; patience: of FAT."""
    later = f"burn_in={burn_in}"
    return {
        "at": (PGD,), "mart": (PGD,), "awp": (PGD,), "vir_at": (PGD,), "mail_at": (PGD, later),
        "mail_mart": (PGD, later), "gairat": (later,), "gair_mart": (later,), "gair_trades": (later,),
        "fat": (f"attack.patience={patience}",),
        "trades": (KL,), "weat": (KL,), "arow": (KL,), "mail_trades": (KL, later),
    }  # fmt: skip


MINI = Scale(
    "5,000 training images, ResNet-18 at an eighth of its width, 12 epochs",
    seeds=3,
    common=(
        "data=subset(cifar10(validation=500), train=5500)", "model=cifar_resnet18_w8", "epochs=12", "batch=64",
        "optimizer.lr=Stairs({0: 0.02, 9: 0.002, 11: 0.0002})", "test_size=80",
    ),
    recipes=_small_recipes(burn_in=9, patience="Stairs({0: 0, 6: 1, 11: 2})"),  # of 12 epochs, as 74 of 100
    narrow=True,
)  # fmt: skip

MIDI = Scale(
    "10,000 training images, ResNet-18 at an eighth of its width, 20 epochs",
    seeds=3,
    common=(
        "data=subset(cifar10(validation=500), train=10500)", "model=cifar_resnet18_w8", "epochs=20", "batch=128",
        "optimizer.lr=Stairs({0: 0.04, 15: 0.004, 18: 0.0004})", "test_size=1000",
        "evaluate=('nat', 'pgd100', 'cw', 'apgd-t')",
        "select=last",  # the best epoch by validation lies in the burn-in for many runs of mini, before any weight
    ),
    recipes=_small_recipes(burn_in=15, patience="Stairs({0: 0, 10: 1, 18: 2})"),
    narrow=True,
    metrics={"NAT": "nat", "PGD": "pgd100", "CW": "cw", "AA": "apgd-t"},
    further={2: (Line("VIR-AT", "VIR-AT", "vir_at"), Line("WEAT", "WEAT", "weat"), Line("ARoW", "ARoW", "arow"))},
)  # fmt: skip

SCALES = {"paper": Scale("as in the paper", seeds=5), "midi": MIDI, "mini": MINI}


def table_at(number: int, scale: Scale) -> PaperTable:
    """Table `number` of the paper at a scale: the columns that are measured there, and the scale's further rows."""
    table = TABLES[number]
    kept = [k for k, column in enumerate(table.columns) if column in scale.metrics]
    lines = [replace(line, paper=tuple(line.paper[k] for k in kept)) for line in table.lines]
    columns = tuple(table.columns[k] for k in kept)
    return PaperTable(table.title, columns, (*lines, *scale.further.get(number, ())))


def related_methods(table: PaperTable, scale: Scale) -> list[PaperTable]:
    """The tables that have a row in common with this one, itself included: their runs live in one folder."""
    rows = {line.row for line in table.lines}
    every = [table_at(number, scale) for number in TABLES]
    return [other for other in every if rows & {line.row for line in other.lines}]
