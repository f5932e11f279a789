"""The sampling of codes from logits, against results computed by hand."""

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import SeededNoise
from maskgit_pl.decoding.sampling import CodeSampling
from tests.decoding.fakes import LOGITS, decoder, partly_known, run


class Recording:
    """Noise that remembers the logits that codes are drawn from."""

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        self.logits = logits
        return logits.argmax(-1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        return torch.zeros(positions.shape)


def drawn_from(sampling: CodeSampling, probabilities: list[float], **options: float) -> Tensor:
    """The probabilities (K,) that a code is drawn from."""
    noise, logits = Recording(), torch.tensor([[probabilities]]).log()
    sampling.draw(logits, noise, torch.zeros(1, 1, dtype=torch.int64), step=0, **{"progress": 0.0, **options})
    return noise.logits.softmax(-1)[0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-6, 1), (0.4999, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.7501, 3), (0.875, 3), (0.8751, 4), (1.0, 4)],
)
def test_top_p_keeps_the_fewest_codes_whose_probabilities_sum_to_it(top_p: float, kept: int) -> None:
    probabilities = drawn_from(CodeSampling(top_p=top_p), [0.125, 0.5, 0.125, 0.25])  # exact in float32
    assert int((probabilities > 0).sum()) == kept
    assert probabilities.argmax() == 1


def test_the_temperature_comes_before_top_p() -> None:
    given = [0.6, 0.3, 0.1]
    assert (drawn_from(CodeSampling(top_p=0.55), given) > 0).tolist() == [True, False, False]
    # The square roots, of a temperature of 2, are in the ratio 0.473 : 0.334 : 0.193: one code has less than 0.55.
    made = drawn_from(CodeSampling(2.0, top_p=0.55), given)
    torch.testing.assert_close(made, torch.tensor([0.5858, 0.4142, 0.0]), atol=1e-4, rtol=0)
    sharpened = drawn_from(CodeSampling(2.0, top_p=0.55), given, sharpness=2.0)  # takes the temperature back
    assert sharpened.tolist() == [1.0, 0.0, 0.0]


def test_the_temperature_goes_linearly_from_the_first_to_the_last_step() -> None:
    for progress, temperature in ((0.0, 2.0), (0.5, 1.25), (1.0, 0.5)):
        made = drawn_from(CodeSampling((2.0, 0.5)), [0.8, 0.2], progress=progress)
        assert made[0] / made[1] == pytest.approx(4 ** (1 / temperature), rel=1e-5)


def test_a_temperature_that_falls_to_0_takes_the_likeliest_code_at_the_last_step():
    made = decoder(3, sampling=CodeSampling((1.0, 0.0)))
    *_, last = run(partly_known([16]), made, lambda tokens, positions: LOGITS[positions])
    assert torch.equal(last.tokens[last.was_masked], LOGITS[:16].argmax(-1)[last.was_masked[0]])


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-45, 1e-38, 1e-31, (0, 1e-40)])
@pytest.mark.parametrize("sharpness", [1.0, 1e-3, 1e300])
def test_a_temperature_that_is_almost_0_takes_the_likeliest_code(temperature, sharpness):
    sampling, positions = CodeSampling(temperature, top_k=3, top_p=0.5), torch.arange(len(LOGITS))[None]
    for progress in (0.0, 1.0):
        made = sampling.draw(100 * LOGITS[None], Recording(), positions, step=0, progress=progress, sharpness=sharpness)
        assert torch.equal(made[0], LOGITS.argmax(-1))
    noise = SeededNoise(torch.tensor([5]), len(LOGITS))
    made = CodeSampling(temperature).draw(LOGITS[None], noise, positions, step=0, progress=1.0, sharpness=sharpness)
    assert torch.equal(made[0], LOGITS.argmax(-1))


def test_top_k_leaves_the_likeliest_codes_alone():
    made = CodeSampling(top_k=2).truncate(LOGITS)
    assert torch.equal(made.isfinite().sum(-1), torch.full((64,), 2))
    assert torch.equal(made.argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(CodeSampling(top_k=99).truncate(LOGITS), LOGITS)


def test_top_k_and_top_p_are_taken_one_after_the_other():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()  # the first of the two most likely codes has 2 / 3
    assert CodeSampling(top_k=2, top_p=0.6).truncate(logits).isfinite().tolist() == [[False, True, False, False]]
