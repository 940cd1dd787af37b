"""One process of many: fifty steps in double precision, in which rounding is too small to be amplified into view."""

import json
import sys
from pathlib import Path

import torch

from robustmail.config.loader import load_recipe
from robustmail.config.overrides import apply_overrides
from robustmail.data.dataset import batch_indices
from robustmail.models.classifier import Classifier
from robustmail.models.small import SmallCNN
from robustmail.runtime import distributed
from robustmail.runtime.rng import fork_rng, generator, seed_all
from robustmail.step import Context
from robustmail.train.memory import MemoryTables
from robustmail.train.train_step import train_step


def main() -> None:
    torch.set_num_threads(1)
    to, size, name, *changes = sys.argv[1:]
    recipe = apply_overrides(load_recipe(name), changes)
    with distributed.process_group("cpu"), fork_rng():
        seed_all(0, "data")
        x, y = torch.rand(54, 3, 8, 8, dtype=torch.float64), torch.arange(54) % 10
        seed_all(0, "init")
        model = Classifier(SmallCNN(10, 3, width=8)).double()
        optimizer = recipe.at(0).optimizer(model.parameters())
        memory, losses = MemoryTables(recipe.memory, [y], 10, x.device), []
        for step in range(50):
            indices = batch_indices(54, int(size), generator(step))[0]
            with distributed.shard_batch(len(indices), recipe.accumulate) as rows:
                local = indices[rows]
                context = Context(indices, 0, 1, memory.declared, memory.rows(indices, y[indices])).part(rows)
                _, loss = train_step(recipe.at(0), model, x[local], y[local], (0, step), optimizer, context=context)
                memory.write(indices, y[indices], context.written)
                losses.append(float(distributed.all_reduce_sum(loss.total.detach())[0]))
        if distributed.is_main_process():
            torch.save({"losses": losses, "model": model.state_dict(), "memory": memory.state_dict()}, to)
        print(json.dumps(losses[-1]))
        Path(f"{to}.{distributed.rank()}").write_text(
            str([t.double().sum().item() for t in model.state_dict().values()])
        )


if __name__ == "__main__":
    main()
