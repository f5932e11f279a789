"""Corruption of visible tokens: which are replaced, by what, and that the masks stay as they are."""

import pytest
import torch
from torch import Tensor

from maskgit_pl.objectives import Corruption, corruptions

B, N, K = 400, 16, 8
TOKENS = torch.randint(K, (B, N), generator=torch.Generator().manual_seed(0))
MASK = torch.rand(B, N, generator=torch.Generator().manual_seed(1)) < 0.4
every_corruption = pytest.mark.parametrize("name", corruptions.names())


def seven(replaced: Tensor) -> Tensor:
    """Logits of a network that is sure of code 7, with a little of code 2."""
    return torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 7]).expand(int(replaced.sum()), K)


def corrupt(name: str, *, rows: slice = slice(None), seed: int = 3, epoch: int = 0, fraction: float = 0.25):
    index, corruption = torch.arange(B)[rows], corruptions.build({"name": name, "fraction": fraction})
    replaced, uniform = corruption.draw(MASK[rows], seed=seed, index=index, epoch=torch.full_like(index, epoch))
    return corruption.corrupt(TOKENS[rows], replaced, uniform, codebook_size=K, predict=seven), replaced


@every_corruption
def test_a_fraction_of_the_visible_tokens_is_replaced_and_nothing_else(name):
    seen, replaced = corrupt(name)
    assert not (replaced & MASK).any()
    assert torch.equal(seen[~replaced], TOKENS[~replaced])
    assert float(replaced[~MASK].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert 0 <= seen.min() <= seen.max() < K
    assert replaced.any(0).all()


@every_corruption
def test_it_depends_on_sample_seed_and_epoch_only(name):
    seen, replaced = corrupt(name)
    for mine, whole in zip(corrupt(name, rows=slice(100, 120)), (seen, replaced), strict=True):
        assert torch.equal(mine, whole[100:120])
    assert not torch.equal(corrupt(name, seed=4)[1], replaced)
    assert not torch.equal(corrupt(name, epoch=1)[1], replaced)


def test_uniform_codes_are_uniform():
    seen, replaced = corrupt("uniform", fraction=0.9)
    share = torch.bincount(seen[replaced], minlength=K) / replaced.sum()
    assert (share - 1 / K).abs().max() < 0.03


def test_codes_of_the_model_are_drawn_from_its_distribution():
    seen, replaced = corrupt("model", fraction=0.9)
    share = torch.bincount(seen[replaced], minlength=K) / replaced.sum()
    torch.testing.assert_close(share, seven(torch.ones(1).bool())[0].softmax(0), atol=0.02, rtol=0)


@every_corruption
def test_corruptions_say_where_they_come_from(name):
    assert "Source:" in (type(corruptions.build(name)).__doc__ or "")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, "half"])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction.* must be a"):
        corruptions.build({"name": "uniform", "fraction": fraction})


@pytest.mark.parametrize(
    ("codes", "rule"),
    [
        (torch.tensor([0, 1, 3]), r"the codes must lie in \[0, K\), got \[0, 1, 3\] for K = 3"),
        (torch.zeros(2, 2).long(), r"must be an int64 tensor \(R,\)"),
        (None, r"must be an int64 tensor \(R,\), got None"),
    ],
)
def test_a_broken_corruption_is_refused_by_name(monkeypatch, codes, rule):
    class Broken(Corruption):
        fraction = 0.1

        def codes(self, tokens, replaced, uniform, *, codebook_size, predict):
            return codes

    monkeypatch.setitem(corruptions._factories, "broken", Broken)
    with pytest.raises(ValueError, match=f"corruption 'broken': .*{rule}"):
        corruptions.build("broken")
