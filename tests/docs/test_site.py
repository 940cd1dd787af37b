"""The site: it lacks nothing public and no word of a docstring, its links lead somewhere, and it needs no network."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

import robustmail
from docs._site import docstrings, generated
from docs._site.names import GROUPS, full_names
from robustmail.cli.main import app
from tests.docs.pages import ROOT

SHOWN = [full for group in GROUPS for full in full_names(group)]


def value_of(full: str):
    module, _, name = full.rpartition(".")
    return getattr(import_module(module), name)


def test_the_reference_has_every_public_name_once():
    assert Counter(SHOWN).most_common(1)[0][1] == 1
    assert {f"robustmail.{name}" for name in robustmail.__all__} <= {*SHOWN}


def test_the_reference_has_every_verb_with_all_options():
    page = generated.expand("<!-- built: verbs -->", ROOT)
    sections = dict(section.partition("\n")[::2] for section in re.split(r"^##+ ", page, flags=re.MULTILINE))
    for name, verb in typer.main.get_command(app).commands.items():
        shown = re.findall(r"--[a-z][a-z-]*", " ".join(re.findall(r"{option} (.*)", sections[name])))
        assert {*shown} == {opt for p in verb.params for opt in p.opts if opt.startswith("--")}


def test_the_reference_has_every_field_of_a_recipe():
    page = generated.expand("<!-- built: recipe -->", ROOT)
    assert re.findall(r"attribute:: (\w+)", page) == list(robustmail.Recipe.__dataclass_fields__)


def parameters(value) -> set[str]:
    return {*inspect.signature(value).parameters} if callable(value) else set()


@pytest.mark.parametrize("full", SHOWN)
def test_a_docstring_loses_no_word_and_keeps_no_parameter_in_its_prose(full: str):
    value = value_of(full)
    text, names = inspect.getdoc(value), parameters(value)
    parts = docstrings.parse(text, names)
    said = [*parts.prose, *(f"{name}: {said}" for name, said in parts.parameters.items()), *parts.raises]
    assert Counter(text.replace("Raises ", "").split()) == Counter(" ".join(said).replace("Raises ", "").split())
    left = re.findall(r"(?:^|\. )(\w+): ", "\n".join(part for part in parts.prose if part[0] != " "), re.MULTILINE)
    assert not names & {*left}


def test_what_would_be_markup_in_a_docstring_is_shown_as_it_is():
    docutils = pytest.importorskip("docutils.core", reason="needs docutils: pip install --group docs")
    text = "KL(p || p') * x_ and |E(x)|, `a_b`, max_{j != y} z_j.\n\nlow, high: 2 * x_. Raises ValueError for `x`."
    lines = docstrings.to_rst(docstrings.parse(text, ["low", "high"]), lambda _: None)
    tree = docutils.publish_doctree("\n".join(lines), settings_overrides={"report_level": 1, "halt_level": 1})
    assert " ".join(tree.astext().split()) == (
        "KL(p || p') * x_ and |E(x)|, a_b, max_{j != y} z_j. Parameters low, high: 2 * x_. Raises ValueError for x."
    )


# The built site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in $SITE, which `tox -e docs` has built, or a new one."""
    if built := os.environ.get("SITE"):
        return Path(built)
    if not (find_spec("furo") and find_spec("myst_nb")):
        pytest.skip("needs Sphinx, MyST-NB and furo: pip install --group docs")
    folder = tmp_path_factory.mktemp("site")
    words = ["sphinx", "-W", "--keep-going", "-n", "-q", "-c", "docs", "-d", f"{folder}-doctrees", ".", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {str(given[key]) for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        self.loaded += [str(given[key]) for key in ("src", "href") if tag != "a" and given.get(key)]


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(site: Path):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert site / "docs" / "index.html" in pages
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.loaded):
            file, _, anchor = link.partition("#")
            if re.match(r"https?:|data:", file):
                continue
            to = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            if not to.exists() or (anchor and to in pages and unquote(anchor) not in pages[to].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


@pytest.mark.long
def test_the_site_needs_no_network_and_names_no_folder_of_its_builder(site: Path):
    for path in site.rglob("*.html"):
        assert not [link for link in Page(path).loaded if re.match(r"(https?:)?//", link)]
    texts = [path for path in site.rglob("*") if path.suffix in (".html", ".js", ".css", ".inv", ".json")]
    assert not [path for path in texts if str(ROOT).encode() in path.read_bytes()]


@pytest.mark.long
def test_the_search_knows_words_and_the_names_of_all_that_is_public(site: Path):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {"margin", "autoattack"} <= index["terms"].keys()
    assert {*robustmail.__all__} <= {entry[4] for entry in index["objects"]["robustmail"]}
