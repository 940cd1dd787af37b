"""The tables that plugins declare with `memory`: read before a step, written after its update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from robustmail.functional import one_hot
from robustmail.memory import Memory
from robustmail.runtime.deferred import to_device
from robustmail.runtime.devices import wide
from robustmail.runtime.distributed import gather_batch

__all__ = ["MemoryTables", "Overwritten"]


class Overwritten(NamedTuple):
    """Rows as they were before a write."""

    table: Tensor
    """[rows, ...]"""
    keys: Tensor
    """[K] int64"""
    before: Tensor
    """[K, ...]"""

    def restore(self) -> None:
        """Undo the write."""
        self.table[self.keys] = self.before


class MemoryTables:
    """The tables of a run, on its device.

    declared: what plugins remember, by name.
    labels: [N] int64, of all training images, generated ones behind the others.
    classes: number of classes.
    device: where the tables are.
    """

    def __init__(
        self, declared: Mapping[str, Memory], labels: Iterable[Tensor], classes: int, device: torch.device
    ) -> None:  # fmt: skip
        self.declared = declared
        self.tables: dict[str, Tensor] = {}
        if not declared:
            return
        y = torch.cat([part.cpu() for part in labels])
        labels_of_rows = {"example": y, "class": torch.arange(classes), "run": torch.zeros(1, dtype=torch.int64)}
        for name, memory in declared.items():
            self.tables[name] = memory.first_rows(labels_of_rows[memory.per], classes).to(device)

    def rows(self, index: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The rows of a batch's examples, {name: [B, ...]}; index: [B] of the training set, on the host; y: [B]."""
        return {name: self.tables[name][self._keys(memory, index, y)] for name, memory in self.declared.items()}

    def write(self, index: Tensor, y: Tensor, rows: Mapping[str, Tensor]) -> list[Overwritten]:
        """Commit what a step has remembered; returns what it has overwritten.

        index, y: [B], of the whole batch. rows: {name: [b, ...]}, of this process; call it inside `shard_batch`. A row
        of several examples takes their mean, whatever their order and process.
        """
        return [self._write(name, index, y, gather_batch(rows[name])) for name in sorted(rows)]

    def _write(self, name: str, index: Tensor, y: Tensor, new: Tensor) -> Overwritten:
        memory, table = self.declared[name], self.tables[name]
        new = wide(new)
        if memory.per == "example":
            keys, total, count = _sum_by_example(index, new)
        else:  # all keys, so that the host need not know which classes the batch has
            keys = torch.arange(len(table), device=table.device)
            # A sum over one-hot rows has one order of its terms on a GPU, too; index_add has not.
            share = wide(one_hot(self._keys(memory, index, y), len(keys)).T)
            total, count = share @ new.reshape(len(new), -1), share.sum(1)
        count = count.view(-1, *[1] * (table.ndim - 1))
        mean = total.view(len(keys), *table.shape[1:]) / count.clamp(min=1)
        before = table[keys]
        decay = 0.0 if memory.per == "example" else memory.decay  # an example's row is mixed already
        after = (decay * wide(before) + (1 - decay) * mean).to(table.dtype)
        table[keys] = torch.where(count > 0, after, before)
        return Overwritten(table, keys, before)

    def _keys(self, memory: Memory, index: Tensor, y: Tensor) -> Tensor:
        """The row of each example, [B], on the device of the tables."""
        device = next(iter(self.tables.values())).device
        if memory.per == "example":
            return to_device(device, index)
        return y if memory.per == "class" else torch.zeros(len(index), dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """The tables by name."""
        return dict(self.tables)

    def load_state_dict(self, tables: Mapping[str, Tensor], in_burn_in: bool) -> None:
        """Go on from saved tables. Raises ValueError: other names or shapes.

        in_burn_in: the margin has not been asked yet, and that of a run which shares the burn-in is another; so tables
        may be missing, which then begin, and those of the other margin are left out.
        """
        if in_burn_in:
            tables = {name: table for name, table in tables.items() if name in self.tables}
        elif tables.keys() != self.tables.keys():
            raise ValueError(f"memory of {sorted(tables)}, expected {sorted(self.tables)}")
        for name, table in tables.items():
            if not isinstance(table, Tensor) or table.shape != self.tables[name].shape:
                raise ValueError(f"memory {name} has another shape")
            self.tables[name].copy_(table)


def _sum_by_example(index: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(examples [K], the sums of their rows [K, ...], how often each is there [K]), on the device of the rows.

    index: [B], on the host. new: [B, ...]. Rows are added in rounds, in each of which an example occurs once, as in
    nearly every batch: so the order of the terms is one on a GPU, too, and the cost that of the rows.
    """
    keys, place, count = torch.unique(index, return_inverse=True, return_counts=True)
    order = torch.argsort(place, stable=True)
    number = torch.arange(len(index)) - (count.cumsum(0) - count)[place[order]]  # of its occurrences, from 0
    total = torch.zeros(len(keys), *new.shape[1:], dtype=new.dtype, device=new.device)
    for round_ in range(int(count.max())):
        rows = order[number == round_]
        total[to_device(new.device, place[rows])] += new[to_device(new.device, rows)]
    return to_device(new.device, keys), total, to_device(new.device, count)
