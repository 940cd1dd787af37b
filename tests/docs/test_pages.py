"""The pages themselves: links lead somewhere, paths and fields that they name exist, decisions have their form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustmail import PGD, Recipe, State
from robustmail.catalog import KINDS, catalog_entries
from robustmail.config.loader import find_plugin
from tests.docs.pages import INLINE, PAGES, ROOT, blocks, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?[\w-]*\.(py|md|toml|ini|cff)|(robustmail|tests|docs|recipes)(/[\w-]+)+/?")
PLACEHOLDERS = ("DIR/", "mine.py", "paper.toml", "file.py", "recipe.py", "robustmail/x/", "tests/x/")
FIELD = re.compile(r"(attack|objective|weighter|perturbation|optimizer|data)\.(\w+)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_to_pages_and_headings(page: Path):
    for target in LINK.findall(prose(page)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


@each_page
def test_files_that_a_page_names_exist(page: Path):
    if page.name == "CHANGELOG.md":
        return
    for (text,) in ((found[1],) for found in INLINE.finditer(prose(page))):
        name = text.partition(":")[0]
        if PATH.fullmatch(name) and not name.startswith(PLACEHOLDERS):
            places = [ROOT / name, ROOT / "robustmail" / name, ROOT / "docs" / name]
            assert any(place.exists() for place in places), text


def fields(kind: str) -> set[str]:
    """The fields of all our plugins of a kind."""
    values = [find_plugin(name, KINDS[kind].plural) for name in catalog_entries(KINDS[kind].plural)]
    return {name for value in [*values, PGD] for name in getattr(value, "__dataclass_fields__", ())}


@each_page
def test_fields_of_a_recipe_that_a_page_names_exist(page: Path):
    own = "".join(block.text for block in blocks("python") if block.page == page)
    of_the_page = set(re.findall(r"^    (\w+): \w+ = ", own, re.MULTILINE))
    for text in INLINE.findall(prose(page)):
        for kind, field in FIELD.findall(text) if re.match(r"[\w.]+(=|$| x| ×)", text) else []:
            assert kind in Recipe.__dataclass_fields__
            assert field in fields(kind) | of_the_page, text


@each_page
def test_attributes_of_a_state_or_a_recipe_that_a_page_names_exist(page: Path):
    for owner, name in re.findall(r"`(state|recipe)\.(\w+)", prose(page)) if page.name != "CHANGELOG.md" else []:
        is_file = name in ("py", "json", "pt")
        value = {"state": State, "recipe": Recipe}[owner]
        assert is_file or hasattr(value, name) or name in value.__dataclass_fields__, f"{owner}.{name}"


def test_the_index_lists_every_page():
    linked = {Path(target.partition("#")[0]).name for target in LINK.findall(prose(ROOT / "docs" / "index.md"))}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.name == "decisions" and p.name != "README.md"], ids=lambda page: page.stem
)
def test_a_decision_has_date_status_context_alternatives_and_consequences(page: Path):
    text = page.read_text(encoding="utf-8")
    title, _, date, *_ = text.splitlines()
    assert title.startswith(f"# {int(page.stem[:3])}. ")
    assert re.match(r"Date: \d{4}-\d\d-\d\d(, revised \d{4}-\d\d-\d\d)?\. Status: (accepted|replaced)", date)
    parts = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert parts == ["Context", "Decision", "Alternatives", "Consequences"]
