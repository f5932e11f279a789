"""The table of GPUs: peak rates and memory."""

import pytest

from maskgit_pl.estimates.gpus import GPUS


def test_a_cards_rate_is_that_of_the_precision():
    gpu = GPUS["h100"]
    assert gpu.rate("32-true") < gpu.rate("32-true", tensor_float32=True) < gpu.rate("bf16-mixed")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_no_card_is_slower_with_fewer_bits(gpu):
    assert gpu.float32 <= gpu.tensor_float32 <= gpu.bfloat16
    assert 1e9 < gpu.memory < 1e12
