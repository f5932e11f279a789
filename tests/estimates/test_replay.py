"""A replay with fake tensors equals the same step with real ones."""

import pytest
import torch
from torch import nn

from maskgit_pl.estimates.replay import LiveBytes, fake_tensors, replay
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    3, base_channels=32, num_groups=8, channel_multipliers=(1, 1, 2), num_res_blocks=1, codebook_size=64, code_dim=16
)


def step_of(network, batch=2):
    def step():
        network.zero_grad()
        output = network(torch.rand(batch, 3, 32, 32))
        (output.reconstruction.float().square().sum() + output.quantized.loss).backward()

    return step


def test_nothing_is_computed_and_the_same_is_counted():
    real = VQGAN(CONFIG)
    with torch.device("meta"):
        empty = VQGAN(CONFIG)
    counted = replay(step_of(real), [real])
    with fake_tensors(empty):
        assert replay(step_of(empty), [empty]) == counted
    assert counted.flops > 0


def test_memory_grows_with_the_batch_alone():
    with torch.device("meta"):
        network = VQGAN(CONFIG)
    with fake_tensors(network):
        peaks = [replay(step_of(network, batch), [network]).peak for batch in (1, 2, 3)]
        one = replay(step_of(network, 1), [network])
    assert [one.peak_of(times) for times in (1, 2, 3)] == pytest.approx(peaks, rel=0.02)


def test_bfloat16_stands_where_autocast_on_a_gpu_puts_it():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3))
    saved = []

    def step():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append((t.dtype, t.numel())), t)[1], lambda t: t
        ):
            assert network(torch.rand(1, 4, 8, 8)).dtype == torch.bfloat16

    replay(step, [network], precision="bf16-mixed")
    image, hidden, weight = 4 * 8 * 8, 4 * 6 * 6, 4 * 4 * 9
    half, single = torch.bfloat16, torch.float32
    assert {(half, image), (half, weight), (single, hidden), (half, hidden)} <= set(saved)  # norm and SiLU in float32
    assert (single, image) not in saved


def test_live_bytes_follow_what_is_held():
    kept = []
    with LiveBytes() as live:
        kept.append(torch.zeros(1000))
        torch.zeros(5000)
        kept.append(kept[0].view(10, 100))  # no memory of its own
    assert (live.live, live.peak) == (4000, 24000)
