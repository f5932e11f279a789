"""Every registered quantizer keeps the contract: shapes, gradients, determinism, resuming, export, and two ranks."""

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from einops import rearrange

from maskgit_pl.networks.quantizers import build_sized, quantizers
from maskgit_pl.networks.vqgan import VQGANConfig
from tests.forked import run_ranks

OTHERS = {  # specs and sizes (K, D) that are not a name of 16 codes of size 4
    "fsq": ({"name": "fsq", "levels": [4, 3, 2]}, 24, 3),
    "product of ema": ({"name": "product", "num_groups": 3, "quantizer": "ema"}, 8, 6),
    "product of gumbel": ({"name": "product", "quantizer": {"name": "gumbel", "kl_weight": 0.1}}, 16, 4),
    "ema entropy": ({"name": "ema", "entropy_weight": 0.1}, 16, 4),
}
CASES = {**{name: (name, 16, 4) for name in quantizers.names()}, **OTHERS}


def build(case, *, torch_seed=0):
    spec, codebook_size, code_dim = CASES[case]
    torch.manual_seed(torch_seed)
    return build_sized(spec, codebook_size=codebook_size, code_dim=code_dim).create(
        codebook_size=codebook_size, code_dim=code_dim
    )


def features(case, *, batch=4, seed=0):
    return torch.randn(batch, CASES[case][2], 3, 5, generator=torch.Generator().manual_seed(seed))


def train(quantizer, parts, optimizer=None, *, step, seed=3):
    """Makes a step on a global batch, and returns the sum of loss and output, with the gradients of the parts."""
    parts, outputs, total = [part.clone().requires_grad_() for part in parts], [], 0.0
    for number, part in enumerate(parts):
        quantizer.begin_micro_batch(seed=seed, step=step, micro_batch=number)
        outputs.append(quantizer(part))
        value = (outputs[-1].loss + (outputs[-1].quantized * weights_of(part)).mean()) / len(parts)
        value.backward()
        total += value.item()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    quantizer.update([o.tokens for o in outputs], [o.features for o in outputs], seed=seed, step=step)
    return total, torch.cat([part.grad for part in parts])


def weights_of(part):
    return part.detach().cos()


def optimizer_of(quantizer):
    parameters = list(quantizer.parameters())
    return torch.optim.Adam(parameters, lr=0.01) if parameters else None


