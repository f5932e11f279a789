"""Packed weights give the outputs of plain layers, and follow their weights.

An MLP in parts has the output of the whole, and holds each packed weight once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.networks import kernels as module
from maskgit_pl.networks.kernels import (
    FastLinear,
    _apply_gelu,
    _packed_dtypes,
    attend,
    feed_forward,
    rms_norm,
    set_packing,
)

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(dtype not in _packed_dtypes(), reason=f"this CPU gains nothing by packing {dtype}"),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def layer(dtype: torch.dtype, *, bias: bool = True, gelu: bool = False) -> FastLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = FastLinear(48, 80, bias=bias, gelu=gelu).to(dtype).requires_grad_(requires_grad=False)
    set_packing(module, enabled=True)
    return module


def plain(module: FastLinear, x: torch.Tensor) -> torch.Tensor:
    """Computes the output in float64."""
    bias = None if module.bias is None else module.bias.double()
    y = F.linear(x.double(), module.weight.double(), bias)
    return F.gelu(y, approximate="tanh") if module.gelu else y


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "gelu"), [(True, True), (False, False)])
def test_outputs_are_those_of_a_plain_layer_for_any_number_of_rows(dtype, bias, gelu):
    module, generator = layer(dtype, bias=bias, gelu=gelu), torch.Generator().manual_seed(1)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    for rows in [*range(70), 255, 256, 257, 300, 2056]:
        x = torch.randn(1, rows, 48, generator=generator).to(dtype)
        torch.testing.assert_close(module(x).double(), plain(module, x), rtol=tolerance, atol=tolerance)
    assert module._packed


def test_gelu_in_place_is_exact_to_rounding_for_any_number_and_shape():
    """The largest difference of torch's own in float32 is 5e-7 here."""
    numbers = torch.cat([torch.linspace(-12, 12, 99_990), torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, 3e18, -3e18])])
    for x in (numbers.clone(), numbers[:99_990].reshape(3, 11, -1).clone(), numbers[:60].reshape(60, 1).clone()):
        expected = F.gelu(x.double(), approximate="tanh")
        out = _apply_gelu(x)
        assert out.data_ptr() == x.data_ptr()
        torch.testing.assert_close(out.double(), expected, rtol=4e-7, atol=4e-7)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_weight_is_packed_again(dtype):
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    module(x)
    changes = (
        lambda: module.weight.mul_(2),
        lambda: setattr(module.weight, "data", torch.ones(80, 48).to(dtype)),
    )
    for change in changes:
        before = module(x).clone()
        change()
        assert not torch.equal(module(x), before)
        torch.testing.assert_close(module(x).double(), plain(module, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_packs_only_if_enabled_and_without_gradients(dtype):
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    module(x)
    assert not module._packed  # gradients are on
    with torch.no_grad():
        module(x)
        assert len(module._packed) == 1
        set_packing(module, enabled=False)
        module(x)
        assert not module._packed
    with torch.inference_mode():  # torch does not count the changes of its weights
        module = layer(dtype)
        module(torch.ones(2, 48).to(dtype))
        assert not module._packed


needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in _packed_dtypes(), reason="this CPU gains nothing by packing bfloat16"
)
HIDDEN = 96


def gated(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def layers(*, gate: bool = False, bias: bool = True) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = FastLinear(32, HIDDEN * (1 + gate), bias=bias, gelu=not gate)
        mlp = nn.ModuleList([inner, FastLinear(HIDDEN, 48, bias=bias)])
    set_packing(mlp.requires_grad_(requires_grad=False).bfloat16(), enabled=True)
    return mlp


def in_float64(x: Tensor, inner: FastLinear, outer: FastLinear, *, gate: bool) -> Tensor:
    hidden = F.linear(x.double(), inner.weight.double(), None if inner.bias is None else inner.bias.double())
    hidden = gated(*hidden.chunk(2, dim=-1)) if gate else F.gelu(hidden, approximate="tanh")
    return F.linear(hidden, outer.weight.double(), None if outer.bias is None else outer.bias.double())


@pytest.fixture
def in_parts(monkeypatch):
    """Lets any number of hidden values be computed in a number of parts."""
    return lambda number: monkeypatch.setattr(module, "_count_parts", lambda *_: number)


@torch.no_grad()
@needs_bfloat16
@pytest.mark.parametrize(("gate", "bias", "num_parts"), [(False, True, 1), (False, True, 2), (True, False, 3)])
def test_the_parts_add_up_to_the_output(in_parts, gate, bias, num_parts):
    in_parts(num_parts)
    inner, outer = layers(gate=gate, bias=bias)
    chosen = gated if gate else None
    for shape in ((1, 257, 32), (32,)):
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


@pytest.mark.parametrize("heads_at_once", [1, 2, 3])
def test_attention_by_products_is_the_fused_one_to_rounding(monkeypatch, heads_at_once):
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(module, "_SCORE_BYTES", 2 * 5 * 130 * heads_at_once)
    query = torch.randn(2, 3, 5, 16)
    key, value = torch.randn(2, 2, 3, 130, 16)
    fused = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    with torch.no_grad():
        attended = attend(*(part.bfloat16() for part in (query, key, value)))
        assert torch.equal(attend(query, key, value), fused)
    assert (attended.dtype, attended.shape) == (torch.bfloat16, (2, 5, 48))
    assert 0 < (attended.float() - fused).abs().max() < 0.03


def test_attention_in_training_has_the_gradients_of_the_fused_one_to_rounding():
    parts = torch.randn(3, 2, 3, 40, 16, requires_grad=True)

    def gradient(dtype: torch.dtype, dropout: float = 0.0) -> torch.Tensor:
        (found,) = torch.autograd.grad(attend(*parts.to(dtype), dropout=dropout).square().sum(), parts)
        return found

    exact, rounded = gradient(torch.float32), gradient(torch.bfloat16)
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(gradient(torch.bfloat16, dropout=0.5), gradient(torch.bfloat16, dropout=0.5))


@torch.no_grad()
def test_a_norm_of_bfloat16_is_that_of_torch_to_rounding():
    x = torch.randn(2, 5, 48) * torch.logspace(-3, 3, 5)[:, None]
    expected = F.rms_norm(x, (48,), eps=1e-5)
    assert torch.equal(rms_norm(x, eps=1e-5), expected)
    x = x.bfloat16()
    normed = rms_norm(x, eps=1e-5)
    assert not torch.equal(normed, F.rms_norm(x, (48,), eps=1e-5))  # its own passes
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.float(), expected, rtol=2e-2, atol=1e-4)
