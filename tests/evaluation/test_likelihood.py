import math
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from maskgit_pl.data import InOrder
from maskgit_pl.evaluation.likelihood import encode_real_images, exact_nll, masked_nll, negative_elbo
from maskgit_pl.masking import MaskSampler
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.schedules import mask_schedules, num_masked
from tests.evaluation.feature_networks import open_shards

MASK = -1


class Table:
    """Conditionals of masked tokens from an explicit joint distribution."""

    config = SimpleNamespace(mask_token_id=MASK)

    def __init__(self, num_tokens: int, codebook_size: int) -> None:
        shape, generator = (codebook_size,) * num_tokens, torch.Generator().manual_seed(0)
        self.joint = torch.rand(shape, generator=generator).double() ** 3
        self.joint /= self.joint.sum()

    def forward_selected(self, tokens: Tensor, labels: Tensor, positions: Tensor, *, vectors: None) -> Tensor:
        places = (tokens == MASK).nonzero().tolist()
        assert positions.tolist() == [row * tokens.shape[1] + place for row, place in places]
        return torch.stack([self.conditional(tokens[row].tolist(), place) for row, place in places])

    def conditional(self, row: list[int], place: int) -> Tensor:
        """Returns log p(x_place = code | visible codes) of each code, (K,)."""
        seen = self.joint[tuple(slice(None) if code == MASK else slice(code, code + 1) for code in row)]
        others = [axis for axis in range(seen.ndim) if axis != place]
        given = seen.sum(others).clamp(min=1e-12)
        return (given / given.sum()).log()

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Returns log p (n,) of rows (n, N) under the joint distribution."""
        return self.joint[tuple(x.T)].log()

    def mean_nll(self, x: list[int], hidden: tuple[int, ...]) -> float:
        """Returns the mean NLL of the tokens in ``hidden`` given the others, in nats."""
        row = [MASK if place in hidden else code for place, code in enumerate(x)]
        nll = [-self.conditional(row, place).log_softmax(-1)[x[place]] for place in hidden]
        return float(torch.stack(nll).mean())

    def mean_nll_of(self, x: list[int], count: int) -> float:
        """Returns the mean of ``mean_nll`` over all sets of ``count`` tokens."""
        sets = list(combinations(range(len(x)), count))
        return sum(self.mean_nll(x, hidden) for hidden in sets) / len(sets)


def no_labels(tokens: Tensor) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.int64)


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("draws", [1, 4, 12])
def test_the_bound_is_estimated_within_its_standard_error(draws):
    table = Table(4, 3)
    x = torch.tensor([[0, 2, 1, 1]]).expand(200, -1)
    values = negative_elbo(table, x, no_labels(x), draws=draws)
    assert abs(float(values.mean() + table.log_likelihood(x)[0])) < 4 * standard_error(values)


@pytest.mark.parametrize("name", ["cosine", "log"])
def test_masked_nll_is_the_mean_over_the_schedules_masks(name):
    table, schedule = Table(3, 2), mask_schedules.build(name)
    progress = (torch.arange(20_000) + 0.5) / 20_000
    share = num_masked(schedule(progress, 3), 3, rounding="ceil").bincount(minlength=4).double() / 20_000
    exact = sum(float(share[count]) * table.mean_nll_of([1, 0, 1], count) for count in (1, 2, 3))
    tokens = torch.tensor([[1, 0, 1]]).expand(200, -1)
    options = {"sampler": MaskSampler(schedule, 0), "draws": 3}
    values = masked_nll(table, tokens, no_labels(tokens), **options)
    assert abs(float(values.mean()) - exact) < 4 * standard_error(values) + 1e-4


def test_the_exact_likelihood_is_that_of_the_joint_distribution():
    table, rows = Table(4, 2), torch.tensor(list(product(range(2), repeat=4)))

    def causal(tokens: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.stack([table.conditional(row[:i] + [MASK] * (4 - i), i) for i in range(4)])
                for row in tokens.tolist()
            ]
        )

    exact = exact_nll(causal, rows, no_labels(rows))
    assert exact.tolist() == pytest.approx((-table.log_likelihood(rows)).tolist(), abs=1e-5)


def test_the_val_split_becomes_tokens_with_its_labels(tiny_pretrained: Path, tiny_shards: Path):
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    data = open_shards(tiny_shards)
    tokens, labels = encode_real_images(pipe.tokenizer, data, batch_size=10)
    batch = data.batches("val", InOrder(24)).__getitems__(range(24))
    assert torch.equal(labels, batch.labels)
    assert torch.equal(tokens, pipe.tokenizer.network.encode(to_unit_range(batch.content)))
    _, some = encode_real_images(pipe.tokenizer, data, limit=9)
    assert len(some.unique()) > 1  # drawn from all of the split, not its beginning
    assert torch.equal(some, encode_real_images(pipe.tokenizer, data, limit=9, batch_size=2)[1])
