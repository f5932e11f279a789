"""Losses equal their formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl import losses


def masked_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, 11, generator=generator)
    targets = torch.randint(11, (5, 7), generator=generator)
    mask = torch.rand(5, 7, generator=generator) < torch.tensor([0.9, 0.2, 0.5, 0.7, 0.4]).unsqueeze(1)
    mask[:, 0] = True
    return logits, targets, mask


def masked_cross_entropy(logits, targets, rows, *, num_rows, label_smoothing=0.0):
    each, nll = losses.token_cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return losses.mean_over_rows(each, rows, num_rows=num_rows), nll


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_cross_entropy_is_the_mean_over_rows_of_each_rows_mean(smoothing):
    logits, targets, mask = masked_batch()
    rows = mask.nonzero()[:, 0]
    loss, nll = masked_cross_entropy(logits[mask], targets[mask], rows, num_rows=5, label_smoothing=smoothing)
    each = [F.cross_entropy(logits[b][mask[b]], targets[b][mask[b]], label_smoothing=smoothing) for b in range(5)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    torch.testing.assert_close(nll, F.cross_entropy(logits[mask], targets[mask], reduction="none"))


def test_masked_cross_entropy_of_a_batch_is_the_mean_of_its_halves():
    logits, targets, mask = (part[:4] for part in masked_batch())

    def loss(part):
        rows = mask[part].nonzero()[:, 0]
        return masked_cross_entropy(
            logits[part][mask[part]], targets[part][mask[part]], rows, num_rows=len(rows.unique())
        )[0]

    torch.testing.assert_close(loss(slice(0, 4)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2)


def test_a_row_without_masked_tokens_adds_zero():
    logits, targets = torch.randn(3, 11, requires_grad=True), torch.tensor([1, 2, 3])
    loss, _ = masked_cross_entropy(logits, targets, torch.tensor([0, 0, 2]), num_rows=3)
    expected = (F.cross_entropy(logits[:2], targets[:2]) + F.cross_entropy(logits[2:], targets[2:])) / 3
    torch.testing.assert_close(loss, expected)
    empty, nll = masked_cross_entropy(logits[:0], targets[:0], targets[:0], num_rows=2)
    assert empty.item() == 0
    assert nll.shape == (0,)


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, mask = masked_batch()
    rows = mask.nonzero()[:, 0]
    half = logits[mask].bfloat16()
    loss, _ = masked_cross_entropy(half, targets[mask], rows, num_rows=5)
    expected, _ = masked_cross_entropy(half.float(), targets[mask], rows, num_rows=5)
    assert torch.equal(loss, expected)


def test_adversarial_losses_equal_their_formulas():
    real, fake = torch.tensor([[2.0], [-0.5]]), torch.tensor([[0.3], [-3.0]])
    assert losses.discriminator_loss(real, fake, kind="hinge").item() == pytest.approx((0 + 1.5 + 1.3 + 0) / 2)
    assert losses.generator_loss(fake, kind="hinge").item() == pytest.approx(1.35)
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(2, 1)) + F.binary_cross_entropy_with_logits(
        fake, torch.zeros(2, 1)
    )
    torch.testing.assert_close(losses.discriminator_loss(real, fake, kind="non-saturating"), expected)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(2, 1))
    torch.testing.assert_close(losses.generator_loss(fake, kind="non-saturating"), expected)


def test_r1_equals_the_gradient_worked_out_by_hand():
    weight = torch.randn(12, requires_grad=True)
    images = torch.rand(3, 3, 2, 2, requires_grad=True)
    flat = images.flatten(1)
    logits = (flat.square() @ weight).unsqueeze(1)  # gradient 2 w x
    penalty = losses.r1_penalty(logits, images)
    by_hand = (2 * weight * flat).square().sum(1).mean()
    torch.testing.assert_close(penalty, by_hand)
    (got,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(by_hand, weight)
    torch.testing.assert_close(got, wanted)


def test_lecam_holds_logits_to_the_other_sides_mean():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    loss = losses.lecam_loss(real, fake, real_mean=torch.tensor(1.5), fake_mean=torch.tensor(2.0))
    assert loss.item() == pytest.approx((0 + 1) / 2 + (1.5**2 + 0) / 2)


def test_the_adaptive_weight_is_the_ratio_of_norms_within_its_bounds():
    weight = losses.adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5]))
    assert weight.item() == pytest.approx(5 / 0.5001)
    assert losses.adaptive_weight(torch.tensor([1e9]), torch.tensor([0.0])).item() == 1e4


def test_reconstruction_losses_are_means():
    a, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(losses.reconstruction_loss(a, b, kind="l2"), F.mse_loss(a, b))
    torch.testing.assert_close(losses.reconstruction_loss(a, b, kind="l1"), F.l1_loss(a, b))
