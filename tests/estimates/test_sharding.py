"""Shards and traffic equal those of FSDP2 and DDP on a fake process group."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.collectives import CountedCollectives
from maskgit_pl.estimates.sharding import FLOAT, HALF, Group, all_reduce_bytes, ddp_traffic, fsdp_traffic, group_of
from maskgit_pl.estimates.transformer import block_group, root_group
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.training.compile_and_checkpointing import prepare_blocks
from maskgit_pl.training.strategies import shard_blocks

CONFIG = TransformerConfig(24, 3, (4, 4), 48, 3, 4, 100, dropout=0.0)
BLOCKS, ROOT = [block_group(CONFIG)] * CONFIG.depth, root_group(CONFIG)


@pytest.fixture
def world() -> Iterator:
    def start(ranks, rank=0):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        return init_device_mesh("cpu", (ranks,))

    yield start
    dist.destroy_process_group()


def sharded(mesh, checkpointing="none", precision="32-true"):
    network = CONFIG.create()
    prepare_blocks(network.blocks, activation_checkpointing=checkpointing)
    shard_blocks(network, network.blocks, mesh, precision=precision)
    return network


def step(network):
    tokens, labels = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    if isinstance(network, DistributedDataParallel):  # which knows forward only
        logits = network(tokens, labels, vocabulary="all")
    else:
        logits = network.forward_masked(tokens, labels, tokens == 0, vocabulary="all")
    logits.float().sum().backward()


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (4, 0), (7, 6), (64, 0), (64, 40), (512, 0)])
def test_a_ranks_shard(world, ranks, rank):
    network = sharded(world(ranks, rank))
    held = sum(parameter.to_local().numel() for parameter in network.parameters())
    assert held == sum(group.shard(ranks, rank) for group in (*BLOCKS, ROOT))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("ranks", [2, 7, 512])
def test_traffic_of_fsdp(world, ranks, checkpointing, precision):
    network, half = sharded(world(ranks), checkpointing, precision), precision == "bf16-mixed"
    with CountedCollectives() as counted, torch.autocast("cpu", torch.bfloat16, enabled=half):
        step(network)
        step(network)  # Lightning lets every micro-batch scatter its gradients
    expected = fsdp_traffic(BLOCKS, ROOT, ranks, micro_batches=2, weight=HALF if half else FLOAT)
    assert counted.traffic(ranks) == expected
    assert expected.all_gather < 2 * expected.reduce_scatter  # the root is gathered once


def test_traffic_of_ddp(world):
    world(8)
    network = DistributedDataParallel(CONFIG.create(), gradient_as_bucket_view=True)
    counted = CountedCollectives()
    counted.follow(network)
    with network.no_sync():
        step(network)
    assert counted.calls["all_reduce"] == 0
    step(network)
    assert counted.calls["all_reduce"] > 0
    assert counted.traffic(8) == ddp_traffic([*BLOCKS, ROOT], 8, micro_batches=2)


def test_buffers_are_broadcast_before_each_forward_pass(world):
    world(8)
    with torch.no_grad():
        network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    wrapped = DistributedDataParallel(network)
    with CountedCollectives() as counted:
        wrapped(torch.rand(4, 3))
        wrapped(torch.rand(4, 3))
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    assert counted.traffic(8).broadcast == ddp_traffic([], 8, buffers=buffers, micro_batches=2).broadcast


def test_one_rank_sends_nothing_and_many_send_twice_the_gradients():
    assert ddp_traffic([ROOT], 1, buffers=100).total == fsdp_traffic(BLOCKS, ROOT, 1).total == 0
    assert all_reduce_bytes(1000, 2) == 1000
    assert all_reduce_bytes(1000, 1000) == pytest.approx(2000, rel=2e-3)


def test_shards_cover_a_group_and_padding_shows_where_ranks_do_not_divide_rows():
    group = Group(((768,), (768, 10)))
    for ranks in (1, 5, 64, 512, 1000):
        assert sum(group.shard(ranks, rank) for rank in range(ranks)) == group.numel
    assert group.padded_numel(64) == group.numel
    assert group.padded_numel(512) == 1024 + 10240


def test_frozen_weights_are_in_no_group():
    network = CONFIG.create()
    network.token_embedding.requires_grad_(False)
    assert (
        group_of([network]).numel
        == sum(group.numel for group in (*BLOCKS, ROOT)) - network.token_embedding.weight.numel()
    )
