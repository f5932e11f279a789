"""The losses of stage 2 equal their formulas written out."""

import pytest
import torch
from torch.nn import functional as F

from maskgit_pl.transformer import losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_images_of_each_mean_of_masked_tokens(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 7, 11, generator=generator), torch.randint(11, (5, 7), generator=generator)
    mask = torch.rand(5, 7, generator=generator) < torch.tensor([0.9, 0.2, 0.5, 0.7, 0.4]).unsqueeze(1)
    mask[:, 0] = True
    rows = mask.nonzero()[:, 0]
    token_losses, nll = losses.token_cross_entropy(logits[mask], targets[mask], label_smoothing=smoothing)
    loss = losses.mean_over_rows(token_losses, rows, num_rows=6)  # the last image has no masked token: it adds 0
    means = [F.cross_entropy(logits[b][mask[b]], targets[b][mask[b]], label_smoothing=smoothing) for b in range(5)]
    torch.testing.assert_close(loss, torch.stack(means).sum() / 6)
    torch.testing.assert_close(nll, F.cross_entropy(logits[mask], targets[mask], reduction="none"))
    half = logits[mask].bfloat16()  # summed in float32
    for values in zip(*(losses.token_cross_entropy(x, targets[mask]) for x in (half, half.float())), strict=True):
        assert torch.equal(*values)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_visible_tokens_are_weighted_in_the_mean(weight):
    values = torch.rand(12, generator=torch.Generator().manual_seed(0))
    tokens = losses.TokenLosses(values, torch.arange(12) // 4, 3, torch.tensor([1, 0, 0, 1] * 3).bool())
    loss = losses.objectives.build({"name": "masked_cross_entropy", "visible_weight": weight})(tokens)
    expected = values.view(3, 4) @ torch.tensor([1, weight, weight, 1]) / (2 + 2 * weight)
    assert float(loss) == pytest.approx(float(expected.mean()))


def test_an_objective_that_needs_an_unknown_value_is_refused():
    kind = type("Mine", (losses.Objective,), {"__call__": lambda self, tokens: 0, "needs": frozenset({"pixels"})})
    with pytest.raises(ValueError, match=r"objective 'mine': needs must be of .*, got \['pixels'\]"):
        losses._check_objective("mine", kind())
