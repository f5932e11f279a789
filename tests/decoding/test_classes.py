"""Class-conditional decoding: guidance, the shared first step, seeds."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    ClassPredictor,
    ConditionalModel,
    FirstStepLogits,
    FirstStepPredictor,
    GuidedPredictor,
    ParallelDecoder,
    SeededNoise,
    build_class_predictor,
    decode_classes,
)
from maskgit_pl.decoding.predictors import apply_guidance
from maskgit_pl.decoding.selectors import Candidates, TokenSelector
from maskgit_pl.schedules import mask_schedules
from tests.decoding.fakes import CPU, LOGITS, MASK, decoder, partly_known


@dataclass
class Network:
    """A network of gathers and sums, exact in any batch, that records all labels. Label 3 is the null class."""

    labels: list[list[int]] = field(default_factory=list)

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.labels.append(labels.tolist())
        known = (tokens.sum(1, keepdim=True) * 5) % 64
        return LOGITS[(positions + known) % 64] + 2 * LOGITS[labels + 50].unsqueeze(1)


ONE = (torch.full((2, 4), MASK), torch.tensor([[0, 3], [1, 2]]))


def test_guided_logits_are_the_formula_worked_out_by_hand():
    network = Network()
    conditional = network.forward_at(ONE[0], torch.tensor([0, 2]), ONE[1])
    unconditional = network.forward_at(ONE[0], torch.tensor([3, 3]), ONE[1])
    guided = GuidedPredictor(network, torch.tensor([0, 2]), negative_labels=torch.tensor([3, 3]), scales=[1.5])(*ONE)
    torch.testing.assert_close(guided, 2.5 * conditional - 1.5 * unconditional)
    assert network.labels[2:] == [[0, 2, 3, 3]]  # one batched forward


def test_guidance_of_scale_0_makes_one_conditional_forward():
    network = Network()
    predictor = GuidedPredictor(
        network, torch.tensor([0, 2]), negative_labels=torch.tensor([3, 3]), scales=[0.0, 2.0, 0.0]
    )
    made = [predictor(*ONE) for _ in range(3)]
    assert network.labels == [[0, 2], [0, 2, 3, 3], [0, 2]]
    assert torch.equal(made[0], network.forward_at(ONE[0], torch.tensor([0, 2]), ONE[1]))
    assert not torch.equal(made[1], made[0])


def test_the_plain_predictor_makes_one_forward_with_the_classes():
    network = Network()
    assert torch.equal(
        ClassPredictor(network, torch.tensor([1, 0]))(*ONE), network.forward_at(ONE[0], torch.tensor([1, 0]), ONE[1])
    )
    assert network.labels == [[1, 0]] * 2


def model(network: Network, *, null_label: int | None = 3, **options: object) -> ConditionalModel:
    return ConditionalModel(network, (4, 4), MASK, null_label, CPU, **options)


def decoded(
    labels: list[int],
    seeds: list[int],
    *,
    scales: tuple[float, ...] = (0.0,) * 5,
    network: Network | None = None,
    kept: FirstStepLogits | None = None,
    **options: object,
):
    return [
        step.tokens
        for step in decode_classes(
            model(network or Network(), first_step_logits=kept),
            labels,
            seeds,
            decoder=decoder(len(scales)),
            scales=scales,
            **options,
        )
    ]


@pytest.mark.parametrize(
    "scales",
    [(0.0,) * 5, (2.0,) * 5, (0.0, 1.0, 2.0, 3.0, 4.0), (4.0, 3.0, 2.0, 1.0, 0.0)],
    ids=["none", "all", "rising", "falling"],
)
def test_sharing_the_first_step_changes_no_token_and_saves_rows(scales):
    labels, seeds = [2, 0, 2, 2, 0], [5, 6, 7, 8, 9]
    network = Network()
    shared = decoded(labels, seeds, scales=scales, network=network)
    everything = build_class_predictor(model(Network()), labels, scales=scales)
    assert not isinstance(everything, FirstStepPredictor)
    tokens = torch.full((5, 16), MASK)
    plain = decoder(5).steps(everything, tokens, SeededNoise(torch.tensor(seeds), 16), mask_token_id=MASK)
    for step, expected in zip(shared, plain, strict=True):
        assert torch.equal(step, expected.tokens)
    assert network.labels[0] == ([0, 2, 3] if scales[0] > 0 else [0, 2])  # each class once, the null class too
    assert network.labels[1] == labels + [3] * 5 * (scales[1] > 0)
    assert len(network.labels) == 5


def test_the_first_step_of_a_class_is_computed_once_for_all_runs_until_it_is_cleared():
    network = Network()
    kept = FirstStepLogits(network, num_tokens=16, mask_token_id=MASK, max_labels=2)
    alone = decoded([2, 0], [5, 6])
    for _ in range(2):
        assert all(map(torch.equal, decoded([2, 0], [5, 6], network=network, kept=kept), alone))
    assert network.labels.count([0, 2]) == 1
    kept([1], device=CPU)  # the third class takes the place of the one that was asked for longest ago
    assert torch.equal(
        kept([0], device=CPU),
        Network().forward_at(torch.full((1, 16), MASK), torch.tensor([0]), torch.arange(16)[None]),
    )
    assert network.labels[-1] == [1]
    kept([2], device=CPU)
    assert network.labels[-1] == [2]
    kept.clear()
    kept([2], device=CPU)
    assert network.labels[-2:] == [[2], [2]]


@pytest.mark.parametrize(("size", "kept"), [(2**26, 4), (2**27, 2), (2**30, 1)])
def test_fewer_classes_are_kept_if_their_logits_are_large(size, kept):
    class Large(Network):
        def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
            self.labels.append(labels.tolist())
            return torch.empty(len(labels), positions.shape[1], size // 16, device="meta")

    network = Large()
    cache = FirstStepLogits(network, num_tokens=16, mask_token_id=MASK)
    for label in (*range(5), *range(5 - kept, 5), 4 - kept):
        cache([label], device=CPU)
    assert network.labels == [[0], [1], [2], [3], [4], [4 - kept]]


def test_known_tokens_at_the_start_leave_the_first_step_alone():
    network = Network()
    decoded([0, 0], [1, 2], network=network, tokens=partly_known([16, 9]))
    assert network.labels[0] == [0, 0]


def test_a_late_start_takes_the_later_scales_and_steps():
    scales, tokens = (4.0, 3.0, 2.0, 1.0, 0.5), partly_known([9, 5])
    late = decoded([2, 0], [5, 6], scales=scales, tokens=tokens, first_step=2)
    predictor = build_class_predictor(model(Network()), [2, 0], scales=scales[2:])
    noise = SeededNoise(torch.tensor([5, 6]), 16)
    expected = list(decoder(5).steps(predictor, tokens, noise, mask_token_id=MASK, first_step=2))
    assert len(late) == len(expected) == 3
    assert all(torch.equal(step, wanted.tokens) for step, wanted in zip(late, expected, strict=True))


def test_named_negative_classes_take_the_place_of_the_null_class():
    network = Network()
    decoded([2, 0], [5, 6], scales=(1.0,) * 5, network=network, negative_labels=[1, 2])
    assert network.labels == [[0, 1, 2], *[[2, 0, 1, 2]] * 4]


def test_selectors_are_told_the_grid():
    @dataclass(frozen=True)
    class Spy(TokenSelector):
        grids: list[tuple[int, int] | None] = field(default_factory=list)

        def __call__(self, candidates: Candidates) -> Tensor:
            self.grids.append(candidates.grid)
            return candidates.gumbel

    spy = Spy()
    oblong = replace(model(Network()), grid=(2, 8))
    made = ParallelDecoder(mask_schedules.build("cosine"), spy, num_steps=2)
    list(decode_classes(oblong, [0], [1], decoder=made, scales=(0.0,) * 2))
    assert spy.grids == [(2, 8)] * 2


def test_a_batch_of_four_is_four_batches_of_one():
    labels, seeds = [2, 0, 2, 1], [7, 8, 9, 7]
    together = decoded(labels, seeds, scales=(0.0, 1.0, 2.0))[-1]
    alone = [decoded([label], [seed], scales=(0.0, 1.0, 2.0))[-1] for label, seed in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_the_same_seed_gives_the_same_image_and_another_seed_another():
    first, second = decoded([1, 1, 1], [7, 8, 7])[-1], decoded([1, 1, 1], [7, 8, 7])[-1]
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])


def test_guidance_without_a_null_class_is_refused_and_scale_0_is_not():
    with pytest.raises(ValueError, match="guidance must have scale 0 for a model that has no null class"):
        build_class_predictor(model(Network(), null_label=None), [0], scales=[0.0, 1.0])
    assert isinstance(build_class_predictor(model(Network(), null_label=None), [0], scales=[0.0, 0.0]), ClassPredictor)


def test_guidance_may_push_away_from_another_class_without_a_null_class():
    network = Network()
    made = build_class_predictor(model(network, null_label=None), [0, 2], negative_labels=[1, 1], scales=[1.5])(*ONE)
    conditional, other = (Network().forward_at(ONE[0], torch.tensor(labels), ONE[1]) for labels in ([0, 2], [1, 1]))
    torch.testing.assert_close(made, 2.5 * conditional - 1.5 * other)
    assert network.labels == [[0, 2, 1, 1]]


def test_the_guided_distribution_is_normalised_at_each_position():
    conditional, unconditional = LOGITS[:8].softmax(-1), LOGITS[8:16].softmax(-1)
    expected = conditional**2.5 * unconditional**-1.5
    made = apply_guidance(LOGITS[:8], LOGITS[8:16], 1.5).softmax(-1)
    torch.testing.assert_close(made, expected / expected.sum(-1, keepdim=True))
