"""Exact inference: the model in plain float32, in passes of one size, so that no verdict depends on the batch.

A matrix product of 7 rows may round otherwise than the same rows among 8, and a hundred steps along the sign of a
gradient turn a last bit into another image. Every pass here has the same number of images, the last one filled up, or
any larger number where a test says that the bits are the same. So the bits of an image's logits depend on it only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from robustmail.attacks.view import ModelView, call_model, model_view
from robustmail.errors import ModelError
from robustmail.models.classifier import Classifier, example_logits
from robustmail.models.folded import CLOSE, FoldedModel
from robustmail.models.precision import flops
from robustmail.models.windowed import KnownImages, at_least, filled_up
from robustmail.runtime.devices import keep_freed_memory

__all__ = [
    "SearchModel",
    "BatchSizer",
    "exact_inference",
    "fills_cpu",
    "is_out_of_memory",
    "make_search_model",
    "search_view",
]

T = TypeVar("T")
PASS_SIZE = {"cpu": 8, "cuda": 250}  # images in one pass of the model
TRIED_SIZES = (8, 9, 13, 19, 31, 50, 72, 100)  # of a pass, at which batch invariance is tested
LARGE = 128 * 128  # pixels of an image that fills a CPU by itself
MAX_PASS = 128  # images in a pass of a batch-invariant model
WINDOWED_SIZES = (8, 13, 31, MAX_PASS)  # of a call for images with known activations
MAX_FLOPS = 2e9  # of one image's forward pass (a ResNet-18 has 1.1e9): above, the test would need much memory
BATCH_SIZES = {"cpu": (32, 128), "cuda": (500, 2000)}  # images under attack: at first, at most
MIN_BATCH = 32  # images under attack at least, unless memory is short: below, small networks take twice the time
MIN_SECONDS, MAX_SECONDS = 5.0, 30.0  # of a batch: it is what a kill loses, and how often progress is shown


def fills_cpu(device: torch.device, shape: torch.Size) -> bool:
    """Whether one image [..., H, W] is work enough for a CPU; then no pass is filled up with copies of it."""
    return device.type == "cpu" and shape[-2] * shape[-1] >= LARGE


class BatchSizer:
    """Batch sizes of an evaluation, made to fit the memory and the time.

    batch: images under attack at once; halved when memory runs out and, unless it was given, adapted to 5 to 30
    seconds.
    pass_size: images in one pass of the model; halved only if a batch of that size is still too large, and then last
    bits may change.
    recompute: for an attack that sees a fixed block of images, which cannot be halved: its gradients keep the
    activations of one pass and compute those of the others again.

    is_large: whether one image is work enough for the device, see `fills_cpu`.

    No result depends on `batch` or `recompute`.
    """

    def __init__(self, device: torch.device, batch: int | None = None, is_large: bool = False) -> None:
        keep_freed_memory(device)
        first, most = BATCH_SIZES.get(device.type, BATCH_SIZES["cpu"])
        self.is_large = is_large
        self.pass_size = 1 if is_large else PASS_SIZE.get(device.type, PASS_SIZE["cpu"])
        self.batch, self.max_batch, self.is_given = batch or first, batch or most, batch is not None
        self.least = self.pass_size if is_large else min(first, MIN_BATCH)
        self.recompute = False
        self._search: tuple[nn.Module, int, SearchModel] | None = None
        self._exact: tuple[nn.Module, int, BatchInvariance] | None = None

    @contextmanager
    def exact_inference(self, model: nn.Module, sample: Tensor) -> Iterator[ModelView]:
        """`exact_inference` in passes of `pass_size`, or in larger ones where a test on `sample` says that an image's
        logits have the same bits in them; the test is made once."""
        if self._exact is None or self._exact[0] is not model or self._exact[1] != self.pass_size:
            with exact_inference(model, self.pass_size) as view:
                invariant = _batch_invariance(view.model.model, model, sample, self.pass_size, False)  # type: ignore[arg-type]
            self._exact = model, self.pass_size, invariant
        with exact_inference(model, self.pass_size, self._exact[2]) as view:
            yield view

    def search_model(self, model: nn.Module, sample: Tensor) -> SearchModel:
        """The model's `make_search_model` for this pass size, made once: its tests cost dozens of passes."""
        if self._search is None or self._search[0] is not model or self._search[1] != self.pass_size:
            self._search = model, self.pass_size, make_search_model(model, sample, self.pass_size)
        return self._search[2]

    def adapt(self, seconds: float) -> None:
        """Choose the next batch size, given the seconds that the last batch took."""
        if seconds < MIN_SECONDS:
            self.batch = min(2 * self.batch, self.max_batch)
        elif seconds > MAX_SECONDS and self.batch // 2 >= self.least and not self.is_given:
            self.batch //= 2

    def with_oom_retry(self, work: Callable[[], T], block: str = "") -> T:
        """Return `work()`; whenever memory runs out, shrink and try again.

        work: reads `batch`, `pass_size` or `recompute`. block: name of what needs its images all at once, if not in a
        batch. Raises ModelError if memory runs out with a single image.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.shrink(error, block)

    def shrink(self, error: Exception, block: str = "") -> None:
        """Need less memory from now on. Raises ModelError if that is not possible."""
        if block and not self.recompute:
            self.recompute = True
        elif self.batch > self.pass_size and not block:
            self.batch = self.max_batch = max(self.pass_size, self.batch // 2)
        elif self.pass_size > 1:
            self.pass_size //= 2
            self.batch = self.max_batch = self.batch if block else self.pass_size
        elif block:
            raise ModelError(block, "out of memory, also where each pass of the model has a single image",
                             "It sees these images at once, so a smaller --batch does not help: use --device cpu, or a "
                             "machine with more memory.") from error  # fmt: skip
        else:
            raise ModelError("evaluate", "out of memory with a single image", "Use a machine with more.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or its cause, says that memory ran out, on any device."""
    while True:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(
            text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")
        ):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


