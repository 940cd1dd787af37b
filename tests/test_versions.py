"""Versions are told in several places, which agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import robustmail

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lowest_versions_are_those_of_pyproject():
    lowest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "lowest.txt").read_text(), re.MULTILINE))
    allowed = dict(text.split(">=") for text in PROJECT["dependencies"])
    assert lowest.keys() == allowed.keys()
    assert [name for name, least in allowed.items() if not lowest[name].startswith(least)] == []


def test_changelog_citation_and_package_have_one_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", robustmail.__version__]
    assert cited is not None
    assert cited[1] == robustmail.__version__


def test_the_page_about_installation_has_every_extra_and_the_lowest_versions():
    page = (ROOT / "docs" / "installation.md").read_text()
    extras = page.partition("## Extras")[2].partition("\n## ")[0]
    assert [name for name in PROJECT["optional-dependencies"] if f"`{name}`" not in extras] == []
    versions = page.partition("## Versions")[2].partition("\n## ")[0]
    for name in ("torch", "torchvision", "torchattacks", "adversarial-robustness-toolbox", "timm"):
        assert next(text for text in PROJECT["dependencies"] if text.startswith(f"{name}>=")).split(">=")[1] in versions
    assert PROJECT["requires-python"].removeprefix(">=") in versions
