"""Quantizers with a codebook that learns by gradient or as averages follow their formulas."""

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl.networks.codebooks import EMAQuantizerSpec, GradientQuantizerSpec
from maskgit_pl.networks.quantizers import entropy_loss
from tests.networks.test_lookup_free import build, features, losses_of, rows_of


def inputs_of(seed=0):
    """60 features of size 6."""
    return features(6, batch=5, seed=seed)


def test_the_lowest_of_equally_near_codes_wins():
    quantizer = GradientQuantizerSpec().create(codebook_size=4, code_dim=2)
    quantizer.codebook.data.zero_()
    assert quantizer.nearest(torch.randn(2, 2, 3, 3)).max() == 0


def test_the_gradient_quantizers_loss_is_its_three_parts():
    spec = GradientQuantizerSpec(commitment=0.5, codebook_weight=2.0, entropy_weight=0.3, entropy_temperature=0.7)
    quantizer = spec.create(codebook_size=8, code_dim=6)
    rows = rows_of(inputs_of())
    distances = torch.cdist(rows, quantizer.codebook).square()
    error = F.mse_loss(quantizer.codebook[distances.argmin(1)], rows)
    probabilities = (-distances / 0.7).softmax(-1)
    mean = probabilities.mean(0)
    entropy = (mean * (mean + 1e-5).log()).sum() - (probabilities * probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(quantizer(inputs_of()).loss, 2.5 * error + 0.3 * entropy)


def test_codes_start_uniform_within_the_released_bound():
    codebook = GradientQuantizerSpec().create(codebook_size=1024, code_dim=64).codebook
    assert 0.053 < codebook.abs().max().item() <= (3 / 1024) ** 0.5
    assert codebook.std().item() == pytest.approx(1024**-0.5, rel=0.02)


def test_the_ema_codebook_follows_the_direct_formula():
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(decay=0.8, restart_below=0.0).create(codebook_size=4, code_dim=6)
    counts, sums = torch.full((4,), 5.0), torch.randn(4, 6)
    quantizer.counts.copy_(counts)
    quantizer.sums.copy_(sums)
    for step in range(3):
        output = quantizer(inputs_of(step))
        rows = rows_of(inputs_of(step))
        one_hot = F.one_hot(output.tokens.flatten(), 4).float()
        counts, sums = 0.8 * counts + 0.2 * one_hot.sum(0), 0.8 * sums + 0.2 * one_hot.t() @ rows
        quantizer.update([output.tokens], [output.features], seed=0, step=step)
        torch.testing.assert_close(quantizer.codebook, sums / counts.unsqueeze(1))


def test_dead_codes_restart_from_outputs_of_the_batch():
    quantizer = EMAQuantizerSpec().create(codebook_size=8, code_dim=6)
    quantizer.codebook.fill_(100.0)
    quantizer.codebook[0] = 0.0  # everything goes to code 0
    quantizer.counts.copy_(torch.tensor([60.0] + [0.0] * 7))
    output = quantizer(inputs_of())
    quantizer.update([output.tokens], [output.features], seed=3, step=7)
    distances = (quantizer.codebook[1:].unsqueeze(1) - rows_of(inputs_of())).norm(dim=2)
    assert distances.min(1).values.max() < 1e-4
    assert len(quantizer.codebook[1:].unique(dim=0)) == 7
    assert len(quantizer.nearest(inputs_of()).unique()) > 4


@pytest.mark.parametrize(
    ("mean", "decay", "restart_below"), [(0.3, 0.0, 0.0), (1e4, 0.3, 1e-45), (0.3, 0.5, 1e-8), (1e4, 0.5, 0.05)]
)
def test_codes_that_are_never_used_stay_means_of_features(mean, decay, restart_below):
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(decay=decay, restart_below=restart_below).create(codebook_size=32, code_dim=2)
    for step in range(180):
        part = mean * (1 + 0.01 * features(2, batch=1, seed=step)[..., :1].tanh())  # 3 features for 32 codes
        output = quantizer(part)
        quantizer.update([output.tokens], [output.features], seed=0, step=step)
        assert 0.98 * mean < quantizer.codebook.min() <= quantizer.codebook.max() < 1.02 * mean, step


def test_a_restarted_code_follows_the_features_that_it_wins():
    torch.manual_seed(0)
    quantizer = EMAQuantizerSpec(decay=0.9, restart_below=0.3).create(codebook_size=8, code_dim=6)
    output = quantizer(inputs_of())
    quantizer.update([output.tokens], [output.features], seed=0, step=0)  # all codes are new
    restarted, fresh = quantizer.codebook.clone(), 2 * 0.3 * 60 / 8
    output = quantizer(inputs_of())
    one_hot = F.one_hot(output.tokens.flatten(), 8).float()
    counts = 0.9 * fresh + 0.1 * one_hot.sum(0)
    follows = (0.9 * fresh * restarted + 0.1 * one_hot.t() @ rows_of(inputs_of())) / counts.unsqueeze(1)
    quantizer.update([output.tokens], [output.features], seed=0, step=1)
    torch.testing.assert_close(quantizer.codebook, follows)
    torch.testing.assert_close(quantizer.counts, counts)


@pytest.mark.parametrize("kind", ["softmax", "argmax"])
def test_the_entropy_loss_is_lowest_when_sure_and_even(kind):
    sure_and_even = entropy_loss(50 * torch.eye(8), temperature=1.0, kind=kind)
    sure_and_collapsed = entropy_loss(50 * torch.eye(8)[:1].expand(8, 8), temperature=1.0, kind=kind)
    assert sure_and_even.item() == pytest.approx(-torch.tensor(8.0).log().item(), abs=1e-3)
    assert sure_and_collapsed.item() == pytest.approx(0.0, abs=1e-3)


def test_the_gradient_of_one_hot_assignments_is_that_of_the_soft_ones():
    affinity = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    entropy_loss(affinity, temperature=0.7, kind="argmax").backward()
    flat = affinity.detach() / 0.7
    soft, log_soft, hard = flat.softmax(-1), flat.log_softmax(-1), F.one_hot(flat.argmax(-1), 5).float()
    mean = hard.mean(0)
    to_assignment = ((mean + 1e-5).log() + mean / (mean + 1e-5) - log_soft) / 6
    by_assignment = soft * (to_assignment - (soft * to_assignment).sum(-1, keepdim=True))
    by_logarithm = (soft - hard) / 6
    torch.testing.assert_close(affinity.grad, (by_assignment + by_logarithm) / 0.7)


def test_a_step_of_simvq_moves_every_code_and_leaves_the_frozen_ones():
    quantizer = build("simvq", 16, 4)
    before, frozen = quantizer.lookup(torch.arange(16)).detach(), quantizer.frozen_codes.clone()
    torch.testing.assert_close(before, frozen @ quantizer.projection.t() + quantizer.offset)
    inputs = features(4)[..., :1, :1]  # two features: at most two codes are nearest
    output, parts = losses_of(quantizer, inputs)
    error = F.mse_loss(before[output.tokens.flatten()], rows_of(inputs)).item()
    assert parts == pytest.approx({"commitment": 0.25 * error, "codebook": error, "entropy": 0.0})
    torch.optim.SGD(quantizer.parameters(), lr=0.1).zero_grad()
    output.loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    assert torch.equal(quantizer.frozen_codes, frozen)
    assert ((quantizer.lookup(torch.arange(16)) - before).abs().max(1).values > 0).all()


def test_the_losses_and_gradients_of_ibq_are_the_published_ones():
    spec = {"name": "ibq", "commitment": 0.7, "codebook_weight": 0.3, "entropy_weight": 0.2, "entropy_temperature": 0.9}
    quantizer, inputs = build(spec, 8, 4), features(4).requires_grad_()
    direction = torch.randn(24, 4)
    output, parts = losses_of(quantizer, inputs)
    (rows_of(output.quantized) * direction).sum().add(output.loss).backward()
    gradients = inputs.grad.clone(), quantizer.codebook.grad.clone()

    codes, leaf = quantizer.codebook.detach().requires_grad_(), inputs.detach().requires_grad_()
    rows = rows_of(leaf)
    logits = rows @ codes.t()
    soft, hard = logits.softmax(1), F.one_hot(logits.argmax(1), 8).float()
    quantized, chosen = (hard - soft.detach() + soft) @ codes, hard @ codes
    probabilities = (logits / 0.9).softmax(1)
    mean = probabilities.mean(0)
    entropy = -(probabilities * probabilities.log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    expected = {
        "double_quantization": (quantized - rows).square().mean(),
        "commitment": 0.7 * (chosen.detach() - rows).square().mean(),
        "codebook": 0.3 * (chosen - rows.detach()).square().mean(),
        "entropy": 0.2 * entropy,
    }
    assert parts == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
    ((quantized * direction).sum() + sum(expected.values())).backward()
    torch.testing.assert_close(gradients, (leaf.grad, codes.grad), rtol=1e-4, atol=1e-5)
