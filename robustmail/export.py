"""A model as a file for other programs, normalisation inside, written only if it gives the logits of the model."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.errors import ModelError, RobustmailError, RunError, asked_to_stop, did_you_mean, in_brief
from robustmail.models.classifier import Classifier
from robustmail.runtime.files import atomic_write
from robustmail.step import logits_of

__all__ = ["SUFFIXES", "Exported", "export_model"]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}
TOLERANCE = 1e-4  # of the largest logit: far above the rounding of float32, far below another normalisation
TRACED = 2  # images in the batch that is traced; a batch of one could be taken for any
CHECKED = (1, 3, 8)  # sizes of the batches that are compared, none of them the traced one
LARGEST_ONNX = 2**31 - 1  # bytes of one file


@dataclass(frozen=True)
class Exported:
    """A written file, and how near it is to its model.

    path: of the file. form: onnx, torchscript or pt2. shape: of an image, (C, H, W). classes: number of logits. images:
    number of random images that were compared. difference: largest absolute difference of their logits. scale: the
    largest absolute logit of the model.
    """

    path: Path
    form: str
    shape: tuple[int, int, int]
    classes: int
    images: int
    difference: float
    scale: float


def export_model(
    model: nn.Module,
    path: str | Path,
    shape: tuple[int, int, int],
    form: str | None = None,
    facts: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Exported:
    """Write a model as a file that other programs run: images [B, C, H, W] in [0, 1] in, logits [B, classes] out.

    The file is run on random images, in batches of several sizes, before it is put in its place. Where its logits are
    not those of the model, nothing is written.
    model: as `from_pretrained` and `load_model` return it; exported as in eval mode, in float32 on the CPU.
    path: of the file.
    shape: of an image, (C, H, W); the number of images in a batch is free.
    form: onnx, torchscript or pt2 (torch.export); by default, what the ending of `path` says: .onnx, .pt, .pt2.
    facts: plain values to store in the file, as JSON under the name robustmail.
    replace: overwrite a file that is there.

    Raises ModelError: torch cannot export the network in this form, its logits are random, or the file gives others
    than the model. Raises RunError: the form is unknown, what it needs is not installed, or the file is there or cannot
    be written.
    """
    path = Path(path)
    form = check_export(path, form, replace)
    reference = copy.deepcopy(model).cpu().float().eval()
    traced = copy.deepcopy(reference).requires_grad_(False)
    if isinstance(traced, Classifier):
        traced.use_plain_strides()
    batches = list(_random_images(shape))
    expected = [_logits(reference, x) for x in batches]
    if any(not torch.equal(_logits(reference, x), logits) for x, logits in zip(batches, expected, strict=True)):
        raise ModelError("the model", "gives other logits each time, so that no file can be compared with it",
                         "Take what is random out of it.")  # fmt: skip
    text = json.dumps({"shape": list(shape), "classes": expected[0].shape[1], **(facts or {})})
    content = _content(form, traced, batches[0].repeat(TRACED, 1, 1, 1), text)
    got = _run_content(form, content, batches)
    difference = max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))
    scale = max(logits.abs().max().item() for logits in expected)
    if not difference <= TOLERANCE * scale:  # NaN, too
        wrong = f"gives other logits than the model, by up to {difference:.2g} where the largest is {scale:.2g}"
        raise ModelError(f"the export to {form}", f"{wrong}; nothing is written", _other_form(form))
    atomic_write(path, lambda temporary: temporary.write_bytes(content))
    return Exported(path, form, shape, expected[0].shape[1], sum(CHECKED), difference, scale)


def check_export(path: Path, form: str | None, replace: bool = False) -> str:
    """The form of the file to write. Raises RunError as `export_model`, before a model is opened."""
    form = form or next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), "")
    if form not in SUFFIXES:
        raise RunError(f"export to {form or path}", "no such form", did_you_mean(form, SUFFIXES))
    if form == "onnx" and (lacking := [name for name in ("onnxscript", "onnxruntime") if not find_spec(name)]):
        wrong = f"needs {' and '.join(lacking)}, which is not installed"
        raise RunError("export to onnx", wrong, "Install it: pip install 'robustmail[export]'.")
    if not path.parent.is_dir():
        raise RunError(str(path), f"there is no folder {path.parent}", "Make it, or write to another.")
    if path.is_dir() or (path.exists() and not replace):
        wrong = "is a folder" if path.is_dir() else "is there already"
        raise RunError(str(path), wrong, "Name another file with --out, or pass --replace.")
    return form


def _random_images(shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Batches of images in [0, 1], noise of any brightness and contrast; the generator is our own."""
    generator = torch.Generator().manual_seed(0)
    for size in CHECKED:
        low, high = torch.rand(2, size, 1, 1, 1, generator=generator).sort(0).values
        yield low + (high - low) * torch.rand(size, *shape, generator=generator)


