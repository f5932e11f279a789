"""A replay with fake tensors equals the same step with real ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.fixture
def autocast_of_gpu():
    """The rules of the GPU's own autocast, which fake tensors on it follow without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


OPERATIONS = {
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "normalize": lambda x: F.normalize(x, dim=1),
    "sum": lambda x: x.sum(-1),
    "square": lambda x: x.square(),
    "power": lambda x: x**2,
    "exp": lambda x: x.exp(),
    "softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x.mean(-1),
    "silu": F.silu,
    "pool": lambda x: F.avg_pool2d(x, 2),
    "at": lambda x: x.float() @ x.float(),
    "einsum": lambda x: torch.einsum("bchw,bchw->bhw", x.float(), x.float()),
    "add": lambda x: x + x.float(),
    "cat": lambda x: torch.cat([x, x.float()]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_dtype_that_the_autocast_of_a_gpu_gives_it(name, autocast_of_gpu):
    found = []
    with FakeTensorMode():
        replay(
            lambda: found.append(OPERATIONS[name](torch.empty(2, 4, 8, 8, dtype=torch.bfloat16)).dtype),
            [],
            precision="bf16-mixed",
        )
        on_gpu = OPERATIONS[name](torch.empty(2, 4, 8, 8, dtype=torch.bfloat16, device="cuda")).dtype
    assert found == [on_gpu]


def test_a_part_without_autocast_stays_in_float32():
    layer, found = nn.Linear(8, 8), []

    def step():
        found.append(layer(torch.zeros(2, 8)).dtype)
        with torch.autocast("cpu", enabled=False):
            found.append(layer(torch.zeros(2, 8)).dtype)

    replay(step, [layer], precision="bf16-mixed")
    assert found == [torch.bfloat16, torch.float32]
