"""The adversarial losses equal their formulas written out."""

import pytest
import torch

from maskgit_pl.tokenizer.adversarial import adaptive_weight, lecam_loss


def test_lecam_pulls_logits_to_the_mean_of_the_other_side():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
    loss = lecam_loss(real, fake, real_mean=torch.tensor(1.5), fake_mean=torch.tensor(2.0))
    assert loss.item() == pytest.approx((0 + 1) / 2 + (1.5**2 + 0) / 2)


def test_the_adaptive_weight_is_the_ratio_of_norms_within_its_bounds():
    weight = adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5]))
    assert weight.item() == pytest.approx(5 / 0.5001)
    assert adaptive_weight(torch.tensor([1e9]), torch.tensor([0.0])).item() == 1e4
