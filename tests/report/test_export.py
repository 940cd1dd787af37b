"""Folders side by side, in every format, read back."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.cells import cell_len

from robustmail.errors import RunError
from robustmail.report.export import FORMATS, export

ODD = r"[x]* 50%_of {a} | b\c <d> & #1 ~^"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_csv_has_a_line_for_every_folder_and_attack_with_all_numbers(evaluation, run):
    folders = [evaluation(), run()]
    rows = list(csv.DictReader(io.StringIO(export(folders, "csv"))))
    assert [row["attack"] for row in rows] == [
        "nat", "pgd100", "aa", "worst case", "worst case, 8-bit images", "natural worst class", "natural tail 30 %",
        "robust worst class", "robust tail 30 %", "nat", "pgd20", "worst case",
    ]  # fmt: skip
    assert all(None not in row and None not in row.values() for row in rows)
    there = results(folders[0])["attacks"][1]
    assert float(rows[1]["low"]) == there["low"]
    assert int(rows[1]["correct"]) == there["correct"]
    assert json.loads(rows[1]["settings"]) == there["settings"]
    assert (rows[1]["light"], rows[1]["gap"], rows[1]["norm"]) == ("yellow", "1.5", "linf")
    assert (rows[-1]["light"], rows[-1]["eps"], rows[-1]["norm"]) == ("", "0.1", "l2")


def test_json_holds_the_rows_as_they_are(evaluation, run):
    folder = evaluation()
    first, second = json.loads(export([folder, run()], "json"))["rows"]
    assert first["attacks"][:3] == results(folder)["attacks"]
    assert (first["light"], second["light"], second["seed"]) == ("yellow", None, 3)


@pytest.mark.parametrize("name", ["small", ODD])
def test_every_line_of_a_markdown_table_has_as_many_cells_as_its_head(evaluation, run, name):
    lines = export([evaluation(name=name), run()], "markdown").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert [len(row) for row in cells] == [len(cells[0])] * 4 + [len(cells[4])] * 3
    heads = [head.strip() for head in cells[0]]
    assert heads == [
        "name", "n", "eps", "seed", "nat", "pgd100", "aa", "pgd20", "worst case", "worst case, 8-bit images", "light",
    ]  # fmt: skip
    assert re.sub(r"\\(.)", r"\1", cells[2][0].strip()) == name


@pytest.mark.parametrize("name", ["small", ODD])
def test_latex_is_a_booktabs_table_with_names_escaped(evaluation, run, name):
    text = export([evaluation(name=name, worst_classes={}), run()], "latex")
    parts = [r"\begin{table}", r"\caption{", r"\begin{tabular}", r"\toprule", r"\midrule", r"\bottomrule",
             r"\end{tabular}", r"\end{table}"]  # fmt: skip
    assert sorted(parts, key=text.index) == parts
    columns = re.search(r"\\begin{tabular}{@{}(l+r+)@{}}", text)[1]
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows] == [len(columns)] * 3
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "#" not in bare
    assert bare.index("%") == bare.rindex("%") == 0  # the comment that names the package
    if name == ODD:
        assert r"{[}x{]}{*} 50\%\_of \{a\} \textbar{} b\textbackslash{}c \textless{}d\textgreater{} \& \#1" in text


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_keeps_to_its_width(evaluation, run, width):
    text = export([evaluation(), run()], "table", width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "50.0" in text


def test_what_all_rows_share_is_said_once_and_what_differs_has_a_column(evaluation):
    same = export([evaluation("a", name="a"), evaluation("b", name="b")], "markdown")
    assert "n 40; eps 8/255 Linf; seed 0" in same
    assert "cannot be compared" not in same
    spec = results(evaluation("a"))["spec"] | {"eps": 0.031}
    differ = export([evaluation("a", name="a"), evaluation("b", name="b", n=20, spec=spec)], "markdown")
    assert "Rows that differ in n or eps cannot be compared" in differ
    assert "n: a 40, b 20; eps: a 8/255 Linf, b 0.031 Linf" in differ


def test_other_images_are_no_comparison(evaluation):
    other = results(evaluation())["data"] | {"fingerprint": "e2"}
    text = export([evaluation("a", name="a"), evaluation("b", name="b", data=other)], "markdown")
    assert "Rows that differ in images cannot be compared as they stand (images: a f1, b e2)" in text


def test_settings_are_spelt_out_once_where_they_are_the_same(evaluation):
    attacks = results(evaluation())["attacks"]
    attacks[1]["settings"]["pgd100"] = "PGD(steps=7)"
    same = export([evaluation("a", name="a"), evaluation("b", name="b")], "markdown")
    assert same.count("pgd100: torchattack") == 1
    differ = export([evaluation("a", name="a"), evaluation("b", name="b", attacks=attacks)], "markdown")
    assert "pgd100 (a): torchattack('PGD', eps=8/255, steps=100)" in differ
    assert "pgd100 (b): PGD(steps=7)" in differ


def test_two_folders_of_one_name_are_told_apart(evaluation):
    folders = [evaluation("a"), evaluation("b")]
    for format in ("markdown", "csv", "json"):
        text = export(folders, format).replace("\\", "")
        assert all(str(folder) in text for folder in folders)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"has no results\.json\. Pass a folder that robustmail eval"):
        export([tmp_path], "csv")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", '{"complete": true}', '{"complete": true, "attacks": [{"name": 1}]}',
    '{"complete": true, "attacks": [], "shard": [1]}', '{"format": 3, "complete": true, "attacks": [], "n": 4}',
])  # fmt: skip
def test_damaged_results_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError, match="is damaged"):
        export([tmp_path], "csv")


def test_a_run_of_an_older_version_is_told_so(tmp_path):
    old = {"complete": True, "weights": {"file": "best.safetensors", "epoch": 15}, "attacks": []}
    (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(RunError, match=r"written by an older version of robustmail, in another format\. Delete it"):
        export([tmp_path], "csv")


def test_an_unknown_format_is_answered_with_the_nearest(evaluation):
    with pytest.raises(RunError, match="Did you mean 'latex'"):
        export([evaluation()], "latx")


@pytest.mark.parametrize("format", sorted({*FORMATS} - {"csv"}))
def test_a_training_run_that_has_no_verdict_yet_is_exported(run, format):
    text = export([run(attacks=[], worst_case=None, complete=False)], format)
    assert "quick/3" in text
    assert "not finished" in text
