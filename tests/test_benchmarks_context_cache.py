"""The benchmark of the context cache at a tiny size: its rows are whole, and 1 is exact."""

import pytest
import torch

from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def context_cache():
    with benchmark_script("context_cache") as script:
        yield script


def test_each_value_is_compared_with_the_exact_decoding_of_its_round(context_cache):
    torch.manual_seed(0)
    network = MaskedTransformer(TransformerConfig(16, 3, (4, 4), 16, 2, 2, 32)).eval().requires_grad_(False)
    rows = context_cache.measure(network, name="tiny", batch=2, guidance=1.0, rounds=2)
    assert [row["context_cache"] for row in rows] == [1, 2, 4]
    assert (rows[0]["time / exact"], rows[0]["same tokens"]) == ("1.00", "100.0%")
    assert all(0 < float(row["time / exact"]) < 100 for row in rows)
