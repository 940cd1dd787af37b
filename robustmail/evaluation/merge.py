"""Put the shards of one evaluation together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from robustmail.errors import RunError
from robustmail.evaluation.evaluator import attack_result
from robustmail.evaluation.examples import write_examples
from robustmail.evaluation.ledger import concatenate, rows_as_text
from robustmail.evaluation.storage import FILES, StoredEvaluation, read_evaluation, summed_again, with_seal
from robustmail.evaluation.task import check_same
from robustmail.records import AttackResult
from robustmail.runtime.files import atomic_write_json, atomic_write_text, folder_lock, make_folder

__all__ = ["merge_into", "merge_shards"]


def merge_shards(folders: list[Path], to: Path, again: bool = False) -> None:
    """Merge the shards of an evaluation; the ledger is the one that a single process would have written.

    folders: of the shards, each of them once. to: folder of the merged evaluation. again: whether `to` may hold an
    unfinished result of this evaluation, as `open_whole` leaves it.
    Raises RunError: shards of different evaluations or with different attacks, unfinished shards, or not all of them.
    """
    write = _prepare_merge(folders, to)
    make_folder(to, FILES, "evaluation")
    if (to / "results.json").exists() and not again:
        raise RunError(str(to), "holds results already", "Pass another --out.")
    with folder_lock(to):
        write()


def merge_into(folders: list[Path], to: Path) -> None:
    """As `merge_shards`, into a folder that the caller has made and locked."""
    _prepare_merge(folders, to)()


def _prepare_merge(folders: list[Path], to: Path) -> Callable[[], None]:
    """Check shards and concatenate them; returns a function that writes the merged evaluation."""
    if not folders:
        raise RunError("merge", "nothing to merge", "Name the shards' folders.")
    shards = [read_evaluation(folder, strict=True) for folder in folders]
    _check_shards(shards)
    ledger = concatenate([shard.ledger for shard in shards])
    position = {int(index): i for i, index in enumerate(ledger.index)}
    rows = sorted((row for shard in shards for row in shard.rows), key=lambda row: int(row["index"]))
    first = shards[0].results
    measured = next((shard.results["measured"] for shard in shards if shard.results["measured"]), None)
    attacks = [attack_result(ledger, AttackResult(**row), first["spec"]["seed"]) for row in first["attacks"]]
    seconds = sum(shard.results["provenance"]["seconds"] for shard in shards)
    results = {
        **first, "n": len(ledger), "shard": None,
        **summed_again(to, ledger, attacks, first["data"]["classes"], measured),
        "provenance": {**first["provenance"], "seconds": seconds, "merged": [str(shard.folder) for shard in shards]},
    }  # fmt: skip
    originals = {position[index]: x for shard in shards for index, x in shard.originals_by_index.items()}

    def write() -> None:
        write_examples(to, ledger, originals)
        atomic_write_text(to / "ledger.csv", rows_as_text(rows))
        atomic_write_json(to / "results.json", with_seal(results))

    return write


def _check_shards(shards: list[StoredEvaluation]) -> None:
    """Refuse what are not all finished shards of one evaluation (raises RunError)."""
    first = shards[0]
    attacks = first.results["spec"]["attacks"]
    for shard in shards:
        check_same(first.results, shard.results, shard.folder)
        if not shard.results["shard"]:
            raise RunError(str(shard.folder), "is a whole evaluation, not a shard", "There is nothing to merge.")
        if not shard.results["complete"]:
            raise RunError(str(shard.folder), "is not finished", "Run the same command again until it is.")
        if (own_attacks := shard.results["spec"]["attacks"]) != attacks:
            wrong = f"was attacked by {', '.join(own_attacks)}, {first.folder} by {', '.join(attacks)}"
            raise RunError(str(shard.folder), wrong, "Run the same attacks, in the same order, on every shard.")
    numbers = sorted(shard.results["shard"][0] for shard in shards)
    count = first.results["shard"][1]
    if numbers != list(range(1, count + 1)):
        given = ", ".join(map(str, numbers))
        raise RunError("merge", f"given the shards {given} of {count}", f"Name each of 1 ... {count} once.")
