"""Packed weights give the outputs of plain layers, and follow their weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl.distributed import has_bfloat16
from maskgit_pl.networks.kernels import PackingLinear, _apply_gelu, _packed_dtypes, free_packed, set_packing

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(dtype not in _packed_dtypes(), reason=f"this CPU gains nothing by packing {dtype}"),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def layer(dtype: torch.dtype, *, bias: bool = True, gelu: bool = False) -> PackingLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PackingLinear(48, 80, bias=bias, gelu=gelu).to(dtype).requires_grad_(requires_grad=False)
    set_packing(made, enabled=True)
    return made


def plain(module: PackingLinear, x: torch.Tensor) -> torch.Tensor:
    """Computes the output in float64."""
    bias = None if module.bias is None else module.bias.double()
    y = F.linear(x.double(), module.weight.double(), bias)
    return F.gelu(y, approximate="tanh") if module.gelu else y


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_outputs_are_those_of_a_plain_layer_for_any_number_of_rows(dtype, bias, gelu):
    module, chance = layer(dtype, bias=bias, gelu=gelu), torch.Generator().manual_seed(1)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    for rows in [*range(70), 255, 256, 257, 300, 2056]:
        x = torch.randn(1, rows, 48, generator=chance).to(dtype)
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
def test_parts_and_strided_inputs(dtype):
    module = layer(dtype)
    x = torch.randn(7, 96, 3).to(dtype).transpose(1, 2)[..., ::2]
    whole = module(x)
    parts = torch.cat([module.part(x, 0, 16), module.part(x, 16, 80)], dim=-1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, module(x.contiguous()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_weight_is_packed_again(dtype):
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    module(x)
    changes = (
        lambda: module.weight.mul_(2),
        lambda: module.load_state_dict(layer(dtype).state_dict()),
        lambda: setattr(module.weight, "data", torch.ones(80, 48).to(dtype)),
    )
    for change in changes:
        before = module(x).clone()
        change()
        assert not torch.equal(module(x), before)
        torch.testing.assert_close(module(x).double(), plain(module, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_every_step_of_an_optimizer_is_followed(dtype, options):
    module, x = layer(dtype).requires_grad_(requires_grad=True), torch.ones(2, 48).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, **options)
    for _ in range(3):
        with torch.no_grad():
            before = module(x)
        module(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(module(x), before)
            torch.testing.assert_close(module(x).double(), plain(module, x), rtol=2e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3), (4, 49), (0,), (47,), ()])
def test_an_input_of_another_width_is_an_error_of_torch(dtype, shape):
    module = layer(dtype)
    module(torch.ones(2, 48).to(dtype))
    with pytest.raises(RuntimeError):
        module(torch.ones(shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_packs_only_when_asked_and_without_gradients(dtype):
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    module(x)
    assert not module._packed
    with torch.no_grad():
        module(x)
        assert len(module._packed) == 1
        set_packing(module, enabled=False)
        module(x)
        assert not module._packed


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_pickles_leave_the_packed_weight_behind(dtype):
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    expected = module(x)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not made._packed
        made.weight.mul_(0.5)
        assert not torch.equal(made(x), expected)
        assert torch.equal(module(x), expected)


def test_bfloat16_is_packed_only_where_the_cpu_multiplies_it():
    assert (torch.bfloat16 in _packed_dtypes()) == has_bfloat16("cpu")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_weight_in_the_memory_of_an_old_one_is_packed_too(dtype):
    """A freed weight's address is given to the next tensor of its size; the packed one keeps its source alive."""
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    for factor in range(1, 20):
        module.weight = torch.nn.Parameter(torch.full((80, 48), float(factor)).to(dtype), requires_grad=False)
        torch.testing.assert_close(module(x).double(), plain(module, x), rtol=1e-2, atol=1e-2)
        module.weight = torch.nn.Parameter(torch.zeros(80, 48).to(dtype), requires_grad=False)  # not packed


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_whose_changes_are_not_counted_is_not_packed(dtype):
    with torch.inference_mode():
        module = layer(dtype)
        module(torch.ones(2, 48).to(dtype))
    assert module.weight.is_inference()
    assert not module._packed


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_that_is_on_stays_on_and_keeps_its_weights(dtype):
    module, x = layer(dtype), torch.ones(2, 48).to(dtype)
    module(x)
    (before,) = module._packed.values()
    set_packing(module, enabled=True)
    module(x)
    assert next(iter(module._packed.values())) is before
    free_packed(module)
    assert not module._packed
    assert module.packs
