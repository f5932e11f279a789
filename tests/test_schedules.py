"""Mask schedules: their formulas, the one place where a ratio becomes a count, and the Halton order."""

import math

import numpy as np
import pytest
import torch

from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.schedules import halton_order, mask_schedules, num_masked


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (8, [251, 236, 212, 181, 142, 97, 49, 0]),
        (12, [253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 0]),
    ],
)
def test_cosine_at_256_tokens_gives_the_published_counts(num_steps, expected):
    decoder = ParallelDecoder(mask_schedules.build("cosine"), Confidence(), num_steps=num_steps)
    assert [step.after[0] for step in decoder.plan([256], 256)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [2, 3, 49, 256, 1000])
def test_a_count_is_a_float32_product_that_is_rounded_once(dtype, num_tokens):
    ratio = torch.linspace(-0.1, 1.1, 997, dtype=dtype)
    product = np.clip(ratio.float().numpy(), np.float32(1e-6), np.float32(1)) * np.float32(num_tokens)
    assert product.dtype == np.float32
    assert num_masked(ratio, num_tokens, rounding="ceil").tolist() == np.ceil(product).tolist()
    assert num_masked(ratio, num_tokens, rounding="floor").tolist() == np.floor(product).tolist()


@pytest.mark.parametrize(
    ("spec", "at_quarter", "at_half"),
    [  # written out by hand for 256 tokens, log2(256) = 8
        ("cosine", 0.9238795, 0.7071068),
        ("arccos", 0.8391386, 0.6666667),
        ("linear", 0.75, 0.5),
        ("square", 0.9375, 0.75),
        ("cubic", 0.984375, 0.875),
        ("sqrt", 0.5, 0.2928932),
        ("exp", 1 - 2**-6, 1 - 2**-4),
        ("log", 2 / 8, 1 / 8),
        ({"name": "pow", "exponent": 4.0}, 1 - 4**-4, 1 - 2**-4),
    ],
    ids=str,
)
def test_schedules_follow_the_formulas_of_the_paper(spec, at_quarter, at_half):
    ratio = mask_schedules.build(spec)(torch.tensor([0.25, 0.5]), 256)
    torch.testing.assert_close(ratio, torch.tensor([at_quarter, at_half]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (4, 4), (16, 16), (7, 5), (1,), (49,), (4, 7, 7)])
def test_the_halton_order_visits_each_position_once(grid):
    assert sorted(halton_order(grid)) == list(range(math.prod(grid)))


def test_the_halton_order_begins_with_radical_inverses():
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9) of an 8 x 9 grid
    assert halton_order((8, 9))[:4] == [4 * 9 + 3, 2 * 9 + 6, 6 * 9 + 1, 1 * 9 + 4]
    assert halton_order((8,)) == [4, 2, 6, 1, 5, 3, 7, 0]
    # with 1/5, 2/5, 3/5 along the third axis, of size 5
    assert halton_order((8, 9, 5))[:3] == [(4 * 9 + 3) * 5 + 1, (2 * 9 + 6) * 5 + 2, (6 * 9 + 1) * 5 + 3]
