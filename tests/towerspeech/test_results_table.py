"""A results CSV of another kind is refused, and what a cell holds does not break a table in Markdown."""

import pandas
import pytest

from towerspeech.errors import UserError
from towerspeech.results_table import COLUMNS, as_text, read_results, write_results


def test_results_csv_of_another_kind_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match=r"a\.csv:1: no results CSV"):
        read_results(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(",".join(COLUMNS) + "\na,b\n")
    with pytest.raises(UserError, match=r"b\.csv:2: 2 values, wanted 15"):
        read_results(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_bytes(",".join(COLUMNS).encode() + b"\n\xff\n")
    with pytest.raises(UserError, match=r"c\.csv: no CSV in UTF-8"):
        read_results(tmp_path / "c.csv")


def test_what_is_read_is_written_with_the_same_bytes(tmp_path):
    line = 'm,"5, 1",0300,mt,"a ""b""",0,de,en,bleu,1.50,,1e-05,03,nrefs:1,NA'
    (tmp_path / "a.csv").write_text(f"{','.join(COLUMNS)}\n{line}\n")
    table = read_results(tmp_path / "a.csv")
    assert table.loc[0, "score"] == "1.50" and table.loc[0, "ci_low"] == "" and table.loc[0, "dataset"] == 'a "b"'
    write_results(tmp_path / "b.csv", table)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_cells_stay_cells_in_markdown():
    lines = as_text(pandas.DataFrame({"a|b": ["x\ny", "c\\d"], "n": ["1", "22"]}), ["left", "right"]).splitlines()
    assert [line.replace(" ", "") for line in lines[:1] + lines[2:]] == ["|a\\|b|n|", "|xy|1|", "|c\\\\d|22|"]
    assert lines[1].replace("-", "") == "|:|:|" and len(set(map(len, lines))) == 1
