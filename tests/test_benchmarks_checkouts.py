"""The comparison of two checkouts: order of the sides, interval of the median ratio, verdict and exit code."""

import pytest

from tests.benchmark_scripts import BENCHMARKS, benchmark_script


@pytest.fixture
def checkouts():
    with benchmark_script("checkouts") as script:
        yield script


def test_the_interval_holds_the_median_with_95_percent(checkouts):
    # Binomial tables: P(second smallest < median < second largest) is 0.930 for 8 values and 0.961 for 9.
    assert checkouts.median_interval([8, 1, 7, 2, 6, 3, 5, 4]) == (1, 8)
    assert checkouts.median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 8)
    assert checkouts.median_interval(range(25)) == (7, 17)  # 0.957
    assert checkouts.median_interval([2, 1]) == (1, 2)


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.02] * 9, False),  # at most 1.03
        ([0.8, *[1.05] * 8], True),  # one round does not move the interval
        ([0.8, 0.9, *[1.05] * 7], False),  # the interval contains 1
        ([0.9] * 9, False),
    ],
)
def test_slower_is_a_median_above_the_limit_whose_interval_lies_above_1(checkouts, ratios, slower):
    assert checkouts.is_slower(ratios) == slower


def test_the_sides_take_turns_and_a_slower_task_is_exit_code_1(checkouts, monkeypatch, capsys):
    order = []

    def run(side):
        order.append(side.name)
        return {"OLD": 1.0, "NEW": 1.1}[side.name]

    monkeypatch.setattr(checkouts, "TASKS", {"slow": run, "even": lambda side: 1.0})
    monkeypatch.setattr(checkouts.Side, "prepare", lambda self, tasks: None)
    folder = str(BENCHMARKS.parent)
    assert checkouts.main([folder, folder, "--rounds", "3", "--only", "slow", "even"]) == 1
    assert order == ["OLD", "NEW", "NEW", "OLD", "OLD", "NEW"]
    printed = capsys.readouterr().out
    assert "| 1.100     | 1.100 to 1.100 | SLOWER     |" in printed
    assert "| 1.000     | 1.000 to 1.000 | not slower |" in printed
    assert checkouts.main([folder, folder, "--rounds", "1", "--only", "even"]) == 0
