"""Objectives: weights follow their formulas."""

import pytest
import torch

from maskgit_pl.objectives import TokenLosses, objectives


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_visible_tokens_are_weighted_in_the_mean(weight):
    losses = torch.rand(12, generator=torch.Generator().manual_seed(0))
    tokens = TokenLosses(losses, torch.arange(12) // 4, 3, torch.tensor([1, 0, 0, 1] * 3).bool())
    loss = objectives.build({"name": "masked_cross_entropy", "visible_weight": weight})(tokens)
    expected = losses.view(3, 4) @ torch.tensor([1, weight, weight, 1]) / (2 + 2 * weight)
    assert float(loss) == pytest.approx(float(expected.mean()))


def test_a_weight_out_of_range_is_refused():
    with pytest.raises(ValueError, match="visible_weight must be a number"):
        objectives.build({"name": "masked_cross_entropy", "visible_weight": -1})
