"""The ledger: a row per image, with the model's prediction, what each attack did to it, and which broke it first."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from robustmail.errors import RunError
from robustmail.evaluation.stored_images import StoredImages, joined
from robustmail.markup import card, table
from robustmail.text import plural

__all__ = ["BROKE", "RESERVED", "STOOD", "UNTRIED", "Ledger", "read_rows", "row_seal", "rows_as_text", "write_rows"]

UNTRIED, STOOD, BROKE = 0, 1, 2
WORDS = {UNTRIED: "", STOOD: "stood", BROKE: "broke"}
FIRST = ("index", "label", "predicted", "margin", "broken_by", "broken_as", "distance")
LAST = ("rounded", "image", "example", "seal")
SHOWN = 10  # images in a notebook
RESERVED = (*FIRST, *LAST, "natural", "worst case")  # names that an attack cannot have


@dataclass
class Ledger:
    """What is known of each of N images; all tensors are [N], on the CPU.

    index: place in the data set.
    label: the true class.
    predicted: class predicted for the clean image.
    margin: p_y - max_{j != y} p_j of the clean image, in [-1, 1].
    stages: by the name of each stage that was run, [N] int8: UNTRIED, STOOD or BROKE.
    broken_by: the stage that broke the image first; "natural" if it is misclassified without an attack, "" while it
    stands.
    broken_as: class predicted for that stage's example; -1 without one.
    distance: of that example from the image, in pixels of [0, 1]; NaN without one.
    rounded: [N] int8: BROKE if the example, rounded to 8 bits, still breaks the image; UNTRIED without one.
    examples: position in the ledger -> adversarial image [C, H, W] float32.
    seconds: by stage, and "natural" for the clean pass.
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
    examples: dict[int, Tensor] | StoredImages = field(default_factory=dict)
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

    def _repr_html_(self) -> str:
        counts = Counter(self.broken_by)
        whole = f"{counts['']:,} stand, {counts['natural']:,} are wrong as they are"
        stages: list[list[object]] = [
            [stage, *(f"{int((outcome == code).sum()):,}" for code in (STOOD, BROKE)), f"{counts[stage]:,}"]
            for stage, outcome in self.stages.items()
        ]
        rows = zip(*(c[:SHOWN].tolist() for c in (self.index, self.label, self.predicted, self.margin)), strict=True)
        images: list[list[object]] = [
            [index, label, predicted, f"{margin:+.3f}", by or "–"]
            for (index, label, predicted, margin), by in zip(rows, self.broken_by, strict=False)
        ]
        return card(
            f"Ledger of {plural(len(self), 'image')}: {whole}",
            table("", ["attack", "stood", "broke", "broke first"], stages),
            table("", ["index", "label", "predicted", "margin", "broken by"], images),
            *([f"... and {len(self) - SHOWN:,} more"] if len(self) > SHOWN else []),
        )

    @property
    def right(self) -> Tensor:
        """[N] bool: whether the clean image is classified correctly."""
        return self.predicted == self.label

    @property
    def stands(self) -> Tensor:
        """[N] bool: whether the image is classified correctly and no stage that was run broke it."""
        return torch.tensor([by == "" for by in self.broken_by], dtype=torch.bool)

    def standing(self, stages: Iterable[str]) -> Tensor:
        """[N] bool: whether the image is classified correctly and none of these stages broke it."""
        mask = self.right.clone()
        for stage in stages:
            mask &= self.outcome(stage) != BROKE
        return mask

    def outcome(self, stage: str) -> Tensor:
        """[N] int8: what a stage did to each image, UNTRIED, STOOD or BROKE."""
        if stage not in self.stages:
            self.stages[stage] = torch.full((len(self),), UNTRIED, dtype=torch.int8)
        return self.stages[stage]

    def enter(
        self,
        stage: str,
        tried: Tensor,
        is_broken: Tensor,
        predicted: Tensor,
        distance: Tensor,
        x_adv: Tensor | None,
    ) -> None:
        """Enter what a stage did to some images; all of it or, if a signal arrives meanwhile, nothing.

        stage: its name.
        tried: [T], positions of the images in the ledger.
        is_broken: [T] bool.
        predicted: [T], classes of the adversarial images.
        distance: [T], of these from the clean images.
        x_adv: [T, C, H, W], the adversarial images; None to keep none.
        """
        outcome = self.outcome(stage).clone()
        outcome[tried] = torch.where(is_broken, BROKE, STOOD).to(torch.int8)
        broken_by, examples = [*self.broken_by], dict[int, Tensor]()
        broken_as, distances = self.broken_as.clone(), self.distance.clone()
        for k in is_broken.nonzero().flatten().tolist():
            i = int(tried[k])
            if broken_by[i]:
                continue
            broken_by[i], broken_as[i], distances[i] = stage, predicted[k], distance[k]
            if x_adv is not None:
                examples[i] = x_adv[k]
        # One call into C: a signal can arrive before or after it, but not within.
        self.__dict__.update(
            stages={**self.stages, stage: outcome},
            broken_by=broken_by,
            broken_as=broken_as,
            distance=distances,
            examples=self.examples | examples,
        )

    def unattacked(self) -> Ledger:
        """A new ledger of the same images, on which no stage was run."""
        return Ledger(self.index, self.label, self.predicted, self.margin)

    def take_over(self, smaller: Ledger) -> bool:
        """Enter what broke the same images in a smaller ball, with its examples: they lie in the larger ball too.

        smaller: of the same model and data, run with the same attacks. Returns whether it held anything new.
        """
        position = {index: i for i, index in enumerate(self.index.tolist())}
        pairs = [(position[index], k) for k, index in enumerate(smaller.index.tolist()) if index in position]
        here, there = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        is_new = False
        for stage, outcome in smaller.stages.items():
            broken = here[outcome[there] == BROKE]
            is_new |= bool((self.outcome(stage)[broken] != BROKE).any())
            self.outcome(stage)[broken] = BROKE
        found = {i: k for i, k in pairs if smaller.broken_by[k] and not self.broken_by[i]}
        for i, k in found.items():
            self.broken_by[i], self.broken_as[i] = smaller.broken_by[k], smaller.broken_as[k]
            self.distance[i] = smaller.distance[k]
        self.examples = joined(
            self.examples, {i: k for i, k in found.items() if k in smaller.examples}, smaller.examples
        )
        return is_new

    def take(self, positions: Tensor) -> Ledger:
        """A new ledger of the rows at `positions`, [M]."""
        where = positions.tolist()
        return Ledger(
            self.index[positions], self.label[positions], self.predicted[positions], self.margin[positions],
            {stage: outcome[positions] for stage, outcome in self.stages.items()},
            [self.broken_by[i] for i in where], self.broken_as[positions], self.distance[positions],
            self.rounded[positions],
            {k: self.examples[i] for k, i in enumerate(where) if i in self.examples}, dict(self.seconds),
        )  # fmt: skip


