import os
from pathlib import Path

import pytest

from maskgit_pl.evaluation.bench.ledger import Ledger, number, present

KEY = ("model", "seed")


def test_what_was_measured_is_found_again_to_the_last_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    Ledger(tmp_path / "deep" / "samples.csv", KEY).add({"model": "a, b", "seed": 1, "fid": value, "note": None})
    again = Ledger(tmp_path / "deep" / "samples.csv", KEY)
    row = again.find(model="a, b", seed=1, fid="not looked at")
    assert row is not None
    assert number(row, "fid") == value
    assert number(row, "note") is None
    assert number(row, "no such column") is None
    assert again.find(model="a, b", seed=2) is None


def test_the_last_of_equal_measurements_counts_and_none_is_lost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "samples.csv", KEY)
    for fid in (1.0, 2.0):
        ledger.add({"model": "a", "seed": 1, "fid": fid})
    assert ledger.find(model="a", seed=1)["fid"] == "2.0"
    assert len(Ledger(tmp_path / "samples.csv", KEY).rows) == 2


def test_later_rows_may_bring_columns(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "samples.csv", KEY)
    ledger.add({"model": "a", "seed": 1, "fid": 1.0})
    ledger.add({"model": "b", "seed": 1, "is": 5.0})
    rows = Ledger(tmp_path / "samples.csv", KEY).rows
    assert [row["is"] for row in rows] == ["", "5.0"]
    assert present(rows, "is")
    assert not present(rows[:1], "is")


def test_a_process_that_does_not_write_still_remembers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "samples.csv", KEY, writes=False)
    ledger.add({"model": "a", "seed": 1})
    assert ledger.find(model="a", seed=1) is not None
    assert not (tmp_path / "samples.csv").exists()


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("model,fid\na,1\n")
    with pytest.raises(ValueError, match=r"samples\.csv: columns \['seed'\] are missing"):
        Ledger(tmp_path / "samples.csv", KEY)
    (tmp_path / "samples.csv").write_text("model,seed,fid\na,1\n")
    with pytest.raises(ValueError, match="line 2 must have as many cells"):
        Ledger(tmp_path / "samples.csv", KEY)
    with pytest.raises(ValueError, match=r"\['seed'\] missing"):
        Ledger(tmp_path / "other.csv", KEY).add({"model": "a"})


def test_a_row_without_a_digest_stays_and_is_never_found(tmp_path: Path) -> None:
    file = tmp_path / "samples.csv"
    Ledger(file, KEY).add({"model": "a", "seed": 1, "fid": 1.0})
    ledger = Ledger(file, KEY, digests=("judge",))
    assert ledger.find(model="a", seed=1, judge="0f") is None
    ledger.add({"model": "a", "seed": 1, "judge": "0f", "fid": 2.0})
    again = Ledger(file, KEY, digests=("judge",))
    assert [row["fid"] for row in again.rows] == ["1.0", "2.0"]
    assert again.find(model="a", seed=1, judge="0f")["fid"] == "2.0"
    with pytest.raises(AssertionError, match="an empty digest"):
        again.find(model="a", seed=1, judge="")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,1,many", "line 2 column fid must be a finite number, got 'many'"),
        ("a,1,nan", "line 2 column fid must be a finite number"),
        ("a,1,", "line 2 must have a number in column fid"),
        ('a,1,"1', "line 2 must be a row of UTF-8 text"),
        (f"{'a' * 200_000},1,1", "line 2 must be a row of UTF-8 text, got field larger"),
        ("a,1,\udcff", "line .* must be a row of UTF-8 text"),
    ],
)
def test_a_line_of_a_stranger_is_refused_by_file_and_number(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "samples.csv"
    file.write_bytes(f"model,seed,fid\n{text}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=match) as caught:
        Ledger(file, KEY, results=("fid",))
    assert "samples.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_counts_are_digits(tmp_path: Path) -> None:
    file = tmp_path / "samples.csv"
    for count in ("1.5", "-1", "1" * 5000, "\u0663"):
        file.write_text(f"model,seed,num_images\na,1,{count}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="column num_images must be a finite number"):
            Ledger(file, KEY)


def test_a_folder_or_a_fifo_is_no_ledger(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "samples.csv")
    for file in (tmp_path, tmp_path / "samples.csv"):
        with pytest.raises(ValueError, match="must be a regular file"):
            Ledger(file, KEY)
