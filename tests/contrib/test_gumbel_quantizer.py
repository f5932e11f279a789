"""The Gumbel-softmax quantizer follows its published formulas."""

import pytest
import torch

from maskgit_pl.networks.quantizers import quantizers
from tests.networks.test_lookup_free import build, features, rows_of


def gumbel_output(*, seed=0, step=0, micro_batch=0, temperature=1.0):
    spec = {"name": "gumbel", "temperature": temperature, "final_temperature": temperature}
    quantizer = build(spec, 8, 4)
    quantizer.begin_micro_batch(seed=seed, step=step, micro_batch=micro_batch)
    return quantizer, quantizer(features(4))


def test_gumbel_mixes_codes_and_its_loss_is_the_divergence_from_uniform():
    quantizer, output = gumbel_output()
    distances = torch.cdist(rows_of(features(4)), quantizer.codebook).square()
    probabilities = (-distances).softmax(1)
    divergence = (probabilities * (probabilities * 8).log()).sum(1).mean()
    torch.testing.assert_close(output.loss, 5e-4 * divergence)
    codes = quantizer.codebook.detach()
    assert rows_of(output.quantized).max() <= codes.max()  # a mixture lies between the codes
    assert torch.equal(output.tokens.flatten(), distances.argmin(1))


def test_gumbel_draws_a_code_as_often_as_its_probability():
    cold = {"temperature": 0.001, "final_temperature": 0.001}  # mixtures are codes
    quantizer = build({"name": "gumbel", **cold}, 4, 2)
    quantizer.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    inputs = torch.tensor([0.3, 0.4]).view(1, 2, 1, 1).expand(1, 2, 100, 100)
    drawn = torch.cdist(rows_of(quantizer(inputs).quantized), quantizer.codebook).argmin(1)
    expected = (-torch.cdist(rows_of(inputs)[:1], quantizer.codebook).square()).softmax(1)[0]
    torch.testing.assert_close(drawn.bincount(minlength=4) / 10_000, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"micro_batch": 1}])
def test_the_noise_of_gumbel_depends_on_seed_step_and_micro_batch(other):
    assert torch.equal(gumbel_output()[1].quantized, gumbel_output()[1].quantized)
    assert not torch.equal(gumbel_output()[1].quantized, gumbel_output(**other)[1].quantized)


def test_the_temperature_of_gumbel_falls_along_half_a_cosine_and_stays():
    spec = quantizers.build({"name": "gumbel", "temperature": 2.0, "final_temperature": 0.5, "annealing_steps": 100})
    assert [spec.temperature_at(step) for step in (0, 50, 100, 1000)] == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_a_temperature_that_rises_is_refused():
    with pytest.raises(ValueError, match=r"final_temperature must be a number in \[0.001, 1.0\], got 2.0"):
        quantizers.build({"name": "gumbel", "final_temperature": 2.0})