def state_of(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if tolerance:
            torch.testing.assert_close(second[name], value, **tolerance, msg=name)
        else:
            assert torch.equal(second[name], value), name


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_the_output_has_the_shapes_of_the_contract(case):
    _, codebook_size, code_dim = CASES[case]
    quantizer, inputs = build(case).eval(), features(case).requires_grad_()
    output = quantizer(inputs)
    assert (quantizer.codebook_size, quantizer.code_dim) == (codebook_size, code_dim)
    assert output.quantized.shape == inputs.shape
    assert (output.tokens.shape, output.tokens.dtype) == ((4, 15), torch.int64)
    assert 0 <= output.tokens.min() <= output.tokens.max() < codebook_size
    assert (output.loss.shape, output.loss.dtype) == ((), torch.float32)
    assert not output.features.requires_grad
    assert not any(part.requires_grad for part in quantizer.losses.values())
    torch.testing.assert_close(sum(quantizer.losses.values(), torch.tensor(0.0)), output.loss.detach())
    assert torch.equal(output.features, inputs)
    assert torch.equal(output.tokens, quantizer.nearest(inputs))
    torch.testing.assert_close(
        output.quantized, rearrange(quantizer.lookup(output.tokens), "b (h w) d -> b d h w", h=3)
    )


def test_losses_and_gradients_are_finite_if_all_features_are_equal(case):
    row = features(case)[:1, :, 0, 0]
    for scale in (1e4, 1e-30, 0.0):
        quantizer, inputs = build(case), (scale * row[..., None, None].expand_as(features(case))).requires_grad_()
        quantizer.begin_micro_batch(seed=3, step=0, micro_batch=0)
        output = quantizer(inputs)
        gradients = torch.autograd.grad(
            output.loss + (output.quantized * weights_of(inputs)).mean(),
            [inputs, *quantizer.parameters()],
            allow_unused=True,
        )
        assert output.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def features_of_codes(case, quantizer):
    """Features (1, D, 1, K) that lie at the codes."""
    codes = quantizer.lookup(torch.arange(quantizer.codebook_size)).detach()
    if case == "fsq":  # the inverse of the bound, moved off the half-open ends
        levels = torch.tensor(quantizer.spec.levels)
        half, offset = (levels - 1) * 0.999 / 2, (1 - levels % 2) / 2
        codes = torch.atanh((codes * (levels // 2) + offset) / half * 0.9) - torch.tan(offset / half)
    return codes.t()[None, :, None]


def test_every_code_is_the_nearest_to_itself(case):
    quantizer = build(case)
    if case == "ibq":  # the largest inner product is the nearest code where all lengths are equal
        quantizer.codebook.data = torch.nn.functional.normalize(quantizer.codebook.data, dim=1)
    tokens = quantizer.nearest(features_of_codes(case, quantizer))
    assert torch.equal(tokens[0], torch.arange(quantizer.codebook_size))


def test_the_gradient_reaches_features_and_every_parameter(case):
    quantizer = build(case)
    _, gradient = train(quantizer, [features(case)], step=0)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_bfloat16_features_give_float32_codes_and_a_finite_loss(case):
    quantizer = build(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(features(case).bfloat16())
        assert torch.equal(quantizer.nearest(features(case).bfloat16()), output.tokens)
    assert output.quantized.dtype == output.loss.dtype == output.features.dtype == torch.float32
    assert output.quantized.isfinite().all()
    assert output.loss.isfinite()
    assert torch.equal(output.tokens, quantizer(features(case).bfloat16().float()).tokens)


def test_a_resumed_training_is_bit_exact(case):
    parts = [[features(case, seed=step)] for step in range(4)]
    through = build(case)
    optimizer = optimizer_of(through)
    for step in range(2):
        train(through, parts[step], optimizer, step=step)
    resumed = build(case, torch_seed=9)
    resumed.load_state_dict(state_of(through))
    again = optimizer_of(resumed)
    if again is not None:
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (2, 3):
        ends = [train(q, parts[step], o, step=step)[0] for q, o in ((through, optimizer), (resumed, again))]
        assert ends[0] == ends[1]
    assert_same(state_of(through), state_of(resumed))


def test_micro_batches_teach_the_same_as_the_whole_batch(case):
    # The entropy of a mean differs from the mean of entropies: only what update() learns is compared.
    whole, parts = build(case), build(case)
    batch = features(case, batch=8)
    for step in range(2):
        train(whole, [batch + step], step=step)
        train(parts, list((batch + step).chunk(4)), step=step)
    assert_same(state_of(whole), state_of(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "sizes", "message"),
    [
        ({"name": "fsq", "levels": [8, 6, 5]}, (256, 3), r"codebook_size must be 240 = 8\*6\*5 .* got 256"),
        ("lfq", (100, 6), r"codebook_size must be 2\^code_dim for quantizer 'lfq', got 100 .* 6; 64 and 6 fit"),
        ({"name": "product", "num_groups": 3}, (100, 6), r"must be k\^3 .* got 100 and 6; 125 = 5\^3 and 6 fit"),
        (
            {"name": "product", "num_groups": 3},
            (64, 8),
            r"a multiple of 3 .* got 64 and 8; 64 = 4\^3 and 9 fit",
        ),
        ({"name": "product", "quantizer": "lfq"}, (64, 8), "for quantizer 'lfq', got 8 and code_dim 4; 8 and 3 fit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(spec, sizes, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(1, base_channels=32, codebook_size=sizes[0], code_dim=sizes[1], quantizer=spec)


def test_the_example_of_the_page_is_a_quantizer():
    page = Path(__file__).parents[2] / "docs" / "quantizers.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    module = types.ModuleType("cosine_quantizer")
    sys.modules[module.__name__] = module  # dataclasses look up the annotations there
    try:
        exec(compile(block, "cosine_quantizer.py", "exec"), module.__dict__)
        quantizer = module.Cosine().create(codebook_size=8, code_dim=4)
    finally:
        del sys.modules[module.__name__]
    codes = quantizer.lookup(torch.arange(8)).detach()
    assert torch.equal(quantizer.nearest(5 * codes.t()[None, :, None])[0], torch.arange(8))
    quantizer(torch.randn(2, 4, 3, 3)).loss.backward()
    assert quantizer.codebook.grad.abs().max() > 0


def test_the_page_names_every_quantizer():
    text = (Path(__file__).parents[2] / "docs" / "quantizers.md").read_text()
    assert [name for name in quantizers.names() if f"| `{name}` |" not in text] == []


def learned(case, parts):
    """Returns the state after two steps of plain gradient descent, and the last gradient of the features."""
    quantizer, world_size = build(case), dist.get_world_size() if dist.is_initialized() else 1
    for step in range(2):
        _, gradient = train(quantizer, [part + step for part in parts], step=step)
        for parameter in quantizer.parameters():
            if world_size > 1:  # as DDP does
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None
    return {**state_of(quantizer), "the gradient": gradient / world_size}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {case: learned(case, [features(case, batch=8).chunk(2)[rank]]) for case in CASES}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_learn_the_same_as_one(tmp_path):
    run_ranks(run_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case in ranks[0]:
        alone = learned(case, [features(case, batch=8)])
        gradients = [rank[case].pop("the gradient") for rank in ranks]
        expected = alone.pop("the gradient")
        # A softmax at temperature 0.01 amplifies rounding.
        torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-3, atol=1e-5, msg=case)
        assert_same(ranks[0][case], ranks[1][case])
        assert_same(alone, ranks[0][case], rtol=1e-4, atol=1e-5)
