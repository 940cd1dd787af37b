"""Put the shards of one evaluation together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from robustmail.errors import RunError
from robustmail.evaluation.evaluator import attack_result
from robustmail.evaluation.examples import write_examples
from robustmail.evaluation.ledger import concatenate, rows_as_text
from robustmail.evaluation.storage import FILES, _by_index, read_evaluation, summed_again, with_seal
from robustmail.evaluation.task import _same
from robustmail.records import AttackResult
from robustmail.runtime.files import atomic_write_json, atomic_write_text, folder_lock, make_folder

__all__ = ["merge_into", "merge_shards"]


def merge_shards(folders: list[Path], to: Path, again: bool = False) -> None:
    """Put the shards of one evaluation together; the ledger is the one that a single process would have written.

    again: `to` may hold an unfinished result of this evaluation, as `open_whole` leaves it.

    Raises RunError for shards of different evaluations, unfinished ones, or too few.
    """
    write = _joined(folders, to)
    make_folder(to, FILES, "evaluation")
    if (to / "results.json").exists() and not again:
        raise RunError(str(to), "holds results already", "Pass another --out.")
    with folder_lock(to):
        write()


def merge_into(folders: list[Path], to: Path) -> None:
    """As `merge_shards`, into a folder that the caller has made and locked."""
    _joined(folders, to)()


def _joined(folders: list[Path], to: Path) -> Callable[[], None]:
    """What writes the whole of some shards, once they are checked and put together."""
    if not folders:
        raise RunError("merge", "nothing to merge", "Name the shards' folders.")
    held = [read_evaluation(folder, strict=True) for folder in folders]
    first = held[0].results
    for other in held:
        _same(first, other.results, other.folder)
        if not other.results["shard"]:
            raise RunError(str(other.folder), "is a whole evaluation, not a shard", "There is nothing to merge.")
        if not other.results["complete"]:
            raise RunError(str(other.folder), "is not finished", "Run the same command again until it is.")
        if (tried := other.results["spec"]["attacks"]) != first["spec"]["attacks"]:
            wrong = f"was attacked by {', '.join(tried)}, {held[0].folder} by {', '.join(first['spec']['attacks'])}"
            raise RunError(str(other.folder), wrong, "Run the same attacks, in the same order, on every shard.")
    there = sorted(other.results["shard"][0] for other in held)
    of = first["shard"][1]
    if there != list(range(1, of + 1)):
        said = ", ".join(map(str, there))
        raise RunError("merge", f"given the shards {said} of {of}", f"Name each of 1 ... {of} once.")
    ledger = concatenate([other.ledger for other in held])
    place = {int(index): i for i, index in enumerate(ledger.index)}
    rows = sorted((row for other in held for row in other.rows), key=lambda row: int(row["index"]))
    measured = next((other.results["measured"] for other in held if other.results["measured"]), None)
    attacks = [attack_result(ledger, AttackResult(**row), first["spec"]["seed"]) for row in first["attacks"]]
    seconds = sum(other.results["provenance"]["seconds"] for other in held)
    results = {
        **first, "n": len(ledger), "shard": None,
        **summed_again(to, ledger, attacks, first["data"]["classes"], measured),
        "provenance": {**first["provenance"], "seconds": seconds, "merged": [str(other.folder) for other in held]},
    }  # fmt: skip
    originals = {place[i]: x for other in held for i, x in _by_index(other).items()}

    def write() -> None:
        write_examples(to, ledger, originals)
        atomic_write_text(to / "ledger.csv", rows_as_text(rows))
        atomic_write_json(to / "results.json", with_seal(results))

    return write