class BatchInvariance(StrEnum):
    """Whether an image's logits, and its gradient, have the same bits in passes of any size, from the pass size on."""

    NO = ""
    YES = "in all layers"
    WITH_LINEAR_BY_BLOCKS = "where linear layers take one block of rows after another"
    IN_MULTIPLES = "in multiples of the pass size, linear layers as above"


class _LinearByBlocks(TorchFunctionMode):
    """Inside it, linear layers multiply `size` rows at a time.

    A library for matrix products chooses its order of summation by the number of rows, and convolutions mostly do not.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.linear or len(args) < 2 or args[0].dim() < 2 or len(args[0]) <= self.size:
            return function(*args, **kwargs)
        x, n = filled_up(args[0], self.size), len(args[0])
        return torch.cat([function(rows, *args[1:], **kwargs) for rows in x.split(self.size)])[:n]


class FixedBatch(nn.Module):
    """A model whose passes have a fixed number of images, the last one filled up, or more.

    model: images [B, C, H, W] -> logits [B, classes].
    size: images in a pass.
    batch_invariant: whether a pass may have more images, up to MAX_PASS, and how.
    recompute: whether gradients compute each pass again, so that memory holds the activations of one pass only.
    windowed: tells, when it is asked for the first time, whether `known_images` may be used.
    most: images in a pass at most, where it may have more than `size`, so that memory suffices; no more than MAX_PASS.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        batch_invariant: BatchInvariance = BatchInvariance.NO,
        recompute: bool = False,
        windowed: Callable[[], bool] = lambda: False,
        most: int = MAX_PASS,
    ) -> None:
        super().__init__()
        self.model, self.size, self.recompute, self.windowed = model, size, recompute, windowed
        self.is_invariant = bool(batch_invariant) and not recompute
        self.max_pass = max(min(most, MAX_PASS), size) if self.is_invariant else size
        self.any_size = batch_invariant in (BatchInvariance.YES, BatchInvariance.WITH_LINEAR_BY_BLOCKS)
        self.by_blocks = batch_invariant in (BatchInvariance.WITH_LINEAR_BY_BLOCKS, BatchInvariance.IN_MULTIPLES)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        parts = [self._filled_up(part) for part in x.split(self.max_pass)]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        if x.requires_grad and not logits.requires_grad:  # detached inside the model: gradient 0, which a check finds
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)
        return logits

    def _filled_up(self, x: Tensor) -> Tensor:
        """The logits of a pass of images, filled up to a number that is allowed."""
        n = len(x)
        filled = at_least(x, self.size) if self.any_size and n else filled_up(x, self.size)
        if filled is x and not x.requires_grad:
            filled = x.clone()  # a model may write into its images
        logits = self._pass(filled)
        return logits[:n] if len(logits) > n else logits

    def known_images(self, x: Tensor, side: int) -> KnownImages | None:
        """The images [M, C, H, W], of which squares of `side` pixels will change; None if that is not known to give the
        same bits in calls of all sizes, or is not faster."""
        if not (isinstance(self.model, FoldedModel) and self.is_invariant and self.windowed()):
            return None
        known = KnownImages(self.model, x, side, self.size, MAX_PASS, self._context)
        return known if known.is_faster else None

    def _context(self) -> AbstractContextManager[Any]:
        return _LinearByBlocks(self.size) if self.by_blocks else nullcontext()

    def _pass(self, x: Tensor) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            with self._context():
                return call_model(self.model, x)
        logits: Tensor = checkpoint(call_model, self.model, x, use_reentrant=False)
        return logits


