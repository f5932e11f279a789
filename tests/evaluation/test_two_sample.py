"""The two-sample test: it finds faults of grids with any number of axes, and says so if it is blind."""

from dataclasses import replace

import pytest
import torch

from maskgit_pl.evaluation import two_sample as module
from maskgit_pl.evaluation.metrics import TokenGrids
from maskgit_pl.evaluation.two_sample import (
    _tell_apart,
    neighbour_vectors,
    rate_grids,
    replace_tokens,
    two_sample,
)

CODES = torch.linspace(-1, 1, 16)[:, None]  # (K, D): neighbours look alike


def smooth(count: int, grid: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Grids whose tokens are near one another, and noise of one code."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(1, 15, (count, *[1] * len(grid)), generator=generator)
    return base + torch.randint(-1, 2, (count, *grid), generator=generator)


def grids_of(sampled: torch.Tensor, count: int = 240) -> TokenGrids:
    real = smooth(count, tuple(sampled.shape[1:]))
    return TokenGrids(sampled, real, torch.arange(count) % 3, CODES)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDTH", 16)
    module._finds_replaced_tokens.cache_clear()


@pytest.mark.parametrize(("grid", "codes"), [((16,), CODES), ((4, 4), CODES), ((2, 3, 3), None)])
def test_replaced_tokens_are_found_and_other_real_grids_are_not(
    grid: tuple[int, ...], codes: torch.Tensor | None
) -> None:
    real, labels = smooth(240, grid), torch.arange(240) % 3
    assert _tell_apart(real, replace_tokens(real, 0.5), labels, codes, seed=0)[1] > 0.8
    assert abs(_tell_apart(real, smooth(240, grid, seed=1), labels, codes, seed=0)[1] - 0.5) < 0.2


def test_codes_with_the_same_neighbours_have_near_vectors() -> None:
    grids = smooth(400, (4, 4)) * 7 % 16  # code 7 c stands where c was
    vectors = neighbour_vectors(grids, 17)  # the last one does not occur
    place = torch.arange(16) * 7 % 16
    near = torch.cosine_similarity(vectors[place[1:14]], vectors[place[2:15]])
    far = torch.cosine_similarity(vectors[place[1:7]], vectors[place[9:15]])
    assert near.min() > far.max()
    assert not vectors[16].any()


def test_of_candidates_half_of_which_are_damaged_the_others_look_more_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_finds_replaced_tokens", lambda *args: True)
    is_damaged, grids = torch.arange(480) % 7 < 3, smooth(480, (16,), seed=1)
    sampled = torch.where(is_damaged[:, None], replace_tokens(grids, 0.5), grids)
    order = rate_grids(grids_of(sampled, 480), torch.arange(480) % 3).argsort()
    assert is_damaged[order[:160]].float().mean() > 0.9
    assert is_damaged[order[-160:]].float().mean() < 0.1


def test_no_candidate_is_rated_by_a_network_that_was_trained_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[torch.Tensor] = []

    def train(real: torch.Tensor, sampled: torch.Tensor, *args: object, **options: object) -> object:
        seen = set(sampled[:, 0].tolist())
        trained.append(sampled)
        return lambda tokens, labels: torch.tensor([float(mark in seen) for mark in tokens[:, 0].tolist()])

    monkeypatch.setattr(module, "_train_judge", train)
    monkeypatch.setattr(module, "_finds_replaced_tokens", lambda *args: True)
    sampled = torch.arange(240)[:, None].expand(240, 16)
    log_probs = rate_grids(grids_of(sampled), torch.arange(240) % 3)
    assert torch.equal(log_probs, torch.nn.functional.logsigmoid(torch.zeros(240)))
    assert [len(grids) for grids in trained] == [180] * 4


def test_replaced_tokens_keep_the_frequencies_of_each_place() -> None:
    grids = smooth(50, (4,))
    changed = replace_tokens(grids, 1.0)
    assert torch.equal(changed.sort(0).values, grids.sort(0).values)
    assert not torch.equal(changed, grids)
    assert torch.equal(replace_tokens(grids, 0.0), grids)


def test_every_call_gives_the_same_values_and_leaves_the_generator_alone() -> None:
    grids, labels = grids_of(smooth(240, (4, 4), seed=1)), torch.arange(240) % 3
    state = torch.random.get_rng_state()
    first = two_sample(grids, labels)
    assert first is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert two_sample(grids, labels) == first


def test_classes_are_paired_so_that_their_frequencies_tell_nothing() -> None:
    of_sampled, of_real = torch.arange(60) % 3, torch.arange(40) % 5
    sampled, real = module._pair(of_sampled, of_real)
    assert torch.equal(of_sampled[sampled], of_real[real])
    assert of_real[real].bincount().tolist() == [8, 8, 8]
    assert len(set(real.tolist())) == len(set(sampled.tolist())) == 24


def test_few_grids_and_a_blind_network_give_no_value(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.arange(240) % 3
    assert two_sample(grids_of(smooth(240, (4, 4)), count=150), labels) is None
    assert caplog.text == ""
    blind = replace(grids_of(smooth(240, (4, 4))), codes=torch.ones(16, 1))  # all codes look alike
    assert two_sample(blind, labels) is None
    assert "two_sample is blind: 240 real grids" in caplog.text
    with pytest.raises(ValueError, match="two_sample must find replaced tokens in the real grids that it learns from"):
        rate_grids(blind, labels)
