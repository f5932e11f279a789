import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from maskgit_pl.evaluation.ledger import Ledger

KEY = {"data": "shoes", "seed": 0, "decoding": {"sampling_temperature": (1.2, 0.6)}}


def key(**values: Any) -> dict[str, Any]:
    return KEY | values


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "ledger.jsonl"


def test_a_measurement_is_found_again_bit_exact(file: Path) -> None:
    added = Ledger(file).add("likelihood", key(nll=0.1 + 0.2, note=None))
    again = Ledger(file)
    row = again.find("likelihood", KEY)
    assert row == added
    assert row["nll"] == 0.1 + 0.2
    assert again.find("likelihood", key(seed=1)) is None
    assert again.find("likelihood", key(decoding={"sampling_temperature": (1.2, 0.7)})) is None
    assert again.find("cas", KEY) is None


def test_the_last_of_equal_measurements_counts_and_all_are_kept(file: Path) -> None:
    for value in (1.0, 2.0):
        ledger = Ledger(file, reuse=False)  # which finds only what it added
        assert ledger.find("likelihood", KEY) is None
        ledger.add("likelihood", key(nll=value))
        assert ledger.find("likelihood", KEY)["nll"] == value
    assert [row["nll"] for row in Ledger(file).rows("likelihood")] == [1.0, 2.0]


def test_a_row_without_a_wanted_column_is_not_found(file: Path) -> None:
    ledger = Ledger(file)
    ledger.add("samples", key(fid=1.0, precision=None))
    ledger.add("samples", key(fid=1.0))
    assert ledger.find("samples", KEY, having=["fid", "precision"])["precision"] is None
    assert ledger.find("samples", KEY, having=["recall"]) is None
    assert ledger.find("samples", key(network="lite0")) is None


def test_only_the_first_rank_writes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskgit_pl.evaluation.ledger.rank_and_world", lambda: (1, 2))
    ledger = Ledger(file)
    ledger.add("likelihood", KEY)
    assert ledger.find("likelihood", KEY) is not None
    assert not file.exists()


@pytest.mark.parametrize("line", ['{"measurement": "sam', "3", "{}"])
def test_a_line_that_is_no_measurement_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text('{"measurement": "samples"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"^ledger .*ledger.jsonl: line 2 is not a measurement; remove the line"):
        Ledger(file)


def add_rows(file: Path, process: int) -> None:
    ledger = Ledger(file)
    for seed in range(20):
        ledger.add("likelihood", key(seed=seed, data=str(process)))


def test_processes_that_write_at_once_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_rows, args=(file, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    expected = [(str(number), seed) for number in range(3) for seed in range(20)]
    assert sorted((row["data"], row["seed"]) for row in Ledger(file).rows("likelihood")) == expected
