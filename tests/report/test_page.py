"""The page: valid, self-contained, deaf to what names say, and whole whatever is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustmail.errors import RunError
from robustmail.markup import VOID, tag
from robustmail.report.example_images import png, read_examples
from robustmail.report.page import write_page

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> \x1b[31m"


class Page(HTMLParser):
    """Elements with their attributes, and all text; complains of an element that is not closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)


def page(folder: Path) -> Page:
    return Page(write_page(folder))


def test_the_page_says_the_number_to_quote_the_light_and_every_part(evaluation):
    folder = evaluation()
    seen = page(folder)
    for words in (
        "50.0 %", "of 40 images stand under pgd100 and aa at eps 8/255 Linf.", "95 % interval", "yellow",
        "6 % of the gradients are zero", "1.5 points", "first broken by", "The least robust classes first",
        "All. From left to right", "class 2 → class 0", "apgd-t, 8/255 Linf", "torchattack('APGDT', eps=8/255)",
        "c0ffee", f"robustmail verify {folder}",
    ):  # fmt: skip
        assert words in seen.text
    assert len(seen.all("h2")) == 10
    assert len(seen.all("svg")) == 2


def test_quantiles_of_the_weight_are_shown_where_a_run_has_them(evaluation):
    rows = [{"low": 0.25, "high": 0.75, "n": 9, "natural": 1.0, "robust": 0.5, "robust_low": 0.2, "robust_high": 0.8}]
    assert "0.25 to 0.75" in page(evaluation(by_weight=rows)).text
    assert "By weight" not in page(evaluation()).text


def test_the_page_asks_nobody_for_anything(evaluation):
    seen = page(evaluation())
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {name for name, _ in seen.elements}
    assert all(image["src"].startswith("data:image/png;base64,") for image in seen.all("img"))
    assert not seen.all("a"), "a link would be dead wherever the page is taken"
    text = seen.source
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(meta for meta in seen.all("meta") if meta.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


def test_every_image_and_plot_has_words_for_those_who_do_not_see_it(evaluation):
    seen = page(evaluation())
    assert all(image["alt"] for image in seen.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in seen.all("svg"))


def poisoned(value):
    if isinstance(value, dict):
        return {key: poisoned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part) for part in value]
    return EVIL if isinstance(value, str) else value


def test_no_text_of_a_file_becomes_markup(evaluation):
    folder = evaluation()
    sound = json.loads((folder / "results.json").read_text())
    changes = poisoned(sound) | {"kind": "evaluation", "provenance": {EVIL: {EVIL: [EVIL]}}}
    changes["data"]["class_names"] = [EVIL] * 3
    folder = evaluation(**changes)
    ledger = (folder / "ledger.csv").read_text().replace("apgd-t", EVIL.replace('"', ""))
    (folder / "ledger.csv").write_text(ledger)
    seen = page(folder)
    assert not seen.all("script")
    assert not any("onerror" in attributes for _, attributes in seen.elements)
    assert "\x1b" not in seen.source
    assert seen.text.count("<script>alert(1)</script>") > 10


