"""The sampling of codes from logits, against results computed by hand."""

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding.sampling import CodeSampling
from tests.decoding.fakes import LOGITS


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


def test_the_temperature_divides_the_logits_and_a_sharpness_multiplies_them() -> None:
    # The square roots, of a temperature of 2, are in the ratio 0.473 : 0.334 : 0.193.
    flattened = drawn_from(CodeSampling(2.0, top_k=2), [0.6, 0.3, 0.1])
    torch.testing.assert_close(flattened, torch.tensor([0.5858, 0.4142, 0.0]), atol=1e-4, rtol=0)
    sharpened = drawn_from(CodeSampling(2.0, top_k=2), [0.6, 0.3, 0.1], sharpness=2.0)  # takes the temperature back
    torch.testing.assert_close(sharpened, torch.tensor([2 / 3, 1 / 3, 0.0]))


def test_the_temperature_is_linear_from_the_first_to_the_last_step() -> None:
    for progress, temperature in ((0.0, 2.0), (0.5, 1.25), (1.0, 0.5)):
        annealed = drawn_from(CodeSampling((2.0, 0.5)), [0.8, 0.2], progress=progress)
        assert annealed[0] / annealed[1] == pytest.approx(4 ** (1 / temperature), rel=1e-5)


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-38, (0, 1e-40)])
@pytest.mark.parametrize("sharpness", [1e-3, 1e300])
def test_a_temperature_close_to_0_takes_the_likeliest_code(temperature, sharpness):
    sampling, positions = CodeSampling(temperature, top_k=3), torch.arange(len(LOGITS))[None]
    for progress in (0.0, 1.0):
        codes = sampling.draw(
            100 * LOGITS[None], Recording(), positions, step=0, progress=progress, sharpness=sharpness
        )
        assert torch.equal(codes[0], LOGITS.argmax(-1))


def test_top_k_keeps_the_likeliest_codes():
    truncated = CodeSampling(top_k=2).truncate(LOGITS)
    assert torch.equal(truncated.isfinite().sum(-1), torch.full((64,), 2))
    assert torch.equal(truncated.argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(CodeSampling(top_k=99).truncate(LOGITS), LOGITS)