def concatenate(parts: list[Ledger]) -> Ledger:
    """One ledger of the rows of several, sorted by index."""
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
    """The text of ledger.csv.

    ledger: the rows. images: hashes of the clean images, [N]. examples: hashes of the adversarial images, by position.
    context: what the seal of each row covers besides the row.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST, *ledger.stages, *LAST])
    words = [[WORDS[code] for code in codes.tolist()] for codes in (*ledger.stages.values(), ledger.rounded)]
    columns = (ledger.index, ledger.label, ledger.predicted, ledger.margin, ledger.broken_as, ledger.distance)
    for i, (index, label, predicted, margin, broken_as, distance) in enumerate(
        zip(*map(Tensor.tolist, columns), strict=True)
    ):
        by, example = ledger.broken_by[i], examples.get(i, "")
        row = [
            index, label, predicted, f"{margin:.9g}", by, broken_as if by else "", f"{distance:.9g}" if example else "",
            *(column[i] for column in words), images[i], example,
        ]  # fmt: skip
        writer.writerow([*row, row_seal(row, context)])
    return text.getvalue()


def row_seal(row: Iterable[Any], context: str) -> str:
    """A hash of a row and its context. It betrays a change; it does not prove who wrote the row."""
    return hashlib.blake2b("|".join([*map(str, row), context]).encode(), digest_size=8).hexdigest()


def rows_as_text(rows: list[dict[str, str]]) -> str:
    """The text of ledger.csv of rows as `read_rows` returns them, byte for byte as `write_rows` writes it."""
    return "".join(f"{','.join(cells)}\n" for cells in (rows[0], *(row.values() for row in rows)))


def read_rows(who: str, text: str) -> tuple[Ledger, list[dict[str, str]]]:
    """(the ledger without examples, its rows as text) of a text of ledger.csv.

    who: the file, for errors. text: its content. Raises RunError, naming the row: it cannot be read.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise RunError(who, f"cannot be read ({error})") from error
    header = text.partition("\n")[0].split(",")
    if not rows or tuple(header[: len(FIRST)]) != FIRST or tuple(header[-len(LAST) :]) != LAST:
        raise RunError(who, "is no ledger, or an empty one")
    stages = header[len(FIRST) : -len(LAST)]
    codes = {word: code for code, word in WORDS.items()}
    columns: dict[str, list[Any]] = {name: [] for name in (*FIRST, *stages, "rounded")}
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
