import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from maskgit_pl.evaluation.ledger import KEYS, Ledger, format_csv, has_column, read_number

LIKELIHOOD = dict.fromkeys(KEYS["likelihood"], "") | {"num_images": 10, "seed": 0, "draws": 4}


def row(**values: Any) -> dict[str, Any]:
    """A row of the kind with the shortest key."""
    return LIKELIHOOD | values


def test_a_measurement_is_found_again_bit_exact(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    Ledger(tmp_path / "deep" / "ledger.jsonl").add("likelihood", row(data="a, b", masked_nll=value, note=None))
    again = Ledger(tmp_path / "deep" / "ledger.jsonl")
    found = again.find("likelihood", row(data="a, b", masked_nll="not looked at"))
    assert found is not None
    assert read_number(found, "masked_nll") == value
    assert read_number(found, "note") is None
    assert read_number(found, "no such column") is None
    assert again.find("likelihood", row(data="a, b", seed=1)) is None
    assert again.find("cas", dict.fromkeys(KEYS["cas"])) is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["ledger.jsonl"]


def test_the_last_of_equal_measurements_counts_and_all_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for value in (1.0, 2.0):
        ledger.add("likelihood", row(masked_nll=value))
    assert ledger.find("likelihood", row())["masked_nll"] == 2.0
    assert len(Ledger(tmp_path / "ledger.jsonl").rows("likelihood")) == 2


def test_later_rows_may_have_new_columns(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add("likelihood", row(masked_nll=1.0))
    ledger.add("likelihood", row(exact_bits_per_token=5.0))
    rows = Ledger(tmp_path / "ledger.jsonl").rows("likelihood")
    assert [read_number(each, "exact_bits_per_token") for each in rows] == [None, 5.0]
    assert has_column(rows, "masked_nll")
    assert not has_column(rows[1:], "masked_nll")


def test_a_process_that_does_not_write_finds_its_own_rows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", writes=False)
    ledger.add("likelihood", row())
    assert ledger.find("likelihood", row()) is not None
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_ledger_that_is_not_reused_finds_only_what_it_added(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    Ledger(file).add("likelihood", row(masked_nll=1.0))
    ledger = Ledger(file, reuse=False)
    assert ledger.find("likelihood", row()) is None
    ledger.add("likelihood", row(masked_nll=2.0))
    assert ledger.find("likelihood", row())["masked_nll"] == 2.0
    assert [each["masked_nll"] for each in Ledger(file).rows("likelihood")] == [1.0, 2.0]


@pytest.mark.parametrize("name", KEYS["likelihood"])
def test_a_row_without_a_key_column_is_kept_but_never_found(tmp_path: Path, name: str) -> None:
    file = tmp_path / "ledger.jsonl"
    less = {key: value for key, value in row(masked_nll=1.0).items() if key != name or key == "num_images"}
    less |= {"num_images": 11} if name == "num_images" else {}  # no line lacks it
    file.write_text(json.dumps({"measurement": "likelihood", **less}) + "\n")
    ledger = Ledger(file)
    assert ledger.find("likelihood", row()) is None
    assert ledger.find("likelihood", row(**{name: None})) is None
    ledger.add("likelihood", row(masked_nll=2.0))
    again = Ledger(file)
    assert [each["masked_nll"] for each in again.rows("likelihood")] == [1.0, 2.0]
    assert again.find("likelihood", row())["masked_nll"] == 2.0
    with pytest.raises(ValueError, match=f"the key '{name}' is missing"):
        ledger.add("likelihood", {key: value for key, value in row().items() if key != name})


def test_mappings_and_tuples_are_found_as_json_gives_them_back(tmp_path: Path) -> None:
    key = dict.fromkeys(KEYS["samples"]) | {"num_images": 1, "decoding": {"sampling_temperature": (1.2, 0.6)}}
    Ledger(tmp_path / "ledger.jsonl").add("samples", key | {"fid": 1})
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.find("samples", key)["decoding"] == {"sampling_temperature": [1.2, 0.6]}
    assert ledger.find("samples", key | {"decoding": {"sampling_temperature": (1.2, 0.7)}}) is None


@pytest.mark.parametrize("cut", [1, 20])
def test_an_incomplete_last_line_is_removed_before_the_next_one(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file)
    for seed in (1, 2):
        ledger.add("likelihood", row(seed=seed, masked_nll=seed))
    file.write_text(file.read_text()[:-cut])
    again = Ledger(file)
    assert again.find("likelihood", row(seed=1)) is not None
    assert again.find("likelihood", row(seed=2)) is None
    again.add("likelihood", row(seed=2, masked_nll=3))
    assert [each["masked_nll"] for each in Ledger(file).rows("likelihood")] == [1, 3]


def test_a_ledger_with_only_an_incomplete_line_starts_empty(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    for text in ("", '{"measurement": "like'):
        file.write_text(text)
        Ledger(file).add("likelihood", row())
        assert len(Ledger(file).rows("likelihood")) == 1


def add_rows(file: Path, process: int) -> None:
    ledger = Ledger(file)
    for seed in range(50):
        ledger.add("likelihood", row(seed=seed, data=str(process)))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_rows, args=(file, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = Ledger(file).rows("likelihood")
    expected = [(str(number), seed) for number in range(3) for seed in range(50)]
    assert sorted((each["data"], each["seed"]) for each in rows) == expected


LINE = json.dumps({"measurement": "samples", "num_images": 1, "fid": 1.0})


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("[" * 100_000, "line 2 must be nested at most 64 levels deep"),
        ("3", "line 2 must hold a mapping"),
        ("\x00", "line 2 is not valid JSON"),
        ("a,1,many", "line 2 is not valid JSON"),
        ("{}", "line 2: measurement must be one of samples, .* got None"),
        (LINE.replace("samples", "sample"), "line 2: measurement must be one of samples"),
        (LINE.replace('"samples"', "[]"), "line 2: measurement must be one of samples"),
        (LINE.replace("1.0", '"many"'), "line 2: fid must be a finite number .*got 'many'"),
        (LINE.replace("1.0", "NaN"), "line 2 is not valid JSON"),
        (LINE.replace("1.0", "1e999"), "line 2 is not valid JSON"),
        (LINE.replace("1.0", "null"), "line 2: fid must have a value"),
        (LINE.replace('"num_images": 1, ', ""), "line 2: num_images must have a value"),
        (LINE.replace("}", ', "fid": 2}'), "a key appears twice"),
        (LINE.replace("}", ', "decoding": [1]}'), r"line 2: decoding must be a mapping, got \[1\]"),
        (LINE.replace("}", ', "knows_classes": 1}'), "line 2: knows_classes must be true or false"),
        (LINE.replace("}", ', "run": {"a": 1}}'), "line 2: run must be a string"),
        (LINE.replace("}", ', "elbo_bits": "x"}'), "line 2: elbo_bits must be a finite number"),
        (LINE.replace("}", ', "note": "\udcff"}'), "line 2 is not valid JSON"),
        ('{"a": "' + "x" * 1_000_000 + '"}', "line 2 must be shorter than 1 MB"),
    ],
)
def test_a_line_of_a_stranger_is_refused_by_file_and_number(tmp_path: Path, line: str, match: str) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(f"{LINE}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=match) as caught:
        Ledger(file)
    assert "ledger.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_counts_are_integers(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    for count in ("1.5", "-1", "1" * 40, '"1"', "true"):
        file.write_text(LINE.replace('"num_images": 1', f'"num_images": {count}') + "\n")
        with pytest.raises(ValueError, match="line 1: num_images must be an integer"):
            Ledger(file)


def test_a_non_finite_value_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masked_nll must be a finite number"):
        Ledger(tmp_path / "ledger.jsonl").add("likelihood", row(masked_nll=float("nan")))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_ledger_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ledger.jsonl")
    for file in (tmp_path, tmp_path / "ledger.jsonl"):
        with pytest.raises(ValueError, match="must be a regular file"):
            Ledger(file)


def test_a_spreadsheet_has_every_column_unrounded() -> None:
    rows = [{"a": 0.1 + 0.2, "b": None}, {"a": 1, "c": {"z": 1, "d": True}}]
    assert format_csv(rows) == 'a,b,c\n0.30000000000000004,,\n1,,"{""d"": true, ""z"": 1}"\n'


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"numbers": {"fid/classifier": 1e308}}, r"fid/classifier.* must be a number in \[-1e100, 1e100\]"),
        ({"real": {"fid/classifier": -1e101}}, r"must be a number in \[-1e100, 1e100\]"),
        ({"fid": 1e308}, r"fid must be a number in \[-1e100, 1e100\]"),
        ({"dataset": None}, "dataset must have a value"),
    ],
)
def test_a_row_of_an_ablation_has_bounded_numbers_and_the_name_of_its_data(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    own = {"ablation": "a", "plan": "p", "place": 0, "variant": "base", "seed": 0, "numbers": {}, "protocol": {}}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add("ablation", own | {"dataset": "shoes"})
    with pytest.raises(ValueError, match=match):
        ledger.add("ablation", own | {"dataset": "shoes"} | changes)
