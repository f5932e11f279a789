from maskgit_pl.pipeline.decoding_figures import StepRecorder
from tests.pipeline.decoding_steps import step

ALL = list(range(16))


def test_the_first_images_of_the_first_batch_are_recorded_to_the_end() -> None:
    record = StepRecorder(max_images=2)
    for each in (step(0, ALL, ALL[:8], 3), step(1, ALL[:8], [], 3), step(0, ALL, [], 3), step(0, ALL, [], 1)):
        record(each)
    assert [(each.step, len(each.tokens)) for each in record.steps] == [(0, 2), (1, 2)]


def test_a_batch_of_another_size_is_not_mixed_in() -> None:
    record = StepRecorder()
    for each in (step(0, ALL, ALL[:8], 3), step(0, ALL, ALL[:8], 1), step(1, ALL[:8], [], 3)):
        record(each)
    assert [len(each.tokens) for each in record.steps] == [3, 3]
