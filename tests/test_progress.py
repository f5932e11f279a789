import logging
import sys

import pytest

from maskgit_pl import processes
from maskgit_pl.processes import named_bars, progress_bars


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Yields the seconds of a fake clock, one after the other."""
    seconds: list[float] = []
    monkeypatch.setattr(processes.time, "monotonic", lambda: seconds.pop(0))
    return seconds


@pytest.fixture
def lines(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    """The log lines without a terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(logging.getLogger("maskgit_pl"), "propagate", True)
    caplog.set_level(logging.INFO, "maskgit_pl")
    return caplog


def test_a_log_has_a_line_now_and_then_with_the_pace_since_the_line_before(clock, lines):
    clock += [0.0, 10.0, 40.0, 60.0]
    with progress_bars() as bars:
        advance = bars("sampling", 100, done=20, unit="images")
        for _ in range(3):
            advance(10)
    assert lines.messages == [
        "sampling: 40 of 100 images, 0.50 images/s, 0:02:00 left",
        "sampling: 50 of 100 images, 0.50 images/s, 0:01:40 left",
    ]


def test_what_has_no_unit_is_counted_and_a_fast_pace_has_no_decimals(clock, lines):
    clock += [0.0, 20.0]
    with progress_bars() as bars:
        bars("classifier", 5_000)(1_000)
    assert lines.messages == ["classifier: 1000 of 5000, 50/s, 0:01:20 left"]


def test_nothing_is_told_where_it_is_not_to_be_shown_or_nothing_was_done(clock, lines):
    with progress_bars(shown=False) as bars:
        bars("other ranks", 10, done=1, unit="images")(5)
    clock += [0.0, 20.0]
    with progress_bars() as bars:
        bars("nothing", 10)(0)
    assert lines.messages == []


def test_a_terminal_has_bars_of_which_finished_ones_go_where_there_are_many(monkeypatch, lines):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(processes, "_SECONDS_BETWEEN_UPDATES", 0.0)
    with progress_bars() as bars:
        made = [bars(f"work {number}", 4, done=1, unit="images") for number in range(12)]
        for advance in made[:2]:
            advance(1)
            advance(2)
        tasks = made[0].progress.tasks
        assert [task.completed for task in tasks[:3]] == [4, 4, 1]
        assert [task.visible for task in tasks[:3]] == [False, False, True]
        assert tasks[0].fields["speed"].endswith("images/s")
    assert lines.messages == []


def test_a_bar_is_not_updated_for_every_small_thing(monkeypatch, clock):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    clock += [1.0, 1.01, 1.02, 1.03]
    with progress_bars() as bars:
        advance = bars("work", 4)
        monkeypatch.setattr(advance.progress, "get_time", lambda: 0.0)
        seen = []
        for _ in range(4):
            advance(1)
            seen.append(advance.progress.tasks[0].completed)
    assert seen == [1, 1, 1, 4]


def test_a_bar_with_a_name_is_made_when_its_work_begins(clock, lines):
    clock += [0.0, 10.0, 30.0, 40.0, 60.0]
    with named_bars("shards") as advance:
        for title, count in (("train", 1), ("train", 1), ("val", 3)):
            advance(title, count, 4)
    assert [record.getMessage().partition(",")[0] for record in lines.records] == [
        "train: 2 of 4 shards",
        "val: 3 of 4 shards",
    ]