def test_an_attribute_cannot_be_left_by_its_value():
    assert tag("a", "<b>", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;">&lt;b&gt;</a>'


MISSING = {
    "no worst case": {"worst_case": None, "eight_bit": None}, "no curve": {"curve": None},
    "no light": {"believable": None}, "no groups": {"per_class": [], "margins": []},
    "nothing but rows": {"believable": None, "curve": None, "per_class": None, "margins": None, "provenance": None},
    "nothing yet": {"attacks": [], "worst_case": None, "eight_bit": None, "complete": False},
    "a shard": {"shard": [2, 4]}, "grey": {"believable": {"light": "grey", "gap": None, "flags": [], "examined": []}},
    "another light": {"believable": {"light": "mauve", "flags": [{"name": "a b/c", "light": "mauve"}]}},
}  # fmt: skip


@pytest.mark.parametrize("changes", MISSING.values(), ids=MISSING)
def test_what_is_missing_is_left_out(evaluation, changes):
    seen = page(evaluation(**changes))
    assert "None" not in seen.text


@pytest.mark.parametrize("file", ["ledger.csv", "examples.safetensors"])
def test_a_page_does_without_ledger_or_examples(evaluation, file):
    folder = evaluation()
    (folder / file).unlink()
    assert page(folder).text


@pytest.mark.parametrize("facts", [
    {"classes": 2}, {"classes": 100, "n": 300}, {"n": 1, "right": 1.0, "stand": 1.0},
    {"n": 1, "right": 1.0, "stand": 0.0}, {"n": 1, "right": 0.0, "stand": 0.0},
    {"right": 0.0, "stand": 0.0}, {"right": 1.0, "stand": 1.0},
    {"shape": (1, 28, 28)}, {"shape": (4, 5, 9)}, {"shape": (3, 224, 300), "n": 30},
], ids=str)  # fmt: skip
def test_any_data_has_a_page(evaluation, facts):
    seen = page(evaluation(**facts))
    assert "nan" not in seen.text
    assert f"{100 * facts.get('stand', 0.5):.1f} %" in seen.text


def test_of_many_classes_the_weakest_are_shown_and_the_others_are_counted(evaluation):
    assert "20 of 100, the others are in results.json" in page(evaluation(classes=100, n=300)).text


def test_a_training_run_has_a_page_with_its_curves_and_its_recipe(run):
    folder = run()
    Image.new("RGB", (4, 4)).save(folder / "curves.png")
    seen = page(folder)
    assert seen.headings == ["Attacks", "Training", "Settings", "Where it comes from"]
    assert "robustmail verify" in seen.text
    assert "Stairs({0: 0.05, 5: 0.1})" in seen.text


def test_a_budget_is_the_same_in_words_and_in_the_picture(evaluation):
    text = page(evaluation(spec={"eps": 0.031, "norm": "linf"})).text
    assert "at eps 0.031 Linf" in text
    assert "evaluated: 0.031" in text


def test_an_l2_distance_is_no_number_of_255ths(evaluation):
    spec = {"eps": 0.5, "norm": "l2"}
    text = page(evaluation(spec=spec)).text
    assert re.search(r"apgd-t, [\d.]+ L2", text)
    assert "/255 Linf" not in text


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 6, 6)])
def test_an_example_is_shown_pixel_for_pixel(evaluation, shape):
    (example, *_), total = read_examples(evaluation(shape=shape))
    assert total == 12
    with Image.open(io.BytesIO(base64.b64decode(png(example.original).partition(",")[2]))) as image:
        assert image.mode == {1: "L", 3: "RGB"}[shape[0]]
        pixels = np.asarray(image).reshape(6, 6, -1).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels, np.round(example.original * 255))


def test_examples_are_spread_over_the_set(evaluation):
    examples, total = read_examples(evaluation(n=400, stand=0.2))
    assert (len(examples), total) == (12, 240)
    assert (examples[0].index, examples[-1].index) == (80, 319)


def test_a_large_image_is_shrunk():
    with Image.open(io.BytesIO(base64.b64decode(png(np.zeros((3, 224, 448), np.float32)).partition(",")[2]))) as image:
        assert image.size == (160, 80)


DAMAGE = {"results.json": b"{", "ledger.csv": b"index,label\n1,2\n", "examples.safetensors": b"12345678"}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_is_named_and_leaves_the_old_page(evaluation, file):
    folder = evaluation()
    before = write_page(folder).read_text()
    (folder / file).write_bytes(DAMAGE[file])
    with pytest.raises(RunError, match=f"{re.escape(file)}: is damaged"):
        write_page(folder)
    assert (folder / "report.html").read_text() == before


def test_a_damaged_section_is_an_error_of_the_file(evaluation):
    with pytest.raises(RunError, match=r"results\.json: is damaged"):
        write_page(evaluation(per_class=[{"class": 0}]))


def test_a_page_is_the_same_each_time(evaluation):
    folder = evaluation()
    assert write_page(folder).read_bytes() == write_page(folder).read_bytes()
