import json
from pathlib import Path

import pytest

from maskgit_pl.evaluation.decoders.trials import Ledger
from tests.evaluation.decoders.searching import OWN, SPACE, numbers


def test_a_ledger_gives_back_what_it_was_told(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "trials.jsonl"
    Ledger(file, {"data": "x"}).add(SPACE.trial(5, seed=0), numbers(2.0), num_images=10, seed=7, purpose="trial 5")
    again = Ledger(file, {"data": "x"})
    assert again.find(SPACE.trial(5, seed=0), num_images=10, seed=7) == numbers(2.0)
    for other in ({"num_images": 11, "seed": 7}, {"num_images": 10, "seed": 8}):
        assert again.find(SPACE.trial(5, seed=0), **other) is None
    assert again.find(SPACE.trial(6, seed=0), num_images=10, seed=7) is None
    head, line = file.read_text().splitlines()
    assert json.loads(head)["protocol"] == {"data": "x"}
    assert json.loads(line)["purpose"] == "trial 5"


def test_a_line_that_was_cut_off_is_forgotten_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    ledger = Ledger(file, {})
    for number in (1, 2):
        ledger.add(SPACE.trial(number, seed=0), numbers(number), num_images=10, seed=0, purpose="")
    file.write_text(file.read_text()[:-20])
    again = Ledger(file, {})
    assert again.find(SPACE.trial(1, seed=0), num_images=10, seed=0) == numbers(1)
    assert again.find(SPACE.trial(2, seed=0), num_images=10, seed=0) is None
    again.add(SPACE.trial(2, seed=0), numbers(2), num_images=10, seed=0, purpose="")
    assert Ledger(file, {}).find(SPACE.trial(2, seed=0), num_images=10, seed=0) == numbers(2)


def test_a_ledger_of_another_protocol_or_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    Ledger(file, {"data": "x", "split": "val"})
    with pytest.raises(ValueError, match=r"measured with another data, or .*; name another --out"):
        Ledger(file, {"data": "y", "split": "val"})
    for less_or_more in ({"data": "x"}, {"data": "x", "split": "val", "judge": "0"}):
        with pytest.raises(ValueError, match=r"measured with another (split|judge), or it does not say with which"):
            Ledger(file, less_or_more)
    for text, match in (
        ("{}\n", "must be of the format"),
        ("[]\n", "line 1 must hold a mapping"),
        ("nonsense\n", "line 1 is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            Ledger(file, {"data": "x"})


def test_a_ledger_that_was_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    for text in ("", '{"format": "mask'):
        file.write_text(text)
        Ledger(file, {"data": "x"}).add(OWN, numbers(1), num_images=10, seed=0, purpose="")
        assert Ledger(file, {"data": "x"}).find(OWN, num_images=10, seed=0) == numbers(1)
        file.unlink()


NUMBERS = json.dumps(numbers(1.0))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("[" * 100_000, "line 2 is nested too deep"),
        ("3", "line 2 must hold a mapping"),
        ("\x00", "line 2 is not JSON"),
        ('{"num_images": 1, "seed": 0, "numbers": {}}', "line 2: the key 'decoding' is missing"),
        ('{"num_images": "1", "seed": 0, "decoding": {}, "numbers": {}}', "line 2: num_images must be an integer"),
        ('{"num_images": 1, "seed": 0.5, "decoding": {}, "numbers": {}}', "line 2: seed must be an integer"),
        ('{"num_images": 1, "seed": 0, "decoding": [1], "numbers": {}}', "line 2: decoding must be a mapping"),
        ('{"num_images": 1, "seed": 0, "decoding": {}, "numbers": 3}', "line 2: numbers must be a mapping"),
        ('{"num_images": 1, "seed": 0, "decoding": {}, "numbers": {"diversity": 1}}', "line 2: numbers: the key"),
        (
            '{"num_images": 1, "seed": 0, "decoding": {}, "numbers": ' + NUMBERS.replace("0.8", '"much"') + "}",
            r"line 2: numbers\.diversity must be a finite number",
        ),
        ('{"a": "' + "x" * 1_000_000 + '"}', "line 2 must have at most 1 MB"),
    ],
)
def test_a_line_of_a_stranger_is_refused_by_file_and_number(tmp_path: Path, line: str, match: str) -> None:
    file = tmp_path / "trials.jsonl"
    Ledger(file, {"data": "x"})
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(ValueError, match=match) as caught:
        Ledger(file, {"data": "x"})
    assert "trials.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_decoding_of_a_stranger_is_none_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    Ledger(file, {})
    trial = {"num_images": 1, "seed": 0, "decoding": {"num_steps": "8"}, "numbers": numbers(1.0)}
    file.write_text(f"{file.read_text()}{json.dumps(trial)}\n")
    assert Ledger(file, {}).first() is None
