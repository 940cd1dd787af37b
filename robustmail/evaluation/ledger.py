"""One row per image: what the model says of it, and which attack broke it first."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from robustmail.errors import RunError

__all__ = ["BROKE", "RESERVED", "STOOD", "UNTRIED", "Ledger", "read_rows", "row_seal", "rows_as_text", "write_rows"]

UNTRIED, STOOD, BROKE = 0, 1, 2
WORDS = {UNTRIED: "", STOOD: "stood", BROKE: "broke"}
FIXED = ("index", "label", "predicted", "margin", "broken_by", "broken_as", "distance")
LAST = ("rounded", "image", "example", "seal")
RESERVED = (*FIXED, *LAST, "natural", "worst case")  # of which no attack may have the name


@dataclass
class Ledger:
    """What is known of each of N images; all tensors are [N], on the CPU.

    index: place in the data set. margin: p_y - max_{j != y} p_j of the clean image, in [-1, 1]. stages: what each
    attack that was tried did to it. broken_by: the first attack that broke it ("natural" where no attack was needed,
    "" while it stands); broken_as: the class predicted then, or -1; distance: how far that example lies, in pixels
    of [0, 1]. rounded: whether it is still broken when the example is rounded to 8 bits.
    """

    index: Tensor
    label: Tensor
    predicted: Tensor
    margin: Tensor
    stages: dict[str, Tensor] = field(default_factory=dict)
    broken_by: list[str] = field(default_factory=list)
    broken_as: Tensor = field(default_factory=lambda: torch.empty(0))
    distance: Tensor = field(default_factory=lambda: torch.empty(0))
    rounded: Tensor = field(default_factory=lambda: torch.empty(0))
    """[N] int8: does the example still break the image when it is rounded to 8 bits? UNTRIED where there is none"""
    examples: dict[int, Tensor] = field(default_factory=dict)
    """position -> the adversarial image, [C, H, W] float32"""
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.broken_by:
            self.broken_by = ["" if right else "natural" for right in self.right.tolist()]
            self.broken_as = self.predicted.where(~self.right, -1)
            self.distance = torch.full((len(self),), float("nan"))
        if not len(self.rounded):
            self.rounded = torch.full((len(self),), UNTRIED, dtype=torch.int8)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def right(self) -> Tensor:
        """[N] bool: is the image classified correctly as it is?"""
        return self.predicted == self.label

    @property
    def stands(self) -> Tensor:
        """[N] bool: has nothing that was tried broken it?"""
        return torch.tensor([by == "" for by in self.broken_by], dtype=torch.bool)

    def standing(self, stages: Iterable[str]) -> Tensor:
        """[N] bool: right, and broken by none of these stages."""
        mask = self.right.clone()
        for stage in stages:
            mask &= self.outcome(stage) != BROKE
        return mask

    def outcome(self, stage: str) -> Tensor:
        """[N] int8: UNTRIED, STOOD or BROKE."""
        if stage not in self.stages:
            self.stages[stage] = torch.full((len(self),), UNTRIED, dtype=torch.int8)
        return self.stages[stage]

    def enter(self, stage: str, tried: Tensor, broke: Tensor, said: Tensor, far: Tensor, found: Tensor | None) -> None:
        """A stage has tried the images at positions `tried`, [T]: which broke, what the model said, how far, and
        the images themselves (None: not kept)."""
        outcome = self.outcome(stage).clone()
        outcome[tried] = torch.where(broke, BROKE, STOOD).to(torch.int8)
        by, examples = [*self.broken_by], {**self.examples}
        as_, distance = self.broken_as.clone(), self.distance.clone()
        for k in broke.nonzero().flatten().tolist():
            at = int(tried[k])
            if by[at]:
                continue
            by[at], as_[at], distance[at] = stage, said[k], far[k]
            if found is not None:
                examples[at] = found[k]
        # One call into C, before or after which a signal may arrive, not within: no batch is entered by halves.
        self.__dict__.update(
            stages={**self.stages, stage: outcome}, broken_by=by, broken_as=as_, distance=distance, examples=examples
        )

    def take(self, positions: Tensor) -> Ledger:
        """The rows at some positions, as a ledger of their own."""
        where = positions.tolist()
        return Ledger(
            self.index[positions], self.label[positions], self.predicted[positions], self.margin[positions],
            {stage: outcome[positions] for stage, outcome in self.stages.items()},
            [self.broken_by[i] for i in where], self.broken_as[positions], self.distance[positions],
            self.rounded[positions],
            {k: self.examples[i] for k, i in enumerate(where) if i in self.examples}, dict(self.seconds),
        )  # fmt: skip


def concatenate(parts: list[Ledger]) -> Ledger:
    """The rows of several ledgers in the order of their index."""
    stages = list(dict.fromkeys(stage for part in parts for stage in part.stages))
    columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Ledger)
               if f.name in ("index", "label", "predicted", "margin", "broken_as", "distance", "rounded")}  # fmt: skip
    starts = [sum(len(p) for p in parts[:k]) for k in range(len(parts))]
    whole = Ledger(
        **columns, stages={s: torch.cat([p.outcome(s) for p in parts]) for s in stages},
        broken_by=[by for part in parts for by in part.broken_by],
        examples={start + i: x for start, p in zip(starts, parts, strict=True) for i, x in p.examples.items()},
        seconds={s: sum(p.seconds.get(s, 0.0) for p in parts) for s in ("natural", *stages)},
    )  # fmt: skip
    return whole.take(whole.index.argsort())


def write_rows(ledger: Ledger, images: Sequence[str], examples: Mapping[int, str], context: str) -> str:
    """ledger.csv; `images`: the hashes of the clean ones, [N]; `examples`: those of the examples, by position;
    `context`: what every row's seal covers besides the row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIXED, *ledger.stages, *LAST])
    words = [[WORDS[code] for code in codes.tolist()] for codes in (*ledger.stages.values(), ledger.rounded)]
    columns = (ledger.index, ledger.label, ledger.predicted, ledger.margin, ledger.broken_as, ledger.distance)
    for i, (index, label, said, margin, as_, far) in enumerate(zip(*map(Tensor.tolist, columns), strict=True)):
        by, example = ledger.broken_by[i], examples.get(i, "")
        row = [
            index, label, said, f"{margin:.9g}", by, as_ if by else "", f"{far:.9g}" if example else "",
            *(column[i] for column in words), images[i], example,
        ]  # fmt: skip
        writer.writerow([*row, row_seal(row, context)])
    return text.getvalue()


