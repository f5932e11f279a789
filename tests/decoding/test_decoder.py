"""The decoding loop with a predictor of three lines, decoding of classes, and the noise."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    ConditionalModel,
    FirstStepLogits,
    ParallelDecoder,
    SeededNoise,
    decode_classes,
    predictors,
)
from maskgit_pl.decoding.decoder import count_after
from maskgit_pl.decoding.predictors import ClassPredictor, GuidedPredictor, build_class_predictor
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import Candidates, Confidence, TokenSelector
from maskgit_pl.networks.backbone import PredictAt
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules
from tests.conftest import random_transformer
from tests.decoding.fakes import (
    CPU,
    GRID,
    LOGITS,
    MASK,
    MIXED,
    count_masked,
    decoder,
    decoder_of,
    fake_predictor,
    partly_known,
    run,
)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 16])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "log", "exp"])
def test_every_masked_position_is_decided_exactly_once(schedule, num_steps):
    tokens = partly_known(MIXED)
    num_decided = sum(
        (step.was_masked & ~step.still_masked).int() for step in run(tokens, decoder(num_steps, schedule=schedule))
    )
    assert torch.equal(num_decided, (tokens == MASK).int())


def test_the_plan_follows_the_schedule_and_decides_a_token_per_step():
    rows = zip(*count_masked(decoder(4, schedule="linear"), MIXED), strict=True)
    assert [list(row) for row in rows] == [
        [16, 12, 8, 4, 0],
        [9, 6, 4, 2, 0],
        [3, 2, 1, 1, 0],  # floor gives 0 at the third step: at least 1
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    counts = count_masked(decoder(8, schedule="exp"), [16])  # exp gives 14, 14, 13, 12: at most one less
    assert [row[0] for row in counts] == [16, 14, 13, 12, 11, 10, 8, 4, 0]
    assert count_masked(decoder(4, schedule="linear"), [8], first_step=2) == [[8], [2], [0]]  # 8 (1 - 3 / 4)
    listed = decoder(3, tokens_per_step=(4, 4, 8))  # 12 and 8 of 16 stay masked; of 9 unknown tokens 6.75 and 4.5
    assert count_masked(listed, [16, 9]) == [[16, 9], [12, 6], [8, 4], [0, 0]]


@pytest.mark.parametrize(
    ("masked", "planned", "remasked", "expected"),
    [
        (8, 5, 0, (5, 0)),
        (8, 8, 0, (7, 0)),  # one of the draws is kept
        (8, 0, 0, (1, 0)),  # the next step has a token to decide
        (1, 0, 0, (1, 0)),
        (0, 0, 0, (0, 0)),  # a finished row stays finished
        (8, 5, 3, (5, 3)),  # the number of masked tokens follows the plan: three more draws are kept
        (4, 9, 3, (4, 3)),  # never more than before
        (4, 1, 3, (3, 3)),
    ],
)
def test_the_number_of_masked_tokens_is_bounded_on_both_sides(masked, planned, remasked, expected):
    assert count_after(masked, planned, remasked) == expected


def test_the_draws_with_the_lowest_scores_are_masked_again():
    for step in run(partly_known(MIXED), decoder(6)):
        assert torch.equal(step.scores.isfinite(), step.was_masked)
        for scores, still_masked in zip(step.scores, step.still_masked, strict=True):
            assert not still_masked.any() or scores[still_masked].max() <= scores[~still_masked].min()


def test_the_predictor_is_called_at_masked_positions_only():
    calls = []

    def record(tokens: Tensor, positions: Tensor) -> Tensor:
        calls.append((tokens, positions))
        return fake_predictor(tokens, positions)

    steps = run(partly_known(MIXED), decoder(6), record)
    for (tokens, positions), step in zip(calls, steps, strict=True):
        assert torch.equal(tokens == MASK, step.was_masked)
        assert positions.shape[1] == max(step.was_masked.sum(1).tolist())
        for row, was_masked in zip(positions.tolist(), step.was_masked, strict=True):
            masked = was_masked.nonzero().flatten().tolist()
            assert len(set(row)) == len(row)
            assert sorted(row[: len(masked)]) == masked  # the rest is padding: known positions
    assert len(calls) == 6


def test_logits_of_padding_are_ignored():
    def poisoned(tokens: Tensor, positions: Tensor) -> Tensor:
        is_known = tokens.gather(1, positions) != MASK
        return fake_predictor(tokens, positions).masked_fill(is_known.unsqueeze(-1), torch.nan)

    tokens = partly_known(MIXED)
    for clean, dirty in zip(run(tokens, decoder()), run(tokens, decoder(), poisoned), strict=True):
        assert torch.equal(clean.tokens, dirty.tokens)
        assert torch.equal(clean.scores, dirty.scores)


def test_the_temperature_divides_drawn_logits_and_not_scored_ones():
    scored_by, drawn_from = [], []

    class Noise(SeededNoise):
        def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
            drawn_from.append(logits)
            return super().draw(logits, positions, step)

    class Recording(TokenSelector):
        def __call__(self, candidates: Candidates) -> Tensor:
            scored_by.append(candidates.log_probs)
            return candidates.drawn_log_probs

    half = ParallelDecoder(mask_schedules.build("cosine"), Recording(), num_steps=1, sampling=CodeSampling(0.5))
    noise = Noise(torch.arange(1), 16)
    list(half.steps(fake_predictor, partly_known([16]), noise, mask_token_id=MASK, grid=GRID))
    torch.testing.assert_close(drawn_from[0], 2 * LOGITS[:16].unsqueeze(0))
    torch.testing.assert_close(scored_by[0], LOGITS[:16].log_softmax(-1).unsqueeze(0))


PAGE = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
LISTING = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def decode(" in block)


@pytest.mark.parametrize("num_steps", [1, 8, 49])
@pytest.mark.parametrize("name", ["cosine", "log"])
@torch.no_grad()
def test_the_listing_of_the_page_gives_the_tokens_of_the_decoder(name, num_steps):
    names = {}
    exec(LISTING, names)
    config = TransformerConfig(16, 3, (7, 7), embed_dim=32, depth=2, num_heads=4, mlp_dim=64)
    network, labels = random_transformer(config), torch.tensor([0, 1, 2])
    schedule, seeds = mask_schedules.build(name), torch.tensor([3, 4, 5])
    *_, last = ParallelDecoder(schedule, Confidence(choice_temperature=4.5), num_steps=num_steps).steps(
        lambda tokens, positions: network.forward_at(tokens, labels, positions),
        torch.full((3, 49), config.mask_token_id), SeededNoise(seeds, 49), mask_token_id=config.mask_token_id,
        grid=config.grid,
    )  # fmt: skip
    tokens = names["decode"](
        lambda tokens: network(tokens, labels), SeededNoise(seeds, 49), schedule,
        shape=(3, 49), mask_token_id=config.mask_token_id, num_steps=num_steps,
    )  # fmt: skip
    assert torch.equal(tokens, last.tokens)
    assert len(tokens.unique()) > 8


@dataclass
class Network:
    """A network of gathers and sums, exact in any batch, that records all labels. Label 3 is the null class."""

    labels: list[list[int]] = field(default_factory=list)
    null_label: int | None = 3

    @property
    def config(self) -> SimpleNamespace:
        ids = {"mask_token_id": MASK, "null_label": self.null_label}
        return SimpleNamespace(grid=(4, 4), num_tokens=16, codebook_size=7, condition_dim=0, **ids)

    def conditioned(self, labels: Tensor, vectors: None = None) -> PredictAt:
        return lambda tokens, positions: self.forward_at(tokens, labels, positions)

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.labels.append(labels.tolist())
        num_known = (tokens.sum(1, keepdim=True) * 5) % 64
        return LOGITS[(positions + num_known) % 64] + 2 * LOGITS[labels + 50].unsqueeze(1)


def model(network: Network, **options: object) -> ConditionalModel:
    return ConditionalModel(network, CPU, **options)


def decoded(
    labels: list[int],
    seeds: list[int],
    *,
    scales: tuple[float, ...] = (0.0,) * 5,
    network: Network | None = None,
    cache: FirstStepLogits | None = None,
    **options: object,
) -> list[Tensor]:
    conditional = model(network or Network(), first_step_logits=cache)
    steps = decode_classes(conditional, labels, seeds, decoder=decoder(len(scales)), scales=scales, **options)
    return [step.tokens for step in steps]


def test_guided_logits_follow_the_formula_and_scale_0_runs_one_half():
    network, labels, null = Network(), torch.tensor([0, 2]), torch.tensor([3, 3])
    asked = torch.full((2, 4), MASK), torch.tensor([[0, 3], [1, 2]])
    conditional, unconditional = (network.forward_at(asked[0], half, asked[1]) for half in (labels, null))
    predictor = GuidedPredictor(network, labels, negative_labels=null, scales=[0.0, 1.5, 0.0])
    logits = [predictor(*asked) for _ in range(3)]
    torch.testing.assert_close(logits[1], 2.5 * conditional - 1.5 * unconditional)
    assert torch.equal(logits[0], conditional)
    assert network.labels[2:] == [[0, 2], [0, 2, 3, 3], [0, 2]]  # both halves in one batch


@pytest.mark.parametrize("scales", [(0.0,) * 5, (0.0, 1.0, 2.0, 3.0, 4.0), (4.0, 3.0, 2.0, 1.0, 0.0)])
def test_the_shared_first_step_changes_no_token_and_saves_rows(scales):
    labels, seeds = [2, 0, 2, 2, 0], [5, 6, 7, 8, 9]
    network = Network()
    shared = decoded(labels, seeds, scales=scales, network=network)
    predictor = build_class_predictor(model(Network()), labels, scales=scales)
    assert isinstance(predictor, ClassPredictor | GuidedPredictor)
    tokens = torch.full((5, 16), MASK)
    noise = SeededNoise(torch.tensor(seeds), 16)
    plain = decoder(5).steps(predictor, tokens, noise, mask_token_id=MASK, grid=GRID)
    for step, expected in zip(shared, plain, strict=True):
        assert torch.equal(step, expected.tokens)
    assert network.labels[0] == ([0, 2, 3] if scales[0] > 0 else [0, 2])  # each class once, the null class too
    assert network.labels[1] == labels + [3] * 5 * (scales[1] > 0)
    assert len(network.labels) == 5


def test_the_first_step_of_a_class_is_computed_once_until_it_is_cleared(monkeypatch):
    monkeypatch.setattr(predictors, "_MOST_LABELS", 2)
    network = Network()
    cache = FirstStepLogits(network)
    for _ in range(2):
        assert all(map(torch.equal, decoded([2, 0], [5, 6], network=network, cache=cache), decoded([2, 0], [5, 6])))
    assert network.labels.count([0, 2]) == 1
    for label in (1, 0, 2):  # the third class replaces class 2, which was used least recently
        cache([label], device=CPU)
    assert network.labels[-2:] == [[1], [2]]
    cache.clear()
    cache([2], device=CPU)
    assert network.labels[-2:] == [[2], [2]]


def test_known_tokens_and_a_late_start_have_their_own_step_and_scales():
    scales, tokens, network = (4.0, 3.0, 2.0, 1.0, 0.5), partly_known([9, 5]), Network()
    late = decoded([2, 2], [5, 6], scales=scales, network=network, tokens=tokens, first_step=2)
    assert network.labels == [[2, 2, 3, 3]] * 3
    predictor = build_class_predictor(model(Network()), [2, 2], scales=scales[2:])
    noise = SeededNoise(torch.tensor([5, 6]), 16)
    expected = decoder(5).steps(predictor, tokens, noise, mask_token_id=MASK, grid=GRID, first_step=2)
    assert all(torch.equal(step, plain.tokens) for step, plain in zip(late, expected, strict=True))


def test_negative_classes_take_the_place_of_the_null_class():
    network = Network()
    decoded([2, 0], [5, 6], scales=(1.0,) * 5, network=network, negative_labels=[1, 2])
    assert network.labels == [[0, 1, 2], *[[2, 0, 1, 2]] * 4]


def test_remdm_without_remasking_decodes_the_tokens_of_confidence():
    tokens, plain = partly_known(MIXED), decoder_of({"name": "confidence", "choice_temperature": 3.0})
    remdm = decoder_of({"name": "remdm", "choice_temperature": 3.0, "eta": 0.0})
    for step, expected in zip(run(tokens, remdm), run(tokens, plain), strict=True):
        for name in ("tokens", "still_masked", "confidence", "scores"):
            assert torch.equal(getattr(step, name), getattr(expected, name))


EVERYWHERE = torch.arange(16).repeat(2, 1)


def test_noise_does_not_depend_on_the_steps_that_are_made_at_once():
    logits = LOGITS[:16].expand(2, -1, -1)
    one, many = (SeededNoise(torch.tensor([4, 5]), 16, count) for count in (1, 8))
    for step in (0, 7, 8, 3, 20):
        assert torch.equal(one.gumbel(EVERYWHERE, step), many.gumbel(EVERYWHERE, step))
        assert torch.equal(one.draw(logits, EVERYWHERE, step), many.draw(logits, EVERYWHERE, step))
        assert len(one._kept) == len(many._kept) == 1  # the memory does not grow with the steps


def test_noise_is_a_function_of_image_step_and_position():
    noise, positions = SeededNoise(torch.tensor([4, 5]), 16), torch.tensor([[9, 2], [2, 15]])
    gumbel, logits = noise.gumbel(EVERYWHERE, step=3), LOGITS[:16].expand(2, -1, -1)
    assert torch.equal(noise.gumbel(positions, step=3), gumbel.gather(1, positions))
    second_row = SeededNoise(torch.tensor([5]), 16).gumbel(positions[1:], step=3)
    assert torch.equal(second_row, gumbel[1:].gather(1, positions[1:]))
    codes = noise.draw(logits, EVERYWHERE, step=3)
    assert torch.equal(noise.draw(logits[0][positions], positions, step=3), codes.gather(1, positions))
    assert gumbel.unique().numel() == 32
    assert not torch.isin(noise.gumbel(EVERYWHERE, step=4), gumbel).any()


def test_draws_follow_the_softmax_and_never_take_an_impossible_code():
    num_images, logits = 20_000, torch.tensor([-torch.inf, 0.0, 1.0, -2.0, 3.0, 2.5, -torch.inf])
    noise = SeededNoise(torch.arange(num_images), 2)
    codes = noise.draw(logits.expand(num_images, 2, -1), torch.arange(2).expand(num_images, -1), step=0)
    expected = num_images * logits.softmax(-1)
    for position in range(2):
        counts = torch.bincount(codes[:, position], minlength=7)
        assert counts[0] == counts[6] == 0
        chi_square = float(((counts - expected) ** 2 / expected)[1:6].sum())
        assert chi_square < 25  # 4 degrees of freedom: one in 20,000


def test_a_random_start_shows_codes_in_the_first_step_only():
    seen: list[Tensor] = []

    class Watched(Network):
        def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
            seen.append(tokens)
            return super().forward_at(tokens, labels, positions)

    options = {"decoder": decoder(3, random_start=0.5), "scales": (0.0,) * 3}
    known = torch.full((200, 16), MASK)
    known[:, :4] = 2
    for tokens in (None, known):
        steps = list(decode_classes(model(Watched()), [0] * 200, range(200), tokens=tokens, **options))
        assert len(steps) == 3
        assert torch.equal(seen[-2] == MASK, steps[0].still_masked)
    free, given = seen[0], seen[3]
    assert 0.47 < float((free != MASK).float().mean()) < 0.53
    assert sorted(free.unique().tolist()) == list(range(8))  # 7 codes and the mask token
    assert bool((given[:, :4] == 2).all())  # known tokens stay
    assert torch.equal(given[:, 4:], free[:, 4:])  # a seed gives the same codes
    next(decode_classes(model(Watched()), [0] * 200, range(200), tokens=known, first_step=1, **options))
    assert torch.equal(seen[-1], known)  # an edit has context from the start


def test_images_of_a_random_start_do_not_depend_on_their_batch():
    def decode(labels: list[int], seeds: list[int]) -> Tensor:
        options = {"decoder": decoder(2, random_start=0.4), "scales": (0.0, 0.0)}
        return list(decode_classes(model(Network()), labels, seeds, **options))[-1].tokens

    alone = [decode([label], [seed]) for label, seed in ((0, 5), (1, 6), (2, 7))]
    assert torch.equal(decode([0, 1, 2], [5, 6, 7]), torch.cat(alone))
