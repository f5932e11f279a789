"""The ``adaln`` backbone: each block starts as the identity, and its heads divide the attention."""

import dataclasses

import pytest
import torch

from maskgit_pl.networks.adaln import AdaLNConfig, AdaLNTransformer

SMALL = AdaLNConfig(16, 3, (3, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64)


def test_each_block_starts_as_the_identity():
    torch.manual_seed(0)
    network = AdaLNTransformer(dataclasses.replace(SMALL, dropout=0.0))
    x, condition = torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in network.blocks:
        assert not block.modulation.weight.any()
        assert torch.equal(block(x, condition), x)
    assert not network.head_modulation.weight.any()


def test_attention_dim_must_be_a_multiple_of_num_heads():
    sizes = {"codebook_size": 24, "num_classes": 5, "grid": (4, 4), "embed_dim": 40, "num_heads": 6}
    assert AdaLNConfig(**sizes, attention_dim=36).head_dim == 6
    with pytest.raises(ValueError, match="transformer attention_dim must be a multiple of num_heads 6, got 40"):
        AdaLNConfig(**sizes, attention_dim=40)
