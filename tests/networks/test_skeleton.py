import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from maskgit_pl.networks.weights import skeletons


@pytest.mark.parametrize("build", [lambda: nn.Embedding(3, 4), lambda: nn.Linear(3, 4), lambda: nn.Conv2d(1, 2, 3)])
def test_a_network_has_its_shapes_and_no_memory(build):
    with skeletons():
        made = build()
    for name, tensor in build().state_dict().items():
        assert made.state_dict()[name].is_meta
        assert made.state_dict()[name].shape == tensor.shape


@pytest.mark.parametrize(
    "draw", [nn.init.normal_, nn.init.kaiming_normal_, nn.init.trunc_normal_, nn.init.xavier_normal_]
)
def test_initial_weights_may_be_drawn_by_any_function(draw):
    with skeletons():
        weight = nn.Parameter(torch.empty(3, 4))
        assert draw(weight) is weight


def test_networks_outside_are_drawn_as_always():
    with skeletons():
        nn.Embedding(3, 4)
    assert nn.Embedding(3, 4).weight.std() > 0


def test_no_normal_draw_reaches_torch():
    """For one on the meta device, torch imports its compiler: `tests/test_benchmarks_import_time.py`."""

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(func)
            return func(*args, **(kwargs or {}))

    called = set()
    with Recorder(), skeletons():
        weight = nn.Embedding(3, 4).weight
        weight.data.normal_()
        nn.Linear(3, 4)
    assert called
    assert called.isdisjoint({torch.Tensor.normal_, nn.init.normal_})
