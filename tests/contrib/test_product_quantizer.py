"""The product quantizer follows its published formula."""

import pytest
import torch

from maskgit_pl.networks.quantizers import quantizers
from tests.networks.test_lookup_free import build, features, rows_of


def test_a_product_has_the_digits_and_the_mean_loss_of_its_groups():
    inner = {"name": "gradient", "entropy_weight": 0.0}
    quantizer, inputs = build({"name": "product", "num_groups": 3, "quantizer": inner}, 4**3, 6), features(6)
    output = quantizer(inputs)
    expected, losses = 0, []
    for number, (group, channels) in enumerate(zip(quantizer.groups, inputs.chunk(3, dim=1), strict=True)):
        distances = torch.cdist(rows_of(channels), group.codebook)
        expected = expected + distances.argmin(1) * 4**number
        losses.append(1.25 * distances.min(1).values.square().mean() / 2)
    assert torch.equal(output.tokens.flatten(), expected)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_the_groups_of_a_product_draw_different_noise():
    quantizer = build({"name": "product", "quantizer": "gumbel"}, 16, 4)
    quantizer.groups[1].load_state_dict(quantizer.groups[0].state_dict())
    quantizer.begin_micro_batch(seed=0, step=0, micro_batch=0)
    first, second = quantizer(features(2).repeat(1, 2, 1, 1)).quantized.chunk(2, dim=1)
    assert not torch.allclose(first, second)


def test_a_product_of_products_is_refused():
    with pytest.raises(ValueError, match="must be no 'product' again; take a table of codes"):
        quantizers.build({"name": "product", "quantizer": {"name": "product"}})
