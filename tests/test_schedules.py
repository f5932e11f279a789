import numpy as np
import pytest
import torch

from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.schedules import mask_schedules, num_masked


def counts(spec: object, num_steps: int, num_tokens: int) -> list[int]:
    """Returns the number of masked tokens after each step, from a fully masked image."""
    decoder = ParallelDecoder(mask_schedules.build(spec), Confidence(), num_steps=num_steps)
    return [step.after[0] for step in decoder.plan([num_tokens], num_tokens)]


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [  # cosine, 256 tokens
        (8, [251, 236, 212, 181, 142, 97, 49, 0]),
        (12, [253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 0]),
        (16, [254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97, 74, 49, 25, 0]),
    ],
)
def test_the_published_step_counts_of_cosine_at_256_tokens(num_steps, expected):
    assert counts("cosine", num_steps, 256) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(16, 7), (256, 127), (1024, 511)])
def test_two_thirds_of_cosine_is_just_below_one_half_in_float32(num_tokens, expected):
    two_thirds = torch.arange(1, 13, dtype=torch.float32)[7] / 12
    ratio = mask_schedules.build("cosine")(two_thirds, num_tokens)
    assert int(num_masked(ratio, num_tokens, rounding="floor")) == expected
    assert int(num_masked(ratio, num_tokens, rounding="ceil")) == expected + 1
    assert int(num_masked(ratio.double(), num_tokens, rounding="floor")) == expected  # float32 for any input


def test_ceil_and_floor_differ_by_one_except_at_whole_numbers():
    ratio = torch.tensor([0.25, 0.26, 0.5, 0.999, 1.0])
    assert num_masked(ratio, 16, rounding="ceil").tolist() == [4, 5, 8, 16, 16]
    assert num_masked(ratio, 16, rounding="floor").tolist() == [4, 4, 8, 15, 16]
    assert num_masked(ratio, 16, rounding="ceil").dtype == torch.int64


def test_ratios_outside_the_released_clip_are_clipped():
    ratio = torch.tensor([-1.0, 0.0, 2.0])
    assert num_masked(ratio, 256, rounding="ceil").tolist() == [1, 1, 256]
    assert num_masked(ratio, 256, rounding="floor").tolist() == [0, 0, 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [2, 3, 49, 256, 1000])
def test_counts_are_one_float32_product_that_is_rounded_once(dtype, num_tokens):
    ratio = torch.linspace(-0.1, 1.1, 997, dtype=dtype)
    product = np.clip(ratio.float().numpy(), np.float32(1e-6), np.float32(1)) * np.float32(num_tokens)
    assert product.dtype == np.float32
    assert num_masked(ratio, num_tokens, rounding="ceil").tolist() == np.ceil(product).tolist()
    assert num_masked(ratio, num_tokens, rounding="floor").tolist() == np.floor(product).tolist()


def test_the_number_of_tokens_may_differ_by_row():
    ratio = torch.tensor([[0.5], [0.1]])
    made = num_masked(ratio, torch.tensor([10, 20, 30]), rounding="floor")
    assert made.tolist() == [[5, 10, 15], [1, 2, 3]]


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
def test_formulas_of_the_papers_table(spec, at_quarter, at_half):
    ratio = mask_schedules.build(spec)(torch.tensor([0.25, 0.5]), 256)
    torch.testing.assert_close(ratio, torch.tensor([at_quarter, at_half]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "arccos"])
def test_cosine_and_arccos_mask_two_over_pi_on_average(name):
    progress = (torch.arange(10_000) + 0.5) / 10_000
    mean = mask_schedules.build(name)(progress, 256).mean()
    assert abs(float(mean) - 0.6366) < 1e-3


@pytest.mark.parametrize("exponent", [0.0, -1.0, float("inf"), float("nan")])
def test_an_exponent_without_meaning_is_refused(exponent):
    with pytest.raises(ValueError, match=r"mask schedule 'pow': exponent must be a .*number in \[0.001, 1000\]"):
        mask_schedules.build({"name": "pow", "exponent": exponent})


def test_pow_needs_an_exponent_and_the_named_powers_take_none():
    with pytest.raises(ValueError, match=r"mask schedule 'pow': the key 'exponent' is missing"):
        mask_schedules.build("pow")
    with pytest.raises(ValueError, match=r"mask schedule 'square': unknown key 'exponent'"):
        mask_schedules.build({"name": "square", "exponent": 4.0})
