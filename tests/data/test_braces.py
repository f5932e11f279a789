import itertools
import random

import pytest
from braceexpand import braceexpand

from maskgit_pl.data.reader import count_names, expand_braces, find_shards

PIECES = ["{", "}", ",", "\\", "a", "1", "..", "{1..3}", "{c..a}", "{Y..b}", "{x,y}", "{03..1..2}", "{-2..2..0}"]


@pytest.mark.slow
def test_names_are_counted_as_they_are_expanded():
    chance = random.Random(0)
    outcomes = {"refused": 0, "format_counts": 0}
    for _ in range(20_000):
        pattern = "".join(chance.choice(PIECES) for _ in range(chance.randrange(1, 8)))
        try:
            expected = len(list(itertools.islice(braceexpand(pattern), 20_000)))
        except ValueError:
            outcomes["refused"] += 1
            with pytest.raises(ValueError, match="braces must close"):
                count_names(pattern)
        else:
            outcomes["format_counts"] += 1
            assert count_names(pattern) == expected, pattern
    assert min(outcomes.values()) > 2_000


def test_names_come_in_order():
    assert expand_braces("{train,val}-{00..02}.tar") == [f"{s}-0{n}.tar" for s in ("train", "val") for n in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        "{0..1099511627776}.tar",
        "{-600000..600000}.tar",
        "{0..999999}{a,b}.tar",
        "{a,b}" * 60,
        "{{a,b}" + "{a,b}" * 60 + ",c}.tar",
        "{" + ",".join(["{0..999999}"] * 200) + "}.tar",
        "{0..999999}" + "x" * 4000,
        "{0..1}" * 683,
        "x" * 5000,
        "{" * 2000 + "}" * 2000,
        "{" + "9" * 3000 + ".." + "8" * 1000 + "}",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_what_would_fill_memory_is_refused_before_it_is_expanded(pattern, tmp_path):
    with pytest.raises(ValueError, match=r"a pattern must .*got"):
        expand_braces(pattern)
    with pytest.raises(ValueError, match=r"shard pattern: a pattern must .*got"):
        find_shards(tmp_path, pattern)