@contextmanager
def exact_inference(
    model: nn.Module, size: int | None = None, batch_invariant: BatchInvariance = BatchInvariance.NO
) -> Iterator[ModelView]:
    """A view of the model in plain float32, in passes of one size: no autocast, no TF32 on a GPU.

    size: images in a pass, by default PASS_SIZE of the device.
    batch_invariant: whether a pass may have more, and how.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul) if device == "cuda" else ()
    before = [backend.allow_tf32 for backend in backends]
    with model_view(model) as view, torch.autocast(device, enabled=False):
        try:
            for backend in backends:
                backend.allow_tf32 = False
            yield ModelView(FixedBatch(view.model, size or PASS_SIZE.get(device, 32), batch_invariant))
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed


@dataclass(frozen=True)
class SearchModel:
    """What attacks compute logits and gradients with; verdicts always come from the model itself.

    network: the model, or its folded form.
    batch_invariant: whether an image's bits are the same in larger passes.
    sample: images [B, C, H, W] for the test of `is_windowed`, if there is to be one.
    size: images in a pass.
    """

    network: nn.Module
    batch_invariant: BatchInvariance = BatchInvariance.NO
    sample: Tensor | None = None
    size: int = 1

    @cached_property
    def is_windowed(self) -> bool:
        """Whether logits can be told from what a window reaches, with bits that depend on the image only."""
        if self.sample is None:
            return False
        passes = FixedBatch(self.network, self.size, self.batch_invariant, windowed=lambda: True)
        return _is_windowed(passes, self.sample)


def make_search_model(model: nn.Module, sample: Tensor, size: int) -> SearchModel:
    """The model in float32, folded: BatchNorm and relu within its convolutions; else the model.

    A search may end at another image with it, as on another machine; whether an image is broken, the model decides.
    sample: [B, C, H, W], on which logits and gradients of both must agree. size: images in a pass.
    """
    network = model
    with model_view(model), torch.autocast(sample.device.type, enabled=False):
        if isinstance(model, Classifier):
            with suppress(ModelError):
                network = FoldedModel(model, sample, torch.float32).eval()
        return SearchModel(network, _batch_invariance(network, model, sample, size), sample, size)


@contextmanager
def search_view(
    view: ModelView, search: SearchModel, sizer: BatchSizer, recompute: bool = False
) -> Iterator[ModelView]:
    """A view of a search model, beside the exact view of its model.

    sizer: its `pass_size` is that of both; `max_batch` limits the memory of larger passes.
    """
    network = search.network
    if isinstance(network, FoldedModel):
        network.refresh()
    else:
        network = view.model.model  # type: ignore[assignment]
    size, most = sizer.pass_size, sizer.max_batch
    yield ModelView(FixedBatch(network, size, search.batch_invariant, recompute, lambda: search.is_windowed, most))


def _batch_invariance(
    network: nn.Module, model: nn.Module, sample: Tensor, size: int, with_gradient: bool = True
) -> BatchInvariance:
    """Test whether an image's logits, and its gradient, have the same bits in passes of several sizes."""
    if sample.device.type != "cpu" or size not in TRIED_SIZES:
        return BatchInvariance.NO
    images = sample[:1].expand(MAX_PASS, *sample.shape[1:]) * _brightness(MAX_PASS)
    try:
        if not _is_cheap(model, sample):  # of the model: the operators of its folded form are not counted
            return BatchInvariance.NO
        for kind in BatchInvariance:
            if kind and _same_bits_in_all_sizes(FixedBatch(network, size, kind), images, with_gradient):
                return kind
    except (Exception, SystemExit):  # a model may fail in any way; that error is raised where the model is evaluated
        return BatchInvariance.NO
    return BatchInvariance.NO


