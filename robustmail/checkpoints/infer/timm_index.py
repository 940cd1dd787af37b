"""timm_index.json: which of timm's models have which parameter names, so that a state dict finds its model at once.

`python -m robustmail.checkpoints.infer.timm_index` makes the file anew for the timm installed (some minutes). It only
proposes: who asks it builds the model and compares names and shapes, so that another version of timm does no harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["candidates"]

FILE = Path(__file__).with_name("timm_index.json")


def candidates(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of timm's models with exactly these tensors' names, those of the same widths first, short names first.

    The widths decide between resnet50 and wide_resnet50_2; what depends on classes, channels or input size does not.
    """
    group = _index().get(_names_hash(shapes), {})
    widths = _widths_hash(shapes, group.get("classifier", []))
    found = [(hashed != widths, len(name), name) for name, hashed in group.get("models", {}).items()]
    return [name for _, _, name in sorted(found)]


@cache
def _index() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    groups: dict[str, Any] = content["groups"]
    return groups


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def _names_hash(shapes: Iterable[str]) -> str:
    return _hash(name for name in shapes if not name.endswith("num_batches_tracked"))


def _widths_hash(shapes: Mapping[str, tuple[int, ...]], classifier: list[str]) -> str:
    """Tensors of one dimension have the width of their layer, whatever goes in or out of the network."""
    heads = tuple(f"{name}." for name in classifier)
    return _hash(f"{k} {s[0]}" for k, s in shapes.items() if len(s) == 1 and not k.startswith(heads))


def _make() -> None:
    import timm
    import torch

    groups: dict[str, Any] = {}
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model: Any = timm.create_model(name)
        except Exception as error:  # some need packages that are not there
            print(f"{name}: left out, {type(error).__name__}: {error}")
            continue
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        heads = model.default_cfg.get("classifier") or []
        group = groups.setdefault(
            _names_hash(shapes), {"classifier": [heads] if isinstance(heads, str) else list(heads), "models": {}}
        )
        group["models"][name] = _widths_hash(shapes, group["classifier"])
    content = {"timm": timm.__version__, "groups": dict(sorted(groups.items()))}
    FILE.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _make()
