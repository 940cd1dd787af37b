"""Images in safetensors files that are read one by one, so that memory does not grow with their number."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["StoredImages", "joined", "write_images"]

DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}


class StoredImages(Mapping[int, Tensor]):
    """Images [C, H, W] by number: some in memory, the others in files, from which they are read when asked for.

    tensor: name of the tensor [M, C, H, W] in the files. places: number -> (file, row of the tensor). memory: number ->
    image, for those that no file has yet.
    """

    def __init__(
        self, tensor: str, places: Mapping[int, tuple[Path, int]], memory: Mapping[int, Tensor] | None = None
    ) -> None:
        self.tensor, self.places, self.memory = tensor, dict(places), dict(memory or {})

    def __getitem__(self, number: int) -> Tensor:
        if number in self.memory:
            return self.memory[number]
        path, row = self.places[number]
        with safe_open(path, framework="pt") as file:
            image: Tensor = file.get_slice(self.tensor)[row : row + 1][0].clone()
        return image

    def __iter__(self) -> Iterator[int]:
        yield from {**self.places, **self.memory}

    def __len__(self) -> int:
        return len(self.places.keys() | self.memory.keys())

    def __contains__(self, number: object) -> bool:
        return number in self.memory or number in self.places

    def __or__(self, new: Mapping[int, Tensor]) -> StoredImages:
        """The same with more images, which are in memory."""
        return StoredImages(self.tensor, self.places, {**self.memory, **new})

    def renumbered(self, number: Callable[[int], int]) -> StoredImages:
        """The same under other numbers."""
        places = {number(k): place for k, place in self.places.items()}
        return StoredImages(self.tensor, places, {number(k): image for k, image in self.memory.items()})


def joined(
    images: dict[int, Tensor] | StoredImages, numbers: Mapping[int, int], others: dict[int, Tensor] | StoredImages
) -> dict[int, Tensor] | StoredImages:
    """The images with some of others, of which those in files stay there; numbers: new number -> number in `others`."""
    if not isinstance(others, StoredImages):
        return images | {new: others[number] for new, number in numbers.items()}
    own = images if isinstance(images, StoredImages) else StoredImages(others.tensor, {}, images)
    places = {new: others.places[k] for new, k in numbers.items() if k not in others.memory}
    memory = {new: others.memory[k] for new, k in numbers.items() if k in others.memory}
    return StoredImages(own.tensor, {**own.places, **places}, {**own.memory, **memory})


def write_images(path: Path, index: Tensor, images: Mapping[str, Callable[[int], Tensor]]) -> None:
    """Write a safetensors file with `index` [M] and tensors [M, C, H, W], one image after another.

    images: tensor's name -> function of the row, which returns an image [C, H, W]; all of one shape and type.
    Format: a length of 8 bytes, a header in JSON, the numbers (the safetensors README).
    """
    shapes = {"index": (index.dtype, list(index.shape))}
    for name, image in images.items():
        first = image(0) if len(index) else torch.empty(0)
        shapes[name] = first.dtype, [len(index), *first.shape]
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + _bytes(index))
        for image in images.values():
            for row in range(len(index)):
                file.write(_bytes(image(row)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