def _is_cheap(model: nn.Module, sample: Tensor) -> bool:
    """Whether a forward pass of one image [1, C, H, W] has at most MAX_FLOPS."""
    # A weight is multiplied once for each pixel at most, which most often settles it without counting.
    most = 2 * sum(p.numel() for p in model.parameters()) * sample.shape[-2] * sample.shape[-1]
    return most <= MAX_FLOPS or flops(model, sample[:1]) <= MAX_FLOPS


@torch.no_grad()
def _is_windowed(passes: FixedBatch, sample: Tensor) -> bool:
    """Test whether changed squares have the logits of whole images, and the same bits in calls of several sizes."""
    height, width = sample.shape[-2:]
    images = sample[:1].expand(MAX_PASS, *sample.shape[1:]) * _brightness(MAX_PASS)
    try:
        for side in {min(2, height, width), max(min(height, width) // 4, 1)}:
            known = [some for n in WINDOWED_SIZES if (some := passes.known_images(images[:n], side)) is not None]
            for top, left in ((0, 0), (height - side, (width - side) // 2)):
                changed = images.clone()
                changed[..., top : top + side, left : left + side] = images.flip(0)[..., :side, :side]
                place = torch.tensor([top, left]).expand(MAX_PASS, 2)
                if len(known) < len(WINDOWED_SIZES) or not _same_logits(passes(changed), known, place, images.flip(0)):
                    return False
    except (Exception, SystemExit):  # as in `_batch_invariance`
        return False
    return True


def _same_logits(whole: Tensor, known: list[KnownImages], place: Tensor, images: Tensor) -> bool:
    """known: of the first 8, 13, ... images. images: whose upper left squares go to `place` [B, 2]."""
    last, side = known[-1], known[-1].side
    sizes = [torch.arange(n) for n in WINDOWED_SIZES]
    calls = [*zip(known, sizes, strict=True), *((last, rows) for rows in sizes)]
    parts = [some(place[: len(rows)], images[: len(rows), :, :side, :side], rows) for some, rows in calls]
    is_close = (parts[-1] - whole).abs().max() <= CLOSE[torch.float32] * whole.abs().max()
    return bool(is_close) and all(torch.equal(part, parts[-1][: len(part)]) for part in parts)


def _brightness(n: int) -> Tensor:
    return torch.linspace(0.5, 1, n).view(-1, 1, 1, 1)


def _same_bits_in_all_sizes(passes: FixedBatch, images: Tensor, with_gradient: bool) -> bool:
    whole = _outputs(passes, images, with_gradient)
    parts = (_outputs(passes, images[:n].clone(), with_gradient) for n in TRIED_SIZES)
    return all(torch.equal(few, many[: len(few)]) for part in parts for few, many in zip(part, whole, strict=True))


def _outputs(network: nn.Module, images: Tensor, with_gradient: bool) -> tuple[Tensor, ...]:
    if with_gradient:
        return example_logits(network, images)
    with torch.no_grad():
        return (call_model(network, images),)
