"""The order of samples: each once per epoch, equal for all ranks and workers, each position independent of others."""

import pytest
import torch

from maskgit_pl.data.order import InOrder, ShuffledStream, TrainBatchSampler, eval_batches, split_batch

NUM_TRAIN = 23


def test_batch_that_ranks_cannot_share_is_refused_with_sizes_that_work():
    assert [split_batch(*sizes) for sizes in ((256, 32, 4), (96, 20, 2), (7, 4, 1))] == [(32, 2), (16, 3), (1, 7)]
    with pytest.raises(ValueError, match="use 99 or 102"):
        split_batch(100, 8, 3)


def test_each_epoch_visits_every_sample_once_in_another_order():
    rows = ShuffledStream(NUM_TRAIN, seed=3)(range(3 * NUM_TRAIN))
    epochs = rows.index.reshape(3, NUM_TRAIN)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(NUM_TRAIN).expand(3, -1))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert torch.equal(rows.epoch, torch.arange(3).repeat_interleave(NUM_TRAIN))


def test_the_order_does_not_depend_on_the_cache_or_on_the_batches(monkeypatch):
    order = ShuffledStream(40_080, seed=0)  # more than one piece of a cached permutation
    cached = torch.cat([order(range(first, first + 7_000)).index for first in range(0, 84_000, 7_000)])
    monkeypatch.setattr("maskgit_pl.data.order._MAX_CACHED", 0)
    assert torch.equal(order(range(84_000)).index, cached)
    assert not torch.equal(ShuffledStream(40_080, seed=2)(range(84_000)).index, cached)


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


def test_a_resumed_run_ends_with_its_epoch():
    for start in (1, 5):  # an epoch is 3 steps
        order = TrainBatchSampler(NUM_TRAIN, per_device=8, current_step=lambda start=start: start)
        assert list(order) == [range(step * 8, step * 8 + 8) for step in range(start, -(-start // 3) * 3)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 11, 12])
def test_validation_covers_each_sample_once_with_equal_batches(world_size, num_samples):
    ranks = [eval_batches(num_samples, per_device=3, world_size=world_size, rank=r) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [InOrder(num_samples)(positions) for batches in ranks for positions in batches]
    valid = torch.cat([r.index[r.valid] for r in rows])
    assert sorted(valid.tolist()) == list(range(num_samples))
    assert all(int(r.index.max()) < num_samples for r in rows)


def test_epochs_of_a_large_split_meet_without_a_list_of_its_samples():
    size = 10**9
    order = ShuffledStream(size, seed=1)
    border = order(range(size - 2, size + 2))
    assert border.epoch.tolist() == [0, 0, 1, 1]
    assert torch.equal(border.index[2:], order(range(size, size + 2)).index)
    assert 0 <= border.index.min() <= border.index.max() < size