def row_seal(row: Iterable[Any], context: str) -> str:
    """A hash of a row and of what it was found with; it betrays a change, it does not prove who made it."""
    return hashlib.blake2b("|".join([*map(str, row), context]).encode(), digest_size=8).hexdigest()


def rows_as_text(rows: list[dict[str, str]]) -> str:
    """ledger.csv of rows as `read_rows` returns them, byte for byte as robustmail writes it."""
    return "".join(f"{','.join(cells)}\n" for cells in (rows[0], *(row.values() for row in rows)))


def read_rows(who: str, text: str) -> tuple[Ledger, list[dict[str, str]]]:
    """The ledger of a CSV text, without its examples, and its rows as they are written.

    Raises RunError, naming the row, for one that cannot be read.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise RunError(who, f"cannot be read ({error})") from error
    header = text.partition("\n")[0].split(",")
    if not rows or tuple(header[: len(FIXED)]) != FIXED or tuple(header[-len(LAST) :]) != LAST:
        raise RunError(who, "is no ledger, or an empty one")
    stages = header[len(FIXED) : -len(LAST)]
    codes = {word: code for code, word in WORDS.items()}
    columns: dict[str, list[Any]] = {name: [] for name in (*FIXED, *stages, "rounded")}
    for k, row in enumerate(rows):
        try:
            if None in row or None in row.values():
                raise ValueError("another number of columns")
            for name in ("index", "label", "predicted"):
                columns[name].append(_int(row[name]))
            columns["margin"].append(float(row["margin"]))
            columns["broken_by"].append(row["broken_by"])
            columns["broken_as"].append(_int(row["broken_as"] or "-1"))
            columns["distance"].append(float(row["distance"] or "nan"))
            for stage in (*stages, "rounded"):
                columns[stage].append(codes[row[stage]])
        except (ValueError, KeyError) as error:
            raise RunError(f"{who}, row {k + 1} (image {row.get('index')})", f"cannot be read ({error})") from error
    whole = {name: torch.tensor(columns[name], dtype=torch.int64) for name in ("index", "label", "predicted")}
    ledger = Ledger(
        whole["index"], whole["label"], whole["predicted"], torch.tensor(columns["margin"]),
        {stage: torch.tensor(columns[stage], dtype=torch.int8) for stage in stages},
        columns["broken_by"], torch.tensor(columns["broken_as"], dtype=torch.int64), torch.tensor(columns["distance"]),
        torch.tensor(columns["rounded"], dtype=torch.int8),
    )  # fmt: skip
    return ledger, rows


def _int(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**62:
        raise ValueError(f"{text[:20]} is too large")
    return number
