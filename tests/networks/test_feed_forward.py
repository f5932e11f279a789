"""An MLP in parts has the output of the whole, and holds each packed weight once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.networks import kernels as module
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.networks.kernels import (
    PackingLinear,
    _count_parts,
    _packed_dtypes,
    add_output,
    feed_forward,
    set_packing,
)
from maskgit_pl.networks.transformer import TransformerConfig

needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in _packed_dtypes(), reason="this CPU gains nothing by packing bfloat16"
)
HIDDEN = 96


def gated(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def layers(*, gate: bool = False, bias: bool = True) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.ModuleList(
            [
                PackingLinear(32, HIDDEN * (1 + gate), bias=bias, gelu=not gate),
                PackingLinear(HIDDEN, 48, bias=bias),
            ]
        )
    set_packing(made.requires_grad_(requires_grad=False).bfloat16(), enabled=True)
    return made


def in_float64(x: Tensor, inner: PackingLinear, outer: PackingLinear, *, gate: bool) -> Tensor:
    hidden = F.linear(x.double(), inner.weight.double(), None if inner.bias is None else inner.bias.double())
    hidden = gated(*hidden.chunk(2, dim=-1)) if gate else F.gelu(hidden, approximate="tanh")
    return F.linear(hidden, outer.weight.double(), None if outer.bias is None else outer.bias.double())


@pytest.fixture
def in_parts(monkeypatch):
    """Lets any number of hidden values be computed in a number of parts."""
    return lambda number: monkeypatch.setattr(module, "_count_parts", lambda *_: number)


@torch.no_grad()
@needs_bfloat16
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
def test_the_parts_add_up_to_the_output(in_parts, gate, bias, num_parts):
    in_parts(num_parts)
    inner, outer = layers(gate=gate, bias=bias)
    chosen = gated if gate else None
    for shape in ((1, 257, 32), (2, 5, 32), (3, 32), (32,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        expected = in_float64(x, inner, outer, gate=gate)
        residual = torch.randn(expected.shape).bfloat16()
        before = residual.clone()
        alone, added = (feed_forward(x, inner, outer, chosen, to=to) for to in (None, residual))
        assert alone.dtype == added.dtype == torch.bfloat16
        torch.testing.assert_close(alone.double(), expected, rtol=2e-2, atol=6e-3)
        torch.testing.assert_close(added.double(), expected + residual.double(), rtol=2e-2, atol=2e-2)
        assert torch.equal(residual, before)
    assert (len(inner._packed), len(outer._packed)) == (num_parts * (1 + gate) if num_parts > 1 else 1, num_parts)


@torch.no_grad()
@needs_bfloat16
def test_another_number_of_parts_replaces_the_packed_weights(in_parts):
    inner, outer = layers()
    for num_parts in (2, 3, 1, 3):
        in_parts(num_parts)
        feed_forward(torch.ones(4, 32).bfloat16(), inner, outer)
        assert len(inner._packed) == len(outer._packed) == num_parts


@torch.no_grad()
@needs_bfloat16
def test_the_parts_follow_a_changed_weight(in_parts):
    in_parts(2)
    inner, outer = layers()
    x = torch.ones(4, 32).bfloat16()
    feed_forward(x, inner, outer)
    for change in (lambda: inner.weight.mul_(-2), lambda: outer.weight.mul_(-2), lambda: outer.bias.add_(1)):
        change()
        expected = in_float64(x, inner, outer, gate=False)
        torch.testing.assert_close(feed_forward(x, inner, outer).double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gate", [False, True])
def test_what_is_not_packed_is_computed_as_a_whole(in_parts, gate):
    """In float32, with gradients, with layers that do not pack, and with layers of other kinds."""
    in_parts(2)
    inner, outer = layers(gate=gate)
    x = torch.randn(4, 32).bfloat16()
    chosen = gated if gate else None
    whole = outer(gated(*inner(x).chunk(2, dim=-1)) if gate else inner(x))
    assert torch.equal(feed_forward(x, inner, outer, chosen), whole)  # gradients are on
    with torch.no_grad():
        if torch.bfloat16 in _packed_dtypes():
            assert not torch.equal(feed_forward(x, inner, outer, chosen), whole)  # rounded twice
        feed_forward(x.float(), inner.float(), outer.float(), chosen)
        assert len(inner._packed) == len(outer._packed) <= 1
        set_packing(nn.ModuleList([inner, outer]), enabled=False)
        feed_forward(x, inner.bfloat16(), outer.bfloat16(), chosen)
        assert not inner._packed
        plain = nn.Linear(HIDDEN, 48).bfloat16()
        assert feed_forward(x, inner, plain, chosen).shape == (4, 48)


@torch.no_grad()
def test_a_product_without_packed_weights_is_exact():
    """The outer layer may have another dtype, or an input in inference mode."""
    _, outer = layers()
    outer.float()
    x = torch.randn(4, HIDDEN)
    first = outer.add_part(None, x[:, :40], 0, 40)
    torch.testing.assert_close(outer.add_part(first, x[:, 40:], 40, HIDDEN), outer(x))
    assert {part[0] for part in outer._packed} <= {0}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_is_added_to_the_output_of_any_layer(dtype, bias):
    layer = layers(bias=bias)[1].to(dtype)
    plain = nn.Linear(HIDDEN, 48, bias=bias).to(dtype)
    plain.load_state_dict(layer.state_dict())
    x, to = torch.randn(2, 5, HIDDEN).to(dtype), torch.randn(2, 5, 48).to(dtype)
    for made in (layer, plain):
        torch.testing.assert_close(add_output(to, made, x), to + plain(x), rtol=2e-2, atol=2e-2)
    if dtype == torch.bfloat16 and dtype in _packed_dtypes():
        assert not torch.equal(add_output(to, layer, x), to + layer(x))  # rounded once, not twice
    assert len(layer._packed) == (dtype in _packed_dtypes())  # the same as of the output alone
    layer(x)
    assert len(layer._packed) == (dtype in _packed_dtypes())


def test_the_number_of_parts_divides_the_hidden_values(monkeypatch):
    monkeypatch.setattr(module, "_has_amx", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    released = [_count_parts(rows, 3072) for rows in (1, 257, 325, 326, 514, 651, 652, 2056, 10**6)]
    assert released == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [_count_parts(10**6, hidden) for hidden in (1, 1024, 2047, 2048, 2050, 4096, 5121, 4099)] == [
        1, 1, 1, 2, 2, 4, 3, 1,
    ]  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [_count_parts(rows, 3072) for rows in (514, 652, 2056)] == [1, 2, 3]
    monkeypatch.setattr(module, "_has_amx", lambda: False)
    assert _count_parts(10**6, 4096) == 1


@torch.no_grad()
@needs_bfloat16
@pytest.mark.parametrize("config", [
    TransformerConfig(30, 5, (3, 4), 32, 2, 2, HIDDEN),
    AdaLNConfig(30, 5, (3, 4), 32, 2, 2, HIDDEN),
])  # fmt: skip
def test_the_backbones_compute_their_mlps_in_parts(in_parts, config):
    network = config.create().eval().requires_grad_(requires_grad=False).bfloat16()
    tokens, labels = torch.randint(31, (2, 12)), torch.arange(2)
    whole = network(tokens, labels)
    set_packing(network, enabled=True)
    in_parts(2)
    torch.testing.assert_close(network(tokens, labels), whole, rtol=5e-2, atol=5e-2)
    assert [len(block.fc2._packed) for block in network.blocks] == [2, 2]
