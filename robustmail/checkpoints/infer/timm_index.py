"""timm_index.json: which of timm's models have which names of tensors, so that no model need be built to find them.

`python -m robustmail.checkpoints.infer.timm_index` writes the file again for the installed timm (some minutes). With
another version of timm the index may be wrong, but the caller builds each model and compares names and shapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["models_with_names"]

FILE = Path(__file__).with_name("timm_index.json")


def models_with_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of timm's models whose tensors have exactly these names: those of the same widths first, then short
    names.

    The widths decide between resnet50 and wide_resnet50_2; classes, channels and input size do not count.
    """
    group = _index().get(_names_hash(shapes), {})
    widths = _widths_hash(shapes, group.get("classifier", []))
    models = [(hashed != widths, len(name), name) for name, hashed in group.get("models", {}).items()]
    return [name for _, _, name in sorted(models)]


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
    """A hash of the lengths of biases and norms, which are the widths of layers; without those of the classifier."""
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
        except Exception as error:  # some need packages that are not installed
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
