"""Products of oneDNN are those of torch, forward and backward; packed weights follow their weights.

An MLP in parts has the output of the whole, and holds each packed weight once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskgit_pl.networks import kernels as module
from maskgit_pl.networks.kernels import (
    FastLinear,
    _packed_dtypes,
    attend,
    feed_forward,
    linear,
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


def test_torch_has_the_products_of_this_cpu():
    """They are private: a version of torch without them would be half as fast, and nothing else would tell."""
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    assert torch.backends.mkldnn.is_available()


@pytest.fixture
def by_onednn(monkeypatch) -> list[tuple[int, ...]]:
    """Lets oneDNN multiply on any CPU, and returns the shapes of the weights that it is given."""
    shapes, multiply = [], module._multiply
    monkeypatch.setattr(module, "_multiplies_by_onednn", lambda: True)

    def record(x: Tensor, weight: Tensor, *args: object, **kwargs: bool) -> Tensor:
        shapes.append(tuple(weight.shape))
        return multiply(x, weight, *args, **kwargs)

    monkeypatch.setattr(module, "_multiply", record)
    return shapes


NEEDED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 70, 48), (2, 3, 4, 48), (0, 48), (2, 0, 48)], ids=str)
def test_products_and_gradients_of_onednn_are_those_of_torch(by_onednn, shape, num_threads, needed):
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (80, 48), (80,)))
    wide = torch.randn(*shape[:-1], 60, generator=generator)[..., 6:54]  # not contiguous
    torch.set_num_threads(num_threads)
    for inputs in ([x, weight, bias], [wide, weight, bias], [x, weight]):
        wanted = [tensor.requires_grad_(requires_grad=needs) for tensor, needs in zip(inputs, needed, strict=False)]
        wanted = [tensor for tensor in wanted if tensor.requires_grad]
        found, expected = ([product(*inputs)] for product in (linear, F.linear))
        for outputs in (found, expected) if wanted else ():
            weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
            outputs += torch.autograd.grad(outputs[0], wanted, weights)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert [part.stride() for part in found] == [part.stride() for part in expected]
    torch.set_num_threads(before)
    assert bool(by_onednn) == (0 not in shape)


def test_gradients_are_the_same_with_checkpoints_and_expanded_gradients(by_onednn):
    layer, x = FastLinear(48, 80, gelu=True), torch.randn(3, 48, requires_grad=True)
    inputs = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).sum(), inputs)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), inputs)
    assert all(map(torch.equal, plain, again))


def test_gradients_of_gradients_are_those_of_torch(by_onednn):
    x, weight = torch.randn(3, 48, requires_grad=True), torch.randn(80, 48, requires_grad=True)
    found, expected = (
        torch.autograd.grad(torch.autograd.grad(y.sum() + y.square().sum(), x, create_graph=True)[0].sum(), (x, weight))
        for y in (linear(x, weight), F.linear(x, weight))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert by_onednn


def test_other_inputs_take_the_product_of_torch(by_onednn):
    weight, x = torch.randn(80, 48), torch.randn(3, 48)
    for dtype in (torch.float64, torch.bfloat16):
        assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, 1:], weight)
    assert not by_onednn
    linear(x, weight)
    assert by_onednn == [(80, 48)]


def trace(layer: nn.Module, x: Tensor) -> torch.Graph:
    return torch.jit.trace(layer, x, check_trace=False).graph  # the check would call the layer again


@pytest.mark.parametrize("record", ["export", "trace"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_graphs_have_the_product_of_torch(by_onednn, record):
    layer, x = FastLinear(48, 80).eval(), torch.randn(3, 48)
    set_packing(layer, enabled=True)
    with torch.no_grad():
        graph = torch.export.export(layer, (x,)).graph if record == "export" else trace(layer, x)
    assert "aten" in str(graph)
    assert "linear" in str(graph)
    assert "mkldnn" not in str(graph)
    assert not by_onednn


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
