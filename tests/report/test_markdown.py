"""What a file says, in Markdown as GitHub and the Hugging Face hub show it: text, and nothing else."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from robustmail.report.markdown import block, code, escaped, table

HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "![a](http://x/y.png)",
    "# head", "- [x] done", "**bold** _it_ ~~no~~", "a | b", "`code`", "``` end", "http://evil.example/x", "&lt;b&gt;",
    "a\n\n# head", "---", "\x1b[31m red", "1. one", "> quote", "<!-- -->", "$x$", "\\", "`", "``", "",
)  # fmt: skip
HARMLESS = {"p", "h1", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}


def tokens(text: str) -> list:
    """All tokens of a text, those within paragraphs too; raw HTML is kept, as the hub does before it sanitises."""
    found = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return [inner for token in found for inner in (token, *(token.children or ()))]


def shown(text: str) -> str:
    """The words that a reader sees."""
    return "".join(token.content for token in tokens(text) if token.type in ("text", "code_inline", "text_special"))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("form", [escaped, code], ids=["prose", "code"])
def test_a_text_of_others_is_no_markup(text, form):
    line = table(["name", "x"], [[form(text), "1"]])
    for place in (f"before {form(text)} after", line):
        kinds = {token.type for token in tokens(place)}
        assert not kinds & {"link_open", "image", "html_block", "em_open", "strong_open", "s_open", "heading_open"}
        html = [token.content for token in tokens(place) if token.type == "html_inline"]
        assert set(html) <= {"<!-- -->"}
        assert "\x1b" not in place
    cells = [token for token in tokens(line) if token.type == "td_open"]
    assert len(cells) == 2


@pytest.mark.parametrize("text", ["[bold] 50 % of <b> & `x`", "a_b*c", "plain"])
def test_a_reader_sees_the_text_as_it_is(text):
    assert shown(escaped(text)) == text
    assert shown(code(text)).strip() == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_code_cannot_be_left(text):
    found = tokens(block(f"recipe\n{text}\nend") + "\n\nafter")
    fences = [token for token in found if token.type == "fence"]
    assert len(fences) == 1
    assert fences[0].content.endswith("end\n")
    assert [token.content for token in found if token.type == "inline"] == ["after"]


def test_nobody_is_mentioned_and_no_address_becomes_a_link():
    assert "@torvalds" not in escaped("ask @torvalds")
    assert "http://" not in escaped("see http://x.example")
