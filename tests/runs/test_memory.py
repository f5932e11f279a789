"""Memory and disk space of a run, from their parts; shards are those of FSDP2 on a fake process group."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.runs.memory import (
    Activations,
    Group,
    checkpoint_bytes,
    estimate_memory,
    group_of,
    max_num_checkpoints,
)
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, complete_checkpoints
from maskgit_pl.training.checkpoints import Checkpoints
from maskgit_pl.training.strategies import shard_blocks

BLOCK, ROOT = Group(((64, 10),)), Group(((32, 10), (32,)))
WHOLE = 3 * 640 + 352


def test_ddp_holds_everything_and_fsdp_its_part():
    held = Activations(kept=1000, casts=0, working=100)
    ddp = estimate_memory([BLOCK] * 3, ROOT, held, strategy="ddp", ranks=8)
    assert ddp.total == 20 * WHOLE + 1100
    fsdp = estimate_memory([BLOCK] * 3, ROOT, held, strategy="fsdp", ranks=8)
    assert fsdp.weights + fsdp.gradients + fsdp.moments + fsdp.average == 20 * WHOLE // 8
    assert fsdp.gathered == 4 * (2 * 352 + 5 * 640)
    assert estimate_memory([BLOCK], ROOT, held, strategy="ddp", ranks=8, averaged=0).average == 0


def test_fsdp_gathers_in_bfloat16_and_keeps_no_copies():
    held = Activations(kept=1000, casts=500, working=100)
    assert estimate_memory([BLOCK], ROOT, held, strategy="ddp", ranks=8).casts == 500
    fsdp = estimate_memory([BLOCK], ROOT, held, strategy="fsdp", ranks=8)
    assert fsdp.casts == 0
    assert fsdp.gathered == 2 * (352 + 3 * 640) + 4 * (352 + 2 * 640)


class _Run:
    """The methods of a Trainer that ``Checkpoints`` calls."""

    is_global_zero = True

    def __init__(self):
        self.global_step = 0

    def save_checkpoint(self, path):
        FolderCheckpointIO().save_checkpoint({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(("steps", "every", "keep_last", "keep_every"), [
    (100, 10, 2, None), (100, 10, 3, 20), (95, 10, 2, 30), (7, 10, 2, None), (100, 10, 1, 10), (15, 10, 3, None),
])  # fmt: skip
def test_kept_checkpoints_are_the_most_that_a_run_has_at_a_time(tmp_path, steps, every, keep_last, keep_every):
    run, most = _Run(), 0
    checkpoints = Checkpoints(tmp_path, every_n_steps=every, keep_last=keep_last, keep_every=keep_every)
    save = run.save_checkpoint

    def watched(path):
        nonlocal most
        save(path)
        most = max(most, len(complete_checkpoints(tmp_path)))  # before the oldest goes

    run.save_checkpoint = watched
    for step in range(1, steps + 1):
        run.global_step = step
        if step % every == 0 or step == steps:
            checkpoints.save(run)
    assert most == max_num_checkpoints(steps, every=every, keep_last=keep_last, keep_every=keep_every)


def test_a_run_of_very_many_steps_is_counted_at_once():
    """The number of steps of a run that is to be stopped by hand."""
    assert max_num_checkpoints(10**15, every=1, keep_last=2, keep_every=None) == 3
    assert max_num_checkpoints(10**15, every=10, keep_last=2, keep_every=25) == 3 + 2 * 10**13 - 1


def test_a_checkpoint_of_the_released_transformer():
    assert checkpoint_bytes(172_457_193, averaged=172_457_193, tensors=297) == pytest.approx(2.76e9, rel=1e-3)


CONFIG = TransformerConfig(24, 3, (4, 4), 48, 3, 4, 100, dropout=0.0)
with torch.device("meta"):
    NETWORK = CONFIG.create()
IN_BLOCKS = set(NETWORK.blocks.parameters())
OTHERS = Group(tuple(tuple(each.shape) for each in NETWORK.parameters() if each not in IN_BLOCKS))
GROUPS = [*[group_of([block]) for block in NETWORK.blocks], OTHERS]


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (4, 0), (7, 6), (64, 0), (64, 40), (512, 0)])
def test_a_ranks_shard_is_that_of_fsdp2(ranks, rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        network = CONFIG.create()
        shard_blocks(network, network.blocks, init_device_mesh("cpu", (ranks,)), precision="32-true")
        held = sum(parameter.to_local().numel() for parameter in network.parameters())
    finally:
        dist.destroy_process_group()
    assert held == sum(group.shard(ranks, rank) for group in GROUPS)


def test_shards_cover_a_group_and_padding_shows_where_ranks_do_not_divide_rows():
    group = Group(((768,), (768, 10)))
    for ranks in (1, 5, 64, 512, 1000):
        assert sum(group.shard(ranks, rank) for rank in range(ranks)) == group.numel
    assert group.padded_numel(64) == group.numel
    assert group.padded_numel(512) == 1024 + 10240


def test_frozen_weights_are_in_no_group():
    network = CONFIG.create()
    network.token_embedding.requires_grad_(False)
    embedded = network.token_embedding.weight.numel()
    assert group_of([network]).numel == sum(group.numel for group in GROUPS) - embedded
