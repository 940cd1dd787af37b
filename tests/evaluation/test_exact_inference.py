"""Passes of many images have the bits of passes of eight, whatever a library for matrix products makes of the number of
rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robustmail.evaluation.exact_inference import BatchInvariance, FixedBatch, make_search_model
from robustmail.models.classifier import Classifier


class Rows(TorchFunctionMode):
    """Keeps how many rows each linear layer was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            self.seen.append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 100), nn.ReLU(),
        nn.Linear(100, 10),
    ).eval()  # fmt: skip


def test_linear_layers_by_blocks_have_the_bits_of_passes_of_eight_images(network: nn.Module) -> None:
    images = torch.rand(72, 1, 16, 16)

    def outputs(kind: BatchInvariance) -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        logits = FixedBatch(network, 8, kind)(x)
        return logits, torch.autograd.grad(logits.square().sum(), x)[0]

    for by_eight, at_once in zip(
        outputs(BatchInvariance.NO), outputs(BatchInvariance.WITH_LINEAR_BY_BLOCKS), strict=True
    ):
        assert torch.equal(by_eight, at_once)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        (BatchInvariance.NO, 8),
        (BatchInvariance.YES, 70),
        (BatchInvariance.WITH_LINEAR_BY_BLOCKS, 8),
        (BatchInvariance.IN_MULTIPLES, 8),
    ],
    ids=lambda given: getattr(given, "name", None),
)
def test_a_linear_layer_sees_as_many_rows_as_its_kind_of_pass_says(
    network: nn.Module, kind: BatchInvariance, most: int
) -> None:
    with torch.no_grad(), Rows() as rows:
        FixedBatch(network, 8, kind)(torch.rand(70, 1, 16, 16))
    assert max(rows.seen) == most


def test_a_network_that_looks_at_the_number_of_its_images_is_searched_in_passes_of_eight() -> None:
    class Counting(nn.Module):
        """Rounds otherwise from nine images on."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x.flatten(1)) * (1 if len(x) <= 8 else 1 + 1e-6)

    assert make_search_model(Classifier(Counting()).eval(), torch.rand(1, 1, 8, 8), 8).batch_invariant == ""
