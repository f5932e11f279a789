import pytest

from maskgit_pl.evaluation.options import default_steps, round_to_classes


def test_all_classes_have_the_same_number_of_images_at_least_two() -> None:
    assert [round_to_classes(count, 3) for count in (6, 7, 14)] == [6, 6, 12]
    with pytest.raises(ValueError, match=r"^plot_images must be >= 20 \(2 per class\), got 19"):
        round_to_classes(19, 10, name="plot_images")


def test_the_usual_steps_go_as_far_as_there_are_tokens() -> None:
    assert default_steps(16, (4, 8, 16, 32)) == (4, 8, 16)
    assert default_steps(3, (4, 8)) == (3,)
