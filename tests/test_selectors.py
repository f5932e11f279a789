import pytest
import torch

from maskgit_pl.selectors import Candidates, Confidence, token_selectors


def candidates(progress: float = 0.25) -> Candidates:
    chance = torch.Generator().manual_seed(0)
    return Candidates(
        log_probs=torch.randn(2, 5, 7, generator=chance).log_softmax(-1),
        tokens=torch.randint(7, (2, 5), generator=chance),
        positions=torch.arange(5).repeat(2, 1),
        gumbel=torch.randn(2, 5, generator=chance),
        progress=progress,
    )


def test_drawn_log_probs_are_those_of_the_codes_drawn():
    given = candidates()
    expected = [[given.log_probs[b, m, given.tokens[b, m]].item() for m in range(5)] for b in range(2)]
    assert given.drawn_log_probs.tolist() == expected


@pytest.mark.parametrize(("progress", "noise_scale"), [(0.25, 3.375), (0.5, 2.25), (1.0, 0.0)])
def test_confidence_adds_noise_that_fades_with_progress(progress, noise_scale):
    given = candidates(progress)
    expected = given.drawn_log_probs + noise_scale * given.gumbel
    torch.testing.assert_close(token_selectors.build("confidence")(given), expected)


def test_choice_temperature_0_is_the_probability_alone():
    given = candidates()
    assert torch.equal(Confidence(choice_temperature=0)(given), given.drawn_log_probs)


def test_random_does_not_look_at_the_probabilities():
    given = candidates()
    other = Candidates(given.log_probs * 3, given.tokens, given.positions, given.gumbel, given.progress)
    select = token_selectors.build("random")
    assert torch.equal(select(given), select(other))
    assert select(given).unique().numel() == 10  # and tells all candidates apart


@pytest.mark.parametrize("temperature", [-0.1, float("nan")])
def test_a_choice_temperature_below_0_is_refused(temperature):
    with pytest.raises(ValueError, match="choice_temperature must be >= 0"):
        token_selectors.build({"name": "confidence", "choice_temperature": temperature})
