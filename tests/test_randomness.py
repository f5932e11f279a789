"""Random numbers: the published answers of Philox, their independence, Gumbel noise and permutations."""

import math

import pytest
import torch

from maskgit_pl.randomness import gumbel, gumbel_rows, permutation, philox, random_bits, random_uniform


def words(*hexadecimal: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in hexadecimal)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox4x32 10
        (words(*["0"] * 4), words("0", "0"), words("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (
            words(*["ffffffff"] * 4),
            words("ffffffff", "ffffffff"),
            words("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"),
        ),
        (
            words("243f6a88", "85a308d3", "13198a2e", "03707344"),
            words("a4093822", "299f31d0"),
            words("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    values = philox(tuple(torch.tensor([word, word]) for word in counter), [key])
    assert values.tolist() == [[list(expected), list(expected)]]


def test_a_row_does_not_depend_on_the_rest_of_the_batch_nor_on_the_count():
    index, epoch = torch.tensor([9, 4, 123_456, 4]), torch.tensor([0, 1, 2, 2])
    batch = random_bits("s", seed=1, index=index, epoch=epoch, count=10)
    for row in range(4):
        alone = random_bits("s", seed=1, index=int(index[row]), epoch=int(epoch[row]), count=3)
        assert alone.tolist() == batch[row : row + 1, :3].tolist()


@pytest.mark.parametrize("draw", [random_bits, random_uniform])
def test_several_streams_at_once_give_the_numbers_of_each_alone(draw):
    place = {"seed": torch.tensor([3, 4]), "index": 5, "epoch": 6, "count": 7}
    values = draw(["a", "b", "c"], **place)
    assert values.shape == (3, 2, 7)
    for stream, numbers in zip("abc", values, strict=True):
        assert torch.equal(numbers, draw(stream, **place))


@pytest.mark.parametrize("name", ["seed", "index", "epoch"])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_an_integer_out_of_range_is_refused(name, value):
    arguments = {"seed": 0, "index": 0, "epoch": 0, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be an integer in \[0, 2\*\*32\), got {value}"):
        random_bits("s", **arguments)
    assert random_bits("s", **{**arguments, name: 2**32 - 1}).shape == (1, 1)


def test_uniform_numbers_are_never_0_nor_1(monkeypatch):
    extremes = torch.tensor([[0, 255, 256, 2**32 - 1]])
    monkeypatch.setattr("maskgit_pl.randomness.random_bits", lambda *args, **kwargs: extremes)
    values = random_uniform("s", seed=0, index=0, count=4)
    assert values.tolist() == [[2.0**-24, 2.0**-24, 2.0**-24, 1 - 2.0**-24]]
    assert values.dtype == torch.float32
    assert gumbel(values).isfinite().all()


def chi_square(counts: torch.Tensor) -> float:
    """Returns (X^2 - degrees of freedom) in standard deviations, for counts that should all be equal."""
    expected, freedom = counts.double().mean(), counts.numel() - 1
    assert expected >= 5  # below, the statistic is no chi-square
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


NEIGHBOURS = {
    "another seed": {"seed": 1},
    "a seed far away": {"seed": 2**31},
    "the next epoch": {"epoch": 1},
    "the next sample": {"index": torch.arange(1, 1001)},
    "another stream": {"stream": "crop"},
}


@pytest.mark.parametrize("change", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_streams_seeds_epochs_and_samples_are_independent(change):
    place = {"stream": "flip", "seed": 0, "index": torch.arange(1000), "epoch": 0, "count": 50}
    one, other = (random_uniform(where.pop("stream"), **where).flatten() for where in (place, {**place, **change}))
    count = one.numel()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 4.5 / math.sqrt(count)
    cells = (one * 16).long() * 16 + (other * 16).long()  # all pairs of sixteenths equally often
    assert abs(chi_square(torch.bincount(cells, minlength=256))) < 5


def splitmix(first: int, second: int, number: int) -> int:
    """Returns number ``number`` of the row of two words: SplitMix with lowbias32, in Python's integers."""
    word = first + number * 0x9E3779B9 & 0xFFFFFFFF
    word = (word ^ word >> 16) * 0x7FEB352D & 0xFFFFFFFF
    word = ((word ^ word >> 15) ^ second) * 0x846CA68B & 0xFFFFFFFF
    return word ^ word >> 16


def test_gumbel_rows_are_the_hash_of_their_words():
    words = [(0, 0), (1, 2), (0xFFFFFFFF, 0x80000000), (0x12345678, 0xFFFFFFFF)]
    values = gumbel_rows(*torch.tensor(words).T, 5000)
    assert values.shape == (4, 5000)
    for row, (first, second) in zip(values, words, strict=True):
        uniform = [((splitmix(first, second, k) & 0x7FFFFFFF) + 0.5) * 2.0**-31 for k in range(5000)]
        expected = -torch.log(-torch.log1p(-torch.tensor(uniform, dtype=torch.float64)))
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-5)


def test_gumbel_rows_are_gumbel_and_independent():
    first, second = random_bits(["a", "b"], seed=0, index=torch.arange(500))[..., 0]
    values = gumbel_rows(first, second, 512)
    uniform = torch.exp(-torch.exp(-values))  # the distribution function
    assert abs(chi_square(torch.histc(uniform, 100, 0, 1))) < 5
    for one, other in (
        *((uniform[:, :-lag], uniform[:, lag:]) for lag in (1, 2, 3, 16, 256)),
        *((uniform[:-lag], uniform[lag:]) for lag in (1, 7)),
        (gumbel_rows(first + 1, second, 512), values),
    ):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4.5 / math.sqrt(one.numel())
    highest = torch.bincount(values.argmax(1), minlength=512)  # each number is the largest equally often
    assert abs(chi_square(highest.view(16, 32).sum(1))) < 5


@pytest.mark.parametrize("size", [1, 2, 3, 49, 1000, 60_000])
def test_a_permutation_is_a_bijection(size):
    image = permutation(torch.arange(size), size, stream="order", seed=3, epoch=2)
    assert image.dtype == torch.int64
    assert image.sort().values.tolist() == list(range(size))


def test_a_permutation_of_some_positions_is_that_of_all():
    positions = torch.tensor([[999, 0], [7, 500]])
    every = permutation(torch.arange(1000), 1000, stream="order", seed=3, epoch=1)
    assert torch.equal(permutation(positions, 1000, stream="order", seed=3, epoch=1), every[positions])


def test_a_permutation_takes_memory_for_its_positions_only():
    size = 2**32  # 32 GiB if the range were held
    image = permutation(torch.tensor([0, 1, size - 1]), size, stream="order", seed=0)
    assert len(set(image.tolist())) == 3
    assert 0 <= image.min() <= image.max() < size


def test_orders_of_other_epochs_seeds_and_streams_are_independent():
    size = 60_000
    base = {"stream": "order", "seed": 0, "epoch": 0}
    one = permutation(torch.arange(size), size, **base)
    for change in ({"epoch": 1}, {"seed": 1}, {"index": 1}, {"stream": "other"}):
        other = permutation(torch.arange(size), size, **{**base, **change})
        assert abs(float(torch.corrcoef(torch.stack([one, other]).double())[0, 1])) < 4.5 / math.sqrt(size)
        pairs = (one * 16 // size) * 16 + other * 16 // size
        assert abs(chi_square(torch.bincount(pairs, minlength=256))) < 5
        assert int((one == other).sum()) < 8  # 1 is expected


def test_the_numbers_of_a_stream_are_those_of_every_release():
    """Holds the numbers: others would change the images of old seeds, and order and masks of resumed runs."""
    bits = random_bits("mask", seed=7, index=torch.tensor([0, 123456]), epoch=3, count=3)
    assert bits.tolist() == [[3644639273, 1743582939, 1145433179], [3400180048, 2187572194, 3111504892]]
    for size, places in ((1000, [605, 434, 517]), (2**31, [597668899, 667551515, 481592527])):
        assert permutation(torch.arange(3), size, stream="order", seed=7, epoch=2).tolist() == places
