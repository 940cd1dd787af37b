"""Numbers as text."""

from __future__ import annotations

import pytest

from robustmail.text import format_eps, plural


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255 Linf"),
        (8 / 255, "", "8/255"),
        (0.0313725, "linf", "8/255 Linf"),
        (0.031, "linf", "0.031 Linf"),
        (0.10000000149, "linf", "0.1 Linf"),
        (0.5 / 255, "linf", "0.5/255 Linf"),
        (0.5, "l2", "0.5 L2"),
        (128 / 255, "l2", "128/255 L2"),
        (82.5 / 255, "l2", "0.324 L2"),
        (1.00003e-6, "linf", "1e-06 Linf"),
        (0.0, "linf", "0 Linf"),
        (None, "linf", "unknown"),
    ],
)
def test_an_eps_is_a_fraction_of_255_only_where_it_is_one(eps, norm, text):
    assert format_eps(eps, norm) == text


def test_one_image_is_singular():
    assert [plural(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
