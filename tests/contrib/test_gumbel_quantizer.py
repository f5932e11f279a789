"""The Gumbel-softmax quantizer follows its published formulas."""

import pytest
import torch

from maskgit_pl.networks.quantizers import quantizers
from tests.networks.test_lookup_free import build, features, rows_of


def gumbel_output(form="soft", *, seed=0, step=0, micro_batch=0, temperature=1.0):
    spec = {"name": "gumbel", "form": form, "temperature": temperature, "final_temperature": temperature}
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
    quantizer = build({"name": "gumbel", "form": "hard"}, 4, 2)
    quantizer.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    inputs = torch.tensor([0.3, 0.4]).view(1, 2, 1, 1).expand(1, 2, 100, 100)
    drawn = torch.cdist(rows_of(quantizer(inputs).quantized), quantizer.codebook).argmin(1)
    expected = (-torch.cdist(rows_of(inputs)[:1], quantizer.codebook).square()).softmax(1)[0]
    torch.testing.assert_close(drawn.bincount(minlength=4) / 10_000, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"micro_batch": 1}])
def test_the_noise_of_gumbel_depends_on_seed_step_and_micro_batch(other):
    assert torch.equal(gumbel_output()[1].quantized, gumbel_output()[1].quantized)
    assert not torch.equal(gumbel_output()[1].quantized, gumbel_output(**other)[1].quantized)


def test_hard_gumbel_decodes_codes_with_the_gradient_of_the_mixture():
    (quantizer, hard), (_, soft) = gumbel_output("hard"), gumbel_output("soft")
    nearest = torch.cdist(rows_of(hard.quantized), quantizer.codebook)
    assert nearest.min(1).values.max() < 1e-5
    cold = gumbel_output("soft", temperature=0.001)[1]
    torch.testing.assert_close(cold.quantized, hard.quantized, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(soft.quantized, hard.quantized)
    gradients = []
    for form in ("hard", "soft"):
        leaf = features(4).requires_grad_()
        quantizer = build({"name": "gumbel", "form": form}, 8, 4)
        gradients.append(torch.autograd.grad(quantizer(leaf).quantized.sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


def test_the_temperature_of_gumbel_falls_along_half_a_cosine_and_stays():
    spec = quantizers.build({"name": "gumbel", "temperature": 2.0, "final_temperature": 0.5, "annealing_steps": 100})
    assert [spec.temperature_at(step) for step in (0, 50, 100, 1000)] == pytest.approx([2.0, 1.25, 0.5, 0.5])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "gumbel", "final_temperature": 2.0},
            r"final_temperature must be a number in \[0.001, 1.0\], got 2.0",
        ),
        ({"name": "gumbel", "form": "harder"}, "did you mean 'hard'"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(spec, message):
    with pytest.raises(ValueError, match=message):
        quantizers.build(spec)
