"""Noise that is seeded per image."""

import pytest
import torch

from maskgit_pl.decoding import (
    SeededNoise,
)
from tests.decoding.fakes import LOGITS

METHODS = ["gumbel", "inverse_cdf"]


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_the_same_however_many_steps_are_made_at_once(method):
    positions = torch.arange(16).repeat(2, 1)
    logits = LOGITS[:16].expand(2, -1, -1)
    one, many = (SeededNoise(torch.tensor([4, 5]), 16, count, method) for count in (1, 8))
    for step in (0, 7, 8, 3, 20):
        assert torch.equal(one.gumbel(positions, step), many.gumbel(positions, step))
        assert torch.equal(one.draw(logits, positions, step), many.draw(logits, positions, step))


@pytest.mark.parametrize("method", METHODS)
def test_draws_follow_the_softmax(method):
    images, logits = 20_000, torch.tensor([0.0, 1.0, -2.0, 3.0, 2.5])
    noise = SeededNoise(torch.arange(images), 3, method=method)
    drawn = noise.draw(logits.expand(images, 3, -1), torch.arange(3).expand(images, -1), step=0)
    expected = images * logits.softmax(-1)
    for position in range(3):
        counts = torch.bincount(drawn[:, position], minlength=5)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 25  # 4 degrees of freedom: one in 20,000


@pytest.mark.parametrize("method", METHODS)
def test_an_impossible_code_is_never_drawn(method):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(5000, 1, -1)
    drawn = SeededNoise(torch.arange(5000), 1, method=method).draw(
        logits, torch.zeros(5000, 1, dtype=torch.int64), step=0
    )
    assert drawn.unique().tolist() == [1, 3]


@pytest.mark.parametrize("method", METHODS)
def test_noise_belongs_to_image_step_and_position(method):
    noise = SeededNoise(torch.tensor([4, 5]), 16, method=method)
    every = noise.gumbel(torch.arange(16).repeat(2, 1), step=3)
    asked = torch.tensor([[9, 2], [2, 15]])
    assert torch.equal(noise.gumbel(asked, step=3), every.gather(1, asked))  # the other positions change nothing
    assert torch.equal(SeededNoise(torch.tensor([5]), 16).gumbel(asked[1:], step=3), every[1:].gather(1, asked[1:]))
    logits = LOGITS[:16].expand(2, -1, -1)
    codes = noise.draw(logits, torch.arange(16).repeat(2, 1), step=3)
    assert torch.equal(noise.draw(logits[0][asked], asked, step=3), codes.gather(1, asked))
    assert every.unique().numel() == 32
    assert not torch.isin(noise.gumbel(torch.arange(16).repeat(2, 1), step=4), every).any()


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_choices_have_noise_of_their_own(method):
    noise = SeededNoise(torch.arange(2000), 1, method=method)
    zeros = torch.zeros(2000, 1, dtype=torch.int64)
    drawn = noise.draw(torch.zeros(2000, 1, 100), zeros, step=0).flatten().float()
    correlation = torch.corrcoef(torch.stack([drawn, noise.gumbel(zeros, step=0).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.1


def test_a_small_change_of_the_logits_changes_few_draws():
    """The bound of Gumbel-max sampling: P(change) <= 2 TV / (1 + TV), with TV the total variation distance."""
    images = 4000
    logits = 3 * torch.randn(images, 1, 256, generator=torch.Generator().manual_seed(0))
    rounded = logits.bfloat16().float()
    noise, zeros = SeededNoise(torch.arange(images), 1, method="gumbel"), torch.zeros(images, 1, dtype=torch.int64)
    changed = (noise.draw(logits, zeros, step=0) != noise.draw(rounded, zeros, step=0)).float().mean()
    distance = (logits.softmax(-1) - rounded.softmax(-1)).abs().sum(-1).mean() / 2
    assert 0 < changed < 2 * distance / (1 + distance) + 0.003
