"""The order of samples: each once per epoch, equal for all ranks and workers, each position independent of others."""

import time

import pytest
import torch

from maskgit_pl.data.order import (
    EvalBatchSampler,
    InOrder,
    ShuffledStream,
    TrainBatchSampler,
    WindowedStream,
    split_batch,
)

NUM_TRAIN = 23


def stream(shards: tuple[int, ...], window: int | None, *, seed: int = 0):
    """Returns the order of a split with these shards."""
    return ShuffledStream(sum(shards), seed) if window is None else WindowedStream(shards, window=window, seed=seed)


def test_batch_that_ranks_cannot_share_is_refused_with_sizes_that_work():
    assert [split_batch(*sizes) for sizes in ((256, 32, 4), (96, 20, 2), (7, 4, 1))] == [(32, 2), (16, 3), (1, 7)]
    with pytest.raises(ValueError, match="use 99 or 102"):
        split_batch(100, 8, 3)


@pytest.mark.parametrize("global_batch", [2**24, 2**24 - 3, 16_777_213 // 7 * 7, 720_720])
@pytest.mark.parametrize("max_per_device", [1, 2, 1000, 4097, 2**24])
def test_split_batch_finds_the_largest_divisor_of_any_batch_at_once(global_batch, max_per_device):
    start = time.process_time()
    per_device, accumulation = split_batch(global_batch, max_per_device, 1)
    assert time.process_time() - start < 0.1
    assert per_device * accumulation == global_batch
    assert per_device <= max_per_device
    assert not any(global_batch % larger == 0 for larger in range(per_device + 1, min(max_per_device, 5000) + 1))


def test_each_epoch_visits_every_sample_once_in_another_order():
    rows = ShuffledStream(NUM_TRAIN, seed=3)(range(3 * NUM_TRAIN))
    epochs = rows.index.reshape(3, NUM_TRAIN)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(NUM_TRAIN).expand(3, -1))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert torch.equal(rows.epoch, torch.arange(3).repeat_interleave(NUM_TRAIN))


@pytest.mark.parametrize("window", [None, 2])
def test_order_is_the_same_whether_held_or_not_and_whatever_the_cut(window, monkeypatch):
    shards = (40_000, 3, 17, 60)  # more than one piece of a held permutation
    held = torch.cat([stream(shards, window)(range(first, first + 7_000)).index for first in range(0, 84_000, 7_000)])
    monkeypatch.setattr("maskgit_pl.data.order._MAX_CACHED", 0)
    assert torch.equal(stream(shards, window)(range(84_000)).index, held)
    assert not torch.equal(stream(shards, window, seed=2)(range(84_000)).index, held)


def test_epochs_follow_on_without_gap_or_repeat():
    step = 0
    order = TrainBatchSampler(NUM_TRAIN, per_device=4, accumulation=2, current_step=lambda: step)
    seen = []
    for _ in range(3):
        batches = list(order)
        assert len(batches) == len(order) == 6
        seen += [position for batch in batches for position in batch]
        step += 3
    assert seen == list(range(72))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 11, 12])
def test_validation_covers_each_sample_once_with_equal_batches(world_size, num_samples):
    ranks = [
        list(EvalBatchSampler(num_samples, per_device=3, world_size=world_size, rank=r)) for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [InOrder(num_samples)(positions) for batches in ranks for positions in batches]
    valid = torch.cat([r.index[r.valid] for r in rows])
    assert sorted(valid.tolist()) == list(range(num_samples))
    assert all(int(r.index.max()) < num_samples for r in rows)
    assert InOrder(3)(range(1, 6)).index.tolist() == [1, 2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [(1, 7, 100), (5,), (3, 0, 5, 1, 0), (4,) * 9, (0, 0, 2)])
@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_with_windows_each_epoch_visits_every_sample_once_in_another_order(shards, window):
    size = sum(shards)
    rows = stream(shards, window)(range(3 * size))
    epochs = rows.index.reshape(3, size)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(size).expand(3, -1))
    assert torch.equal(rows.epoch, torch.arange(3).repeat_interleave(size))
    if size > 5:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_a_window_is_so_many_shards_in_an_order_of_its_epoch():
    shard_of = torch.arange(8).repeat_interleave(5)
    epochs = shard_of[stream((5,) * 8, 3)(range(40 * 40)).index.reshape(40, 40)]
    orders = [tuple(frozenset(part.tolist()) for part in epoch.split(15)) for epoch in epochs]
    assert {tuple(map(len, order)) for order in orders} == {(3, 3, 2)}  # the last window has the rest
    assert len(set(orders)) > 30
    assert not any(epoch[:5].unique().numel() == 1 for epoch in epochs)  # samples are mixed over a window's shards


def test_the_windows_of_an_epoch_are_permuted_differently_and_each_differently_in_another_epoch():
    orders = [epoch.split(60) for epoch in stream((60,) * 8, 1)(range(2 * 480)).index.reshape(2, 480)]
    within = [tuple((window % 60).tolist()) for epoch in orders for window in epoch]  # shards begin at multiples of 60
    assert all(sorted(window) == list(range(60)) for window in within)
    assert len(set(within)) == 16


@pytest.mark.parametrize(("b", "A", "W"), [(4, 1, 1), (2, 3, 1), (3, 1, 4), (2, 3, 2)])  # as in the text
@pytest.mark.parametrize("step", [0, 5, 1000])
def test_positions_of_step_rank_and_micro_batch_follow_the_formula(b, A, W, step):  # noqa: N803
    for rank in range(W):
        order = TrainBatchSampler(
            b * A * W, per_device=b, accumulation=A, world_size=W, rank=rank, current_step=lambda: step
        )  # one step an epoch
        assert list(order) == [
            range(step * b * A * W + (micro * W + rank) * b, step * b * A * W + (micro * W + rank + 1) * b)
            for micro in range(A)
        ]


def test_windows_depend_on_the_seed_and_not_on_what_was_asked_before():
    shards = (40, 3, 17, 60)
    whole = stream(shards, 2)(range(480)).index
    jumping = stream(shards, 2)
    for first in (300, 0, 470, 119, 240):
        assert torch.equal(jumping(range(first, first + 10)).index, whole[first : first + 10])
    assert not torch.equal(stream(shards, 2, seed=1)(range(480)).index, whole)


def seconds_per_batch(order, positions: int) -> tuple[float, float]:
    """Returns the seconds of the first batch of 256 in the middle of an epoch, and the mean of the next 20."""
    times = []
    for number in range(21):
        first = positions // 2 + number * 256
        start = time.process_time()
        order(range(first, first + 256))
        times.append(time.process_time() - start)
    return times[0], sum(times[1:]) / 20


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("size", [10**7, 10**9])
def test_a_position_of_a_large_split_costs_the_same_anywhere(size, window):
    order = stream((10_000,) * (size // 10_000), window, seed=1)
    first, next_ones = seconds_per_batch(order, size)
    print(f"{size:.0e} samples, window {window}: first batch {1e3 * first:.1f} ms, then {1e3 * next_ones:.1f} ms")
    assert first < 5
    border = order(range(size - 2, size + 2))  # of two epochs
    assert border.epoch.tolist() == [0, 0, 1, 1]
    assert torch.equal(border.index[2:], order(range(size, size + 2)).index)
    assert 0 <= border.index.min() <= border.index.max() < size
