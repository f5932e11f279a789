from itertools import pairwise

from maskgit_pl.evaluation.figures import count_known_tokens
from maskgit_pl.schedules import mask_schedules


def test_the_number_of_known_tokens_rises_to_all_as_in_the_released_code() -> None:
    num_known = count_known_tokens(mask_schedules.build("cosine"), num_tokens=256, num_steps=12)
    assert all(before < after for before, after in pairwise(num_known))
    assert 256 - num_known[7] == 127  # cos(pi / 3) is just under a half in float32
    assert num_known[-1] == 256
