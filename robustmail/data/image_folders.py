"""Folders of images: which are splits, which are classes, which file is of which class; then the images themselves.

What a folder is follows from its structure, and whatever could be two things is refused:

    train/<class>/...   with val/ or test/ beside it, under any usual name and in any letter case
    <class>/...         classes alone
    val/images/...      with val_annotations.txt, as Tiny-ImageNet has it
    images/...          with labels.csv or metadata.csv, of columns file and label

Classes are numbered in the order of their names as text, as torchvision's ImageFolder does.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustmail.data.image_files import ImageFiles, Preprocess, StreamedSplit
from robustmail.errors import DataError, in_brief
from robustmail.runtime.untrusted import printable
from robustmail.text import plural

__all__ = ["Listing", "class_folders", "stream_images", "to_evaluate", "to_train", "wordnet_names"]

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
          "testing": "test"}  # fmt: skip
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has it
HIDDEN = ("__MACOSX", "__pycache__", "@eaDir")  # and whatever begins with a dot
ANNOTATIONS = ("val_annotations.txt", "labels.csv", "metadata.csv")  # files that label images
FILE = ("file", "file_name", "filename", "image", "path", "id")  # columns of the csv ones
LABEL = ("label", "class", "target")
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml")  # others that may, and are named where labels lack
DEEP = 50  # folders within one another


@dataclass(frozen=True)
class Listing:
    """Image files and their classes, [N] each, sorted by class and name; notes: what must be said of them."""

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def with_notes(self, *notes: str) -> Listing:
        """The same with more to say."""
        return replace(self, notes=(*self.notes, *notes))


def to_evaluate(who: str, folder: Path) -> Listing:
    """The labelled images of a folder: those of its test split, else of its val split, else of its classes.

    Raises DataError where it cannot be told what is of which class, or where all images are of one.
    """
    tree = _unwrapped(_scan(who, folder))
    splits = _splits(who, tree)
    if not splits:
        return _beside_train(who, tree)
    train = splits.get("train")
    return _chosen(who, tree, splits, _listed(who, train).classes if train else _wnids(who, tree.path))


def class_folders(who: str, folder: Path, known: tuple[str, ...] | None) -> Listing:
    """The images of folder/<class>/, whatever the classes are called; known: all classes, which fix the numbers."""
    return _listed(who, _scan(who, folder), known)


def to_train(who: str, folder: Path) -> tuple[Listing, Listing]:
    """(images to train on, images to evaluate on): those of the train split, and of test, else val.

    Raises DataError where one is missing, or where the second has classes that the first lacks.
    """
    tree = _unwrapped(_scan(who, folder))
    splits = _splits(who, tree)
    if missing := next((names for names in (("train",), ("test", "val")) if not splits.keys() & set(names)), None):
        wrong = f"has no folder {' or '.join(f'{name}/' for name in missing)}"
        raise DataError(who, wrong, "Make train/<class>/ and test/<class>/ with images.")
    train = _listed(who, splits["train"])
    return train, _chosen(who, tree, splits, train.classes)


def _chosen(who: str, tree: _Tree, splits: dict[str, _Tree], known: tuple[str, ...] | None) -> Listing:
    """The images of the first of test and val that has labels."""
    notes = [f"{f.name}/ is no split and is left out" for f in tree.folders if not f.split] + _stray(tree)
    for tried in (splits[name] for name in ("test", "val") if name in splits):
        if _labelled(tried, known):
            there = ", ".join(f"{split.name}/" for split in splits.values())
            return _listed(who, tried, known).with_notes(*notes, f"{tried.name}/ is evaluated (there are {there})")
        notes.append(f"{tried.name}/ has no labels and is left out")
    todo = f"Pass {splits['train'].path} to evaluate on it." if "train" in splits else "Make test/<class>/ with images."
    raise DataError(who, "; ".join(["has no labelled test/ or val/", *notes]), todo)


def stream_images(who: str, listing: Listing, preprocess: Preprocess | None = None) -> StreamedSplit:
    """The images of a listing, decoded when they are indexed: uint8, grey where all are, else RGB, as stored or
    resized. Nothing is opened yet."""
    labels = torch.tensor(listing.labels, dtype=torch.int64)
    return StreamedSplit(ImageFiles(who, listing.files, preprocess), labels)


# What lies where


@dataclass(frozen=True)
class _Tree:
    """A folder: its own images, the folders in it that hold an image at any depth, those that hold none, other files;
    each in the order of names as text."""

    path: Path
    images: tuple[Path, ...]
    folders: tuple[_Tree, ...]
    empty: tuple[str, ...]
    others: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def split(self) -> str | None:
        """The split that the folder is called by."""
        return SPLITS.get(self.place.name.lower())

    @property
    def place(self) -> Path:
        """Its path with a name at the end, links not resolved."""
        return Path(os.path.abspath(self.path))

    @property
    def annotations(self) -> Path | None:
        """The file that labels its images, where they are not sorted into folders."""
        found = [self.path / name for name in ANNOTATIONS if self.path / name in self.others]
        return found[0] if found and all(f.name == "images" for f in self.folders) else None

    @property
    def annotated(self) -> bool:
        """Are its images labelled by a file, and not sorted into folders?"""
        return self.annotations is not None

    def walk(self) -> Iterator[_Tree]:
        """Itself and all folders below."""
        yield self
        for inner in self.folders:
            yield from inner.walk()


def _scan(who: str, folder: Path, above: tuple[str, ...] = ()) -> _Tree:
    """What is in a folder; links are followed, but none back up, and what is hidden is not there."""
    here = (*above, os.path.realpath(folder))
    if len(here) > DEEP:
        raise DataError(who, f"has folders within folders, {DEEP} deep", f"Pass {here[-1]}, if it is that one.")
    try:
        with os.scandir(folder) as found:
            seen = sorted((e for e in found if e.name[0] != "." and e.name not in HIDDEN), key=lambda e: e.name)
            folders = [e.name for e in seen if e.is_dir()]
    except OSError as error:
        raise DataError(who, f"{folder} cannot be read ({error.strerror})") from error
    files = [folder / e.name for e in seen if e.name not in folders]
    inner = [_scan(who, folder / name, here) for name in folders if os.path.realpath(folder / name) not in here]
    filled = tuple(tree for tree in inner if tree.images or tree.folders)
    return _Tree(
        folder, tuple(f for f in files if f.suffix.lower() in IMAGES), filled,
        tuple(tree.name for tree in inner if tree not in filled),
        tuple(f for f in files if f.suffix.lower() not in IMAGES),
    )  # fmt: skip


def _unwrapped(tree: _Tree) -> _Tree:
    """The folder that an archive has wrapped once more: pets/pets/, or the only folder, where it has splits in it."""
    if tree.images or len(tree.folders) != 1 or tree.folders[0].split:
        return tree
    (inner,) = tree.folders
    same = inner.name.lower() == tree.place.name.lower() and len(inner.folders) > 1
    return _unwrapped(inner) if same or (inner.folders and all(f.split for f in inner.folders)) else tree


def _splits(who: str, tree: _Tree) -> dict[str, _Tree]:
    """{"train": ..., "val": ..., "test": ...}, those that a folder has; none for a folder of classes."""
    named = [f for f in tree.folders if f.split]
    others = [f for f in tree.folders if not f.split]
    sure = any(f.annotated or (not f.images and len(f.folders) > 1) for f in named)
    if not named or (others and not sure and tree.split):  # within a split all are classes
        return {}
    if others and not sure:
        wrong = f"{named[0].name}/ may be a split, or a class beside {others[0].name}/"
        raise DataError(who, wrong, f"Rename it, or pass {named[0].path}.")
    found: dict[str, _Tree] = {}
    for folder in named:
        first = found.setdefault(str(folder.split), folder)
        if first is not folder:
            raise DataError(who, f"has two folders for one split, {first.name}/ and {folder.name}/", "Move one away.")
    return found


def _labelled(tree: _Tree, known: tuple[str, ...] | None) -> bool:
    """Is a split one of labelled images? A single folder is a class only where the training images have it."""
    names = {f.name for f in tree.folders}
    return tree.annotated or len(names) > 1 or bool(names and names <= set(known or ()))


def _beside_train(who: str, tree: _Tree) -> Listing:
    """The images of a folder of classes; in one called test or val they are numbered as those of train/ beside it."""
    above = tree.place.parent
    beside = sorted(f for f in above.iterdir() if SPLITS.get(f.name.lower()) == "train") if tree.split else []
    if tree.split in (None, "train") or not beside or not beside[0].is_dir():
        return _listed(who, tree, _wnids(who, above) if tree.annotated else None)
    train = _scan(who, beside[0])
    known, mine = {f.name for f in train.folders}, {f.name for f in tree.folders}
    if train.images or len(known) < 2 or (known.isdisjoint(mine) and not tree.annotated):  # of something else
        return _listed(who, tree)
    found = _listed(who, tree, _listed(who, train).classes)
    return found.with_notes(f"classes are numbered as in {train.name}/ beside it") if known != mine else found


# What is of which class


def _listed(who: str, tree: _Tree, known: tuple[str, ...] | None = None) -> Listing:
    """The images of folder/<class>/, or of a folder with val_annotations.txt; known: classes that fix the numbers."""
    if tree.annotated:
        return _annotated(who, tree, known)
    names = tuple(f.name for f in tree.folders)
    if not names:
        wrong = f"{tree.path} has images, but no folder for each class" if tree.images else f"{tree.path} has no images"
        raise DataError(who, wrong, _table_todo(tree) or "Make <class>/ with images for every class.")
    if extra := [name for name in names if known and name not in known]:
        raise DataError(who, f"{tree.name} has classes that train lacks: {', '.join(extra[:5])}")
    if tree.empty and not known:
        wrong = f"{tree.path / tree.empty[0]} holds no image, so that the numbers of the classes are in doubt"
        raise DataError(who, wrong, f"Images end in {', '.join(IMAGES)}. Delete it, or move it away.")
    classes = known or names
    if len(classes) < 2:
        inner = ", ".join(f.name for f in tree.folders[0].folders[:3])
        todo = f"Pass {tree.folders[0].path} if {inner} are the classes." if "," in inner else "Pass a folder of two."
        raise DataError(who, f"all images are of one class, {tree.folders[0].path}", _table_todo(tree) or todo)
    files = [(file, classes.index(c.name)) for c in tree.folders for file in _of_class(who, c)]
    return Listing(
        tree.path, tuple(f for f, _ in files), tuple(y for _, y in files), classes, tuple(_notes(tree, classes))
    )


def _of_class(who: str, tree: _Tree) -> list[Path]:
    """The images of one class. They may lie in one folder within, but not in several, which may be classes."""
    within = tree
    while not within.images and len(within.folders) == 1:
        (within,) = within.folders
    doubtful = within.folders if not within.images else [f for f in within.folders if f.split]
    if doubtful:
        names = ", ".join(f"{f.name}/" for f in doubtful[:3])
        wrong = f"{within.path} has folders in it, {names} which may be classes or splits of their own"
        raise DataError(who, wrong, f"Pass it if they are; put the images of {tree.name} into one folder if not.")
    return [image for folder in tree.walk() for image in folder.images]


def _notes(tree: _Tree, classes: tuple[str, ...]) -> Iterator[str]:
    """What is left out, and in which order numbers are."""
    yield from _stray(tree)
    if others := [file for c in tree.folders for folder in c.walk() for file in folder.others]:
        yield f"left out: {plural(len(others), 'file')} of other kinds, such as {others[0]}"
    if len(tree.folders) == 1:
        yield f"all images are of one class, {tree.folders[0].name}"
    if all(name.isdecimal() for name in classes) and sorted(classes, key=int) != list(classes):
        start = ", ".join(classes[:4])
        yield f"classes are in the order of their names as text, as torchvision's ImageFolder has it: {start}, ..."


def _stray(tree: _Tree) -> list[str]:
    """A sentence where images lie beside folders."""
    count = len(tree.images)
    return [f"left out: {plural(count, 'image')} beside the folders, such as {tree.images[0].name}"] if count else []


def _table_todo(tree: _Tree) -> str:
    """What to do with a table beside the images, or beside their folder, that may label them; "" without one."""
    above = sorted(tree.path.parent.iterdir()) if tree.split else []
    beside = [f for f in above if f.stem == tree.name and f.is_file()]
    found = next((f for f in (*tree.others, *beside) if f.suffix.lower() in TABLES), None)
    if found is None:
        return ""
    return f"{found} is not read: make it {tree.path / 'labels.csv'} with columns file and label, or make <class>/."


def _tab_lines(who: str, place: Path) -> list[tuple[str, str]]:
    """(file, class) of lines `file<TAB>class<TAB>box`."""
    rows = [line.split("\t") for line in _text(who, place).splitlines() if line.strip()]
    if short := next((row for row in rows if len(row) < 2), None):
        raise DataError(
            who, f"{place}: {short[0][:40]!r} has no class", "A line is file, class, box, with tabs between."
        )
    return [(row[0], row[1].strip()) for row in rows]


def _csv_lines(who: str, place: Path) -> list[tuple[str, str]]:
    """(file, class) of the rows of a csv file; a file may be given with its folder, images/0.png."""
    text = _text(who, place).removeprefix("\ufeff")  # which Excel writes
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(who, f"{place} cannot be read ({in_brief(error)})") from error
    columns = [str(name) for name in (rows[0] if rows else {})]
    file, label = (next((c for w in known for c in columns if c.lower().strip() == w), None) for known in (FILE, LABEL))
    if file is None or label is None:
        wrong = f"{place} has the columns {', '.join(map(printable, columns[:9])) or 'none'}"
        raise DataError(who, wrong, "It needs file and label.")
    found = [(str(row[file]).removeprefix("images/"), str(row[label] or "").strip()) for row in rows]
    if empty := next((name for name, value in found if not value), None):
        raise DataError(who, f"{place}: {empty[:40]!r} has no class")
    return found


def _numbered(labels: set[str]) -> tuple[str, ...]:
    """The classes in the order of their numbers: whole numbers are these themselves, else names as text."""
    if all(label.isdecimal() and len(label) < 7 for label in labels):
        return tuple(map(str, range(max(map(int, labels)) + 1)))
    return tuple(sorted(labels))


def _annotated(who: str, tree: _Tree, known: tuple[str, ...] | None) -> Listing:
    """Images that a file labels."""
    place = tree.annotations or tree.path
    rows = (_csv_lines if place.suffix == ".csv" else _tab_lines)(who, place)
    label = dict(rows)
    if len(label) < len(rows):
        twice = next(name for name, count in Counter(name for name, _ in rows).items() if count > 1)
        raise DataError(who, f"{place} has {twice[:40]!r} twice")
    classes = known or _numbered(set(label.values()))
    if extra := sorted(set(label.values()) - set(classes)):
        raise DataError(who, f"{place} has classes that train lacks: {', '.join(extra[:5])}")
    if len(classes) < 2:
        raise DataError(who, f"all images are of one class, says {place}", "Pass a folder of two.")
    files = {file.name: file for folder in tree.walk() for file in folder.images}
    if odd := sorted(files.keys() ^ label.keys()):
        wrong = f"has no line for {odd[0]}" if odd[0] in files else f"speaks of {odd[0]}, which is not there"
        raise DataError(who, f"{place} {wrong}")
    order = sorted((classes.index(label[name]), name) for name in files)
    note = f"labels are those of {place}"
    return Listing(tree.path, tuple(files[name] for _, name in order), tuple(y for y, _ in order), classes, (note,))


def _wnids(who: str, folder: Path) -> tuple[str, ...] | None:
    """The classes of a Tiny-ImageNet without its train/, in the order that train/ has."""
    place = folder / "wnids.txt"
    return tuple(sorted(set(_text(who, place).split()))) if place.is_file() else None


def wordnet_names(listing: Listing) -> tuple[str, ...]:
    """The names of the classes, where words.txt beside the splits has one for each number: n02124075 -> Egyptian cat.

    Of two classes that share a word, both keep their number: crane (n02012849).
    """
    place = listing.folder.parent / "words.txt"
    lines = _text(str(listing.folder), place).splitlines() if place.is_file() else []
    words = {number: text.split(",")[0].strip() for number, _, text in (line.partition("\t") for line in lines)}
    if not all(words.get(name) for name in listing.classes):
        return listing.classes
    count = Counter(words[name] for name in listing.classes)
    return tuple(f"{words[n]} ({n})" if count[words[n]] > 1 else words[n] for n in listing.classes)


def _text(who: str, path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise DataError(who, f"{path} is no file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(who, f"{path} cannot be read ({in_brief(error)})") from error