def _logits(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Raises ModelError: the model fails, or returns no finite logits [B, classes]."""
    size = " x ".join(map(str, x.shape[1:]))
    try:
        with torch.no_grad():
            logits = logits_of(model(x))
    except RobustmailError:
        raise
    except Exception as error:
        raise ModelError("the model", f"fails on images of {size} ({in_brief(error)})", "Pass its --shape.") from error
    if logits.ndim != 2 or len(logits) != len(x) or not logits.isfinite().all():
        wrong = f"returned {list(logits.shape)} for {len(x)} images of {size}, expected finite logits [B, classes]"
        raise ModelError("the model", wrong)
    return logits


@contextmanager
def _export_errors(form: str, wrong: str) -> Iterator[None]:
    """Whatever torch raises within becomes a ModelError; what it prints is for those who write exporters."""
    before = logging.root.manager.disable
    try:
        said = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said), torch.no_grad():
            warnings.simplefilter("ignore")
            logging.disable()
            yield
    except BaseException as error:
        if asked_to_stop(error) or isinstance(error, RobustmailError):
            raise
        raise ModelError(f"the export to {form}", f"{wrong} ({in_brief(error)})", _other_form(form)) from error
    finally:
        logging.disable(before)


def _other_form(form: str) -> str:
    return f"Try --to {'pt2' if form == 'torchscript' else 'torchscript'}."


def _content(form: str, model: nn.Module, example: Tensor, facts: str) -> bytes:
    """The file as bytes. example: images [B, C, H, W]; B stays free. Raises ModelError: torch cannot export it."""
    file = io.BytesIO()
    with _export_errors(form, "torch cannot export this network"):
        if form == "torchscript":
            traced = torch.jit.trace(model, example, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, file, _extra_files={"robustmail": facts})  # type: ignore[no-untyped-call]
        else:
            free = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (example,), dynamic_shapes=free)
            if form == "onnx":
                return _onnx(program, facts)
            torch.export.save(program, file, extra_files={"robustmail": facts})
    return file.getvalue()


def _onnx(program: Any, facts: str) -> bytes:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    written: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    written.model.metadata_props["robustmail"] = facts
    proto = written.model_proto
    if proto.ByteSize() > LARGEST_ONNX:
        raise ModelError("the export to onnx", "the network is larger than the 2 GB of one file", _other_form("onnx"))
    content: bytes = proto.SerializeToString()
    return content


def _run_content(form: str, content: bytes, batches: list[Tensor]) -> list[Tensor]:
    """The logits of each batch, by the file as another program runs it. Raises ModelError: it does not run."""
    with _export_errors(form, "the file does not run"):
        if form == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            return [torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]) for x in batches]
        file = io.BytesIO(content)
        run: Any = torch.jit.load(file) if form == "torchscript" else torch.export.load(file).module()  # type: ignore[no-untyped-call]
        return [run(x) for x in batches]
