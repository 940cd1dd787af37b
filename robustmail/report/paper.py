"""What a leaderboard and a model card ask that no evaluation knows: the paper, its authors, the licence."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from robustmail.errors import RunError, did_you_mean

__all__ = ["Paper", "read_paper"]


@dataclass(frozen=True)
class Paper:
    """Facts of the user about a model; None where they are not given.

    name: in RobustBench, AuthorYearFirstword, as Rice2020Overfitting. title, authors, link, venue: of the paper;
    authors with commas between them, venue with the year. additional_data: was anything but the data set's own training
    images used? number_forward_passes: of the model, for one prediction. reported: robust accuracy in the paper, in %.
    checkpoint: where the weights and the code are. license: as the Hugging Face hub names it.
    """

    name: str | None = None
    title: str | None = None
    authors: str | None = None
    link: str | None = None
    venue: str | None = None
    additional_data: bool | None = None
    architecture: str | None = None
    number_forward_passes: int = 1
    reported: float | None = None
    footnote: str | None = None
    checkpoint: str | None = None
    license: str | None = None

    @property
    def identifier(self) -> str | None:
        """The name in RobustBench: as given, or of the first author's last name, the year and the title's first
        word; None where these are not known."""
        if self.name:
            return self.name
        author = re.split(r",| and ", self.authors or "")[0].split()
        year, word = re.search(r"\b(?:19|20)\d\d\b", self.venue or ""), re.search(r"[A-Za-z]+", self.title or "")
        if not (author and year and word):
            return None
        return re.sub(r"\W", "", author[-1]) + year[0] + word[0].capitalize()


def read_paper(path: Path | None) -> Paper:
    """Read a TOML file with the fields of `Paper`; without a file nothing is known.

    Raises RunError: no such file, not TOML, or a field that does not exist or is of another type.
    """
    if path is None:
        return Paper()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"--paper {path}", f"cannot be read ({error})", 'Write lines such as title = "...".') from error
    types = {field.name: str(field.type).split(" | ")[0] for field in fields(Paper)}
    for name, value in content.items():
        if name not in types:
            raise RunError(f"--paper {path}", f"has a field {name!r}, which is not known", did_you_mean(name, types))
        wanted = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}[types[name]]
        if not isinstance(value, wanted) or (isinstance(value, bool) and types[name] != "bool"):
            raise RunError(f"--paper {path}", f"{name} is {value!r}, not of type {types[name]}")
    paper = Paper(**content)
    if paper.name and not re.fullmatch(r"[A-Za-z][\w.-]*", paper.name):
        raise RunError(f"--paper {path}", f"name is {paper.name!r}", "Write it as Rice2020Overfitting.")
    return paper
