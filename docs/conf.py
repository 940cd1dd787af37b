"""How Sphinx builds the site, `tox -e docs`. Its source folder is the repository, for links to be those of a forge."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sphinx.addnodes import desc_signature, pending_xref  # noqa: E402

from docs._site import docstrings, generated, names  # noqa: E402
from robustmail import __version__  # noqa: E402
from robustmail.recipe import Recipe  # noqa: E402

project = "robustmail"
project_copyright = "2026, the robustmail developers"
version = release = __version__
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/**.md",
    "docs/notebooks/*.ipynb",
]
exclude_patterns = [".*", "site", "dist", "runs", "evals", "trials", "data"]  # neither read nor searched for pages
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

nb_execution_mode = os.environ.get("NOTEBOOKS", "off")  # tox -e docs runs them, with "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # they write files
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # tqdm's wish for ipywidgets, with a path of the builder

highlight_language = "text"  # of blocks without one; with "none", pages of source have no colours either
smartquotes = False  # x' and --n stay what they are
autodoc_type_aliases = {"Record": "robustmail.records.Record"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [
    ("py:.*", r"(?!robustmail\.).*"),  # Python's and torch's types; their pages need a network
    ("py:.*", r"robustmail\.(\w+\.)+(MarginFunction|Plugin|Record|ComputeModels|Batch)"),  # names of types within
]

html_theme = "furo"
html_title = f"robustmail {release}"
html_copy_source = False
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_extra_path = ["_site/root"]  # index.html, which leads to docs/index.html

LINKS = names.documented()


def setup(app: Any) -> None:
    """Connect what is ours."""
    app.connect("source-read", read_page)
    app.connect("doctree-read", link_folders)
    app.connect("doctree-read", add_anchors)
    app.connect("autodoc-process-docstring", convert_docstring)
    app.connect("autodoc-process-signature", shorten_signature)


def read_page(app: Any, document: str, content: list[str]) -> None:
    """Write what is generated into a page, and the navigation into the index."""
    text = generated.expand(content[0], ROOT / Path(document).parent)
    content[0] = generated.navigation(text) if document == root_doc else text


def link_folders(app: Any, tree: Any) -> None:
    """A link to a folder leads to its README.md, as on a forge."""
    for node in tree.findall(pending_xref):
        page = (Path(app.env.doc2path(app.env.docname)).parent / node["reftarget"] / "README.md").resolve()
        if node["reftype"] == "myst" and page.is_file():
            document = page.relative_to(ROOT).with_suffix("").as_posix()
            node["refdomain"], node["reftarget"], node["reftargetid"] = "doc", document, None


def add_anchors(app: Any, tree: Any) -> None:
    """Both anchors for each name, `robustmail.PGD` and `robustmail.attacks.pgd.PGD`; pages of source link to either."""
    for node in tree.findall(desc_signature):
        if (module := node.get("module")) and (path := node["fullname"]):
            value = getattr(import_module(module), path.partition(".")[0])
            anchors = [f"{home}.{path}" for home in ("robustmail", value.__module__)]
            node["ids"] += [anchor for anchor in anchors if anchor not in node["ids"]]


def convert_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """From our style of docstrings to reStructuredText. A recipe's fields are described one by one elsewhere."""
    own = parameters_of(value)
    parts = docstrings.parse("\n".join(lines), own)
    if value is Recipe:
        parts.parameters.clear()
    lines[:] = docstrings.to_rst(parts, lambda text: None if text in own else LINKS.get(text))


def parameters_of(value: Any) -> set[str]:
    """The names of the parameters, or fields, of a function or a class."""
    try:
        found = set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        found = set()
    return found | set(getattr(value, "__dataclass_fields__", ()))


def shorten_signature(
    app: Any, what: str, name: str, value: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """The parameters of a dataclass as its source has them: `eps: float = 8/255`."""
    if value is Recipe:
        return "(*, data, model, attack, objective, epochs, ...)", None
    if not (inspect.isclass(value) and dataclasses.is_dataclass(value)):
        return arguments, returns and re.sub(r"TypeAliasForwardRef\('[\w.]*\.(\w+)'\)", r"\1", returns)
    fields = [field for field in dataclasses.fields(value) if field.init]
    shown = [f"{f.name}: {f.type}" + (f" = {text}" if (text := generated.default_text(f)) else "") for f in fields]
    stars = ["*"] if any(field.kw_only for field in fields) else []
    return f"({', '.join(stars + shown)})", None
