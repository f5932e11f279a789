"""The counts of the decoding steps, by hand."""

import pytest

from maskgit_pl.decoding.plan import (
    StepCounts,
    count_after,
    count_by_list,
    count_by_schedule,
    plan_steps,
    step_progress,
)
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.schedules import mask_schedules


def none_remasked(**given: float) -> int:
    return 0


def test_a_schedule_is_rounded_down_for_each_row() -> None:
    made = count_by_schedule(mask_schedules.build("linear"), token_selectors.build("random"), 4, [16, 9, 0], 16)
    assert made == [[12, 6, 0], [8, 4, 0], [4, 2, 0], [0, 0, 0]]  # 9 * 0.75 = 6.75, 9 * 0.25 = 2.25


def test_a_list_counts_in_proportion_to_what_is_unknown() -> None:
    assert count_by_list((1, 5, 10), [16, 8, 3], 16) == [[15, 7, 2], [10, 5, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("masked", "planned", "remasked", "expected"),
    [
        (8, 5, 0, (5, 0)),
        (8, 8, 0, (7, 0)),  # one of those drawn is kept
        (8, 0, 0, (1, 0)),  # the next step has something to decide
        (1, 0, 0, (1, 0)),
        (0, 0, 0, (0, 0)),  # a row that is done stays done
        (8, 5, 3, (5, 3)),  # the number masked follows the plan: three more candidates are kept
        (8, 8, 3, (8, 3)),
        (4, 9, 3, (4, 3)),  # never more than before
        (4, 1, 3, (3, 3)),  # what is masked again is masked
        (2, 1, 5, (2, 2)),
        (0, 3, 2, (0, 0)),
    ],
)
def test_what_stays_masked_is_bounded_on_both_sides(
    masked: int, planned: int, remasked: int, expected: tuple[int, int]
) -> None:
    assert count_after(masked, planned, remasked) == expected


def test_each_step_begins_where_the_last_one_ended_and_the_last_leaves_nothing() -> None:
    plan = plan_steps([8, 2, 0], [[6, 1, 0], [3, 1, 0], [0, 0, 0]], none_remasked)
    assert plan == [
        StepCounts([8, 2, 0], [6, 1, 0], [0, 0, 0]),
        StepCounts([6, 1, 0], [3, 1, 0], [0, 0, 0]),
        StepCounts([3, 1, 0], [0, 0, 0], [0, 0, 0]),
    ]
    assert plan_steps([5], [[6], [3], [0]], none_remasked, first_step=1) == [
        StepCounts([5], [3], [0]),
        StepCounts([3], [0], [0]),
    ]


def test_a_selector_is_asked_with_what_is_decided_and_cannot_mask_more_than_that() -> None:
    asked = []

    def everything(*, decided: int, planned: int, progress: float) -> int:
        asked.append((decided, planned, progress))
        return 99

    plan = plan_steps([8], [[6], [4], [2], [0]], everything)
    assert asked == [(0, 6, 0.25), (2, 4, 0.5), (4, 2, 0.75)]  # not at the last step
    assert [(counts.after, counts.remasked, counts.undecided) for counts in plan] == [
        ([6], [0], [6]),
        ([4], [2], [2]),
        ([4], [4], [0]),
        ([0], [0], [0]),
    ]
    assert [counts.remasked for counts in plan_steps([8], [[6], [4], [0]], lambda **given: -1)] == [[0]] * 3


def test_a_step_that_counts_for_itself_keeps_at_least_one_and_at_most_all() -> None:
    assert StepCounts.from_kept([8, 3, 3, 0], [2, 0, 5, 0]) == StepCounts([8, 3, 3, 0], [6, 2, 0, 0], [0, 0, 0, 0])


def test_progress_goes_from_0_at_the_first_step_to_1_at_the_last() -> None:
    assert [step_progress(step, 5) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert step_progress(0, 1) == 1.0
