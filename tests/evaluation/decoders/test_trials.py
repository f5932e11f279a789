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
    with pytest.raises(ValueError, match=r"measured with another data; name another --out"):
        Ledger(file, {"data": "y", "split": "val"})
    for text, match in (
        ("{}\n", "not of the format"),
        ("[]\n", "not of the format"),
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
