"""The ``adaln`` backbone: each block starts as the identity, and both of its dropouts act in training only."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.parametrize("part", ["attention", "proj", "mlp"])
def test_dropout_acts_in_training_only(part, monkeypatch):
    torch.manual_seed(0)
    network = AdaLNTransformer(dataclasses.replace(SMALL, dropout=0.5))
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    block, x, condition = network.blocks[0], torch.randn(2, 5, 32), torch.randn(2, 32)
    drop, size = F.dropout, {"proj": 32, "mlp": 64}.get(part)
    # The other dropouts are switched off, so that a difference comes from this one.
    monkeypatch.setattr(F, "dropout", lambda value, *rest: drop(value, *rest) if value.shape[-1] == size else value)
    if part != "attention":
        monkeypatch.setattr(type(block), "_attend", lambda self, asking, *_, **__: asking)
    assert torch.equal(*(block.eval()(x, condition, None) for _ in range(2)))
    assert not torch.equal(*(block.train()(x, condition, None) for _ in range(2)))


def test_attention_dim_must_be_a_multiple_of_num_heads():
    sizes = {"codebook_size": 24, "num_classes": 5, "grid": (4, 4), "embed_dim": 40, "num_heads": 6}
    assert AdaLNConfig(**sizes, attention_dim=36).head_dim == 6
    with pytest.raises(ValueError, match="transformer attention_dim must be a multiple of num_heads 6, got 40"):
        AdaLNConfig(**sizes, attention_dim=40)
