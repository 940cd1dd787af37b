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
        if memory.per == "example":
            keys, place = (to_device(table.device, part) for part in torch.unique(index, return_inverse=True))
        else:  # all keys, so that the host need not know which classes the batch has
            keys, place = torch.arange(len(table), device=table.device), self._keys(memory, index, y)
        # A sum over one-hot rows has one order of its terms on a GPU, too; index_add has not.
        share = wide(one_hot(place, len(keys)).T)
        count = share.sum(1, keepdim=True)
        mean = ((share @ wide(new).reshape(len(new), -1)) / count.clamp(min=1)).view(
            len(keys), *table.shape[1:]
        )  # fmt: skip
        before = table[keys]
        decay = 0.0 if memory.per == "example" else memory.decay  # an example's row is mixed already
        after = (decay * wide(before) + (1 - decay) * mean).to(table.dtype)
        is_met = (count > 0).view(-1, *[1] * (table.ndim - 1))
        table[keys] = torch.where(is_met, after, before)
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
