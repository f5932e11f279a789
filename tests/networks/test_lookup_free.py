"""Quantizers without a table, fsq, lfq and bsq, follow their published formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from maskgit_pl.networks.quantizers import quantizers


def features(dim, *, batch=2, seed=0):
    return torch.randn(batch, dim, 3, 4, generator=torch.Generator().manual_seed(seed))


def rows_of(part):
    return rearrange(part, "b d h w -> (b h w) d")


def build(spec, codebook_size, code_dim):
    torch.manual_seed(0)
    return quantizers.build(spec).create(codebook_size=codebook_size, code_dim=code_dim)


def losses_of(quantizer, inputs):
    output = quantizer(inputs)
    return output, {name: value.item() for name, value in quantizer.losses.items()}


@pytest.mark.parametrize("levels", [(8, 6, 5), (2, 3), (4, 4, 7)])
def test_fsq_follows_the_papers_bound_and_numbering(levels):
    inputs = 2 * features(len(levels))
    output = build({"name": "fsq", "levels": levels}, math.prod(levels), len(levels))(inputs)
    for row, code, token in zip(
        rows_of(inputs), rows_of(output.quantized), output.tokens.flatten().tolist(), strict=True
    ):
        expected, basis = 0, 1
        for value, level, coordinate in zip(row.tolist(), levels, code.tolist(), strict=True):
            half, offset = (level - 1) * 0.999 / 2, 0.0 if level % 2 else 0.5
            rounded = round(math.tanh(value + math.tan(offset / half)) * half - offset)
            assert coordinate == pytest.approx(rounded / (level // 2))
            expected, basis = expected + (rounded + level // 2) * basis, basis * level
        assert token == expected


def test_the_gradient_of_fsq_is_that_of_its_bound():
    inputs = features(2).requires_grad_()
    build({"name": "fsq", "levels": (5, 7)}, 35, 2)(inputs).quantized.sum().backward()
    half = torch.tensor([4.0, 6.0]) * 0.999 / 2
    expected = (1 - rows_of(inputs).tanh().square()) * half / torch.tensor([2.0, 3.0])
    torch.testing.assert_close(rows_of(inputs.grad), expected)


def all_signs(dim):
    """All codes of signs (2^D, D) in the order of their tokens: channel 0 is the lowest bit."""
    return torch.tensor([bits[::-1] for bits in itertools.product((-1.0, 1.0), repeat=dim)])


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_the_entropies_of_lfq_are_those_of_the_softmax_over_all_codes(dim):
    spec = {"name": "lfq", "commitment": 0.5, "entropy_weight": 0.3, "entropy_temperature": 2.0, "diversity": 1.7}
    quantizer, inputs = build(spec, 2**dim, dim), features(dim).requires_grad_()
    output, parts = losses_of(quantizer, inputs)
    rows, codes = rows_of(inputs), all_signs(dim)
    probabilities = (-torch.cdist(rows, codes).square() / 2.0).softmax(1)
    mean = probabilities.mean(0)
    commitment = 0.5 * F.mse_loss(rows, rows.detach().sign())
    sample = -0.3 * (probabilities * probabilities.log()).sum(1).mean()
    batch = 0.3 * 1.7 * (mean * (mean + 1e-5).log()).sum()
    assert parts == pytest.approx(
        {"commitment": commitment.item(), "sample_entropy": sample.item(), "batch_entropy": batch.item()}, rel=1e-4
    )
    gradients = [torch.autograd.grad(loss, inputs)[0] for loss in (output.loss, commitment + sample + batch)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.lookup(torch.arange(2**dim)), codes)
    torch.testing.assert_close(output.tokens.flatten(), torch.cdist(rows, codes).argmin(1))


def test_the_losses_of_bsq_are_those_on_the_unit_sphere():
    spec = {"name": "bsq", "commitment": 0.5, "entropy_weight": 0.3, "entropy_temperature": 0.2, "diversity": 1.7}
    quantizer, inputs = build(spec, 32, 5), features(5)
    output, parts = losses_of(quantizer, inputs)
    unit = rows_of(inputs) / rows_of(inputs).norm(dim=1, keepdim=True)
    codes = unit.sign() / 5**0.5
    torch.testing.assert_close(rows_of(output.quantized), codes)
    torch.testing.assert_close(output.tokens.flatten(), torch.cdist(unit, all_signs(5) / 5**0.5).argmin(1))
    # The softmax over all codes of 2 u c / T is a product of bits.
    probability = (2 * torch.stack([unit, -unit]) / 5**0.5 / 0.2).softmax(0)  # (2, M, D)
    mean = probability.mean(1)
    assert parts == pytest.approx(
        {
            "commitment": 0.5 * (unit - codes).square().sum(1).mean().item(),
            "sample_entropy": -0.3 * 0.2 * (probability * probability.log()).sum((0, 2)).mean().item(),
            "batch_entropy": 0.3 * 0.2 * 1.7 * (mean * mean.log()).sum().item(),
        },
        rel=1e-4,
    )


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_entropies_of_signs_stay_finite_at_extreme_features(name):
    inputs = (1e4 * features(5)).requires_grad_()
    inputs.data[:, :, 0, 0] = 0
    loss = build({"name": name, "entropy_temperature": 1e-5}, 32, 5)(inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert inputs.grad.isfinite().all()
