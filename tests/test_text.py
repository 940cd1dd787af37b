"""Numbers as text."""

from __future__ import annotations

import pytest

from robustmail.text import format_eps, plural, split_at_commas


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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]), ("", [""]), ("f(1,2),g", ["f(1,2)", "g"]),
        ("Stairs({0: 1, 2: 3}),4", ["Stairs({0: 1, 2: 3})", "4"]),
        ("'a,b',c", ["'a,b'", "c"]), ("f(')',1),b", ["f(')',1)", "b"]), ("((1,),(2,)),x", ["((1,),(2,))", "x"]),
        ("mine.py:f,pm_adv", ["mine.py:f", "pm_adv"]),
    ],
)  # fmt: skip
def test_commas_inside_brackets_and_quotes_belong_to_the_value(text, parts):
    assert split_at_commas(text)[0] == parts


@pytest.mark.parametrize(
    ("text", "left_open"),
    [("a(b,c),d", ""), ("a(b,c", "bracket"), ("a),b", "bracket"), ("a('b,c)", "quote"), ("a('(')", ""), ("", "")],
)
def test_what_a_list_leaves_open_is_told(text, left_open):
    assert split_at_commas(text)[1] == left_open
