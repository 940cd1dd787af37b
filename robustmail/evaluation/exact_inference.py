"""The model as the judge sees it: plain float32, in slices of one size, so that no verdict depends on the batch.

A matrix product of 7 rows may round otherwise than the same rows among 8, and a hundred steps along the sign of a
gradient turn a last bit into another image. Every pass here is made of slices of the same number of images, the last
one filled up; then the bits of an image are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustmail.attacks.view import ModelView, call_model, model_view
from robustmail.errors import ModelError
from robustmail.models.classifier import Classifier, example_logits
from robustmail.models.folded import FoldedModel
from robustmail.models.precision import flops

__all__ = ["SearchModel", "BatchSizer", "exact_inference", "is_out_of_memory", "make_search_model", "search_view"]

T = TypeVar("T")
SLICE = {"cpu": 8, "cuda": 250}
MULTIPLES, LONGEST = (8, 16, 24, 40, 72), 128  # images in a pass that are tried, and the most that are made
SMALL = 2e9  # FLOPs of one image's forward pass (a ResNet-18 has 1.1e9), above which trying would cost much memory
BATCH = {"cpu": (32, 128), "cuda": (500, 2000)}  # to begin with, at most
SOON, LATE = 5.0, 30.0  # seconds for a batch: so much is lost where the process is killed, and seen late


class BatchSizer:
    """How much is done at once: `batch` images under attack, `slice` in one pass of the model.

    The batch is free: halved where memory runs out, and, unless it was given, made to take some seconds; verdicts stay.
    A block that cannot be halved is `frugal` instead: its gradients keep one slice of activations, and compute those of
    the others again. The slice is halved only when that is still too much, and then the last bits may change.
    """

    def __init__(self, device: torch.device, batch: int | None = None) -> None:
        first, most = BATCH.get(device.type, BATCH["cpu"])
        self.slice = SLICE.get(device.type, SLICE["cpu"])
        self.batch, self.most, self.given = batch or first, batch or most, batch is not None
        self.frugal = False

    def pace(self, seconds: float) -> None:
        """A batch took so long: take more, or less, the next time."""
        if seconds < SOON:
            self.batch = min(2 * self.batch, self.most)
        elif seconds > LATE and self.batch // 2 >= self.slice and not self.given:
            self.batch //= 2

    def with_oom_retry(self, work: Callable[[], T], block: str = "") -> T:
        """Do some work, of which the batch or the slice is a part; where memory runs out, again with half.

        block: who needs how many images at once, where that is not a batch. Raises ModelError where one image is too
        many.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.shrink(error, block)

    def shrink(self, error: Exception, block: str = "") -> None:
        """Make do with less. Raises ModelError where one image is too many."""
        if block and not self.frugal:
            self.frugal = True
        elif self.batch > self.slice and not block:
            self.batch = self.most = max(self.slice, self.batch // 2)
        elif self.slice > 1:
            self.slice //= 2
            self.batch = self.most = self.batch if block else self.slice
        elif block:
            raise ModelError(block, "out of memory, also where each pass of the model has a single image",
                             "It sees these images at once, so a smaller --batch does not help: use --device cpu, or a "
                             "machine with more memory.") from error  # fmt: skip
        else:
            raise ModelError("evaluate", "out of memory with a single image", "Use a machine with more.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Does an error, or one that it came from, say that memory ran out, on whatever device?"""
    while True:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(w in str(error) for w in ("out of memory", "can't allocate memory")):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


class FixedBatch(nn.Module):
    """A model whose every pass has exactly `size` images; or, `whole`, a multiple of it, LONGEST at most.

    frugal: a gradient computes each pass again when its turn comes, so that one is in memory at a time.
    """

    def __init__(self, model: nn.Module, size: int, whole: bool = False, frugal: bool = False) -> None:
        super().__init__()
        self.model, self.size, self.longest = model, size, LONGEST if whole and not frugal else size
        self.frugal = frugal
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        n, missing = len(x), -len(x) % self.size
        if missing:
            x = torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])])
        parts = [self._pass(part) for part in x.split(self.longest)]
        logits: Tensor = (torch.cat(parts) if len(parts) > 1 else parts[0])[:n]
        if x.requires_grad and not logits.requires_grad:  # cut off within: then its gradient is zero, which is flagged
            logits = logits + 0 * x[:n].flatten(1).sum(1, keepdim=True)
        return logits

    def _pass(self, x: Tensor) -> Tensor:
        if not self.frugal or not torch.is_grad_enabled():
            return call_model(self.model, x)
        logits: Tensor = checkpoint(call_model, self.model, x, use_reentrant=False)
        return logits


@contextmanager
def exact_inference(model: nn.Module, size: int | None = None) -> Iterator[ModelView]:
    """A view in plain float32, in slices of `size`: no autocast of the caller's, no TF32 on a GPU."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul) if device == "cuda" else ()
    before = [backend.allow_tf32 for backend in backends]
    with model_view(model) as view, torch.autocast(device, enabled=False):
        try:
            for backend in backends:
                backend.allow_tf32 = False
            yield ModelView(FixedBatch(view.model, size or SLICE.get(device, 32)))
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed


class SearchModel(NamedTuple):
    """What an attack may search on in place of a model."""

    form: nn.Module
    whole: bool
    """do its passes give the same bits for any multiple of a slice?"""


def make_search_model(model: nn.Module, sample: Tensor, size: int) -> SearchModel:
    """In float32 a twin with BatchNorm folded, if the model has one, else the model.

    A search may end elsewhere by it, as on another machine; whether an image is broken, the model itself says.
    sample: [B, C, H, W], on which the twin's logits and gradients must be the model's. size: of a slice.
    """
    form = model
    with model_view(model), torch.autocast(sample.device.type, enabled=False):
        if isinstance(model, Classifier):
            with suppress(ModelError):
                form = FoldedModel(model, sample, torch.float32).eval()
        return SearchModel(form, _is_batch_invariant(form, model, sample, size))


@contextmanager
def search_view(view: ModelView, likeness: SearchModel, size: int, frugal: bool = False) -> Iterator[ModelView]:
    """The view of a likeness beside an exact view of its model, in the same slices."""
    form = likeness.form
    if isinstance(form, FoldedModel):
        form.refresh()
    else:
        form = view.model.model  # type: ignore[assignment]
    yield ModelView(FixedBatch(form, size, likeness.whole, frugal))


def _is_batch_invariant(form: nn.Module, model: nn.Module, sample: Tensor, size: int) -> bool:
    """Try whether the bits of an image's logits and gradient are the same in passes of one slice and of many."""
    if sample.device.type != "cpu" or size not in MULTIPLES:
        return False
    images = sample[:1].expand(LONGEST, *sample.shape[1:]) * torch.linspace(0.5, 1, LONGEST)[:, None, None, None]
    try:
        if flops(model, sample[:1]) > SMALL:  # not of the form: a twin's own operators are not counted
            return False
        logits, slopes = example_logits(form, images)
        return all(
            torch.equal(said, logits[:n]) and torch.equal(slope, slopes[:n])
            for n in MULTIPLES
            for said, slope in [example_logits(form, images[:n])]
        )
    except (Exception, SystemExit):  # a model may fail in any way; its own errors are met and told elsewhere
        return False
