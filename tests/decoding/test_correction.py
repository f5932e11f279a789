"""Self-correction: decided tokens compete with new draws, or are replaced in place; plain selectors pay nothing."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import ConditionalModel, DecodingConfig, SeededNoise, decode_classes
from maskgit_pl.decoding.selectors import Candidates, TokenSelector, token_selectors
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules
from tests.conftest import random_transformer
from tests.decoding.fakes import MASK, MIXED, NUM_CODES, partly_known, run

P2 = {"name": "p2", "choice_temperature": 0.0}
EDIT = {"name": "edit", "choice_temperature": 0.0}
CONFIDENCE = {"name": "confidence", "choice_temperature": 0.0}
PLACE, WRONG, RIGHT = 6, 2, 5


@dataclass
class Misled:
    """A predictor that is sure of the right code everywhere, except that its first call is surest of a wrong one."""

    shapes: list[int] = field(default_factory=list)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(*positions.shape, NUM_CODES)
        logits[..., RIGHT] = 6.0
        if not self.shapes:
            logits[positions == PLACE] = torch.eye(NUM_CODES)[WRONG] * 30
        self.shapes.append(positions.shape[1])
        return logits


def decoder(spec: object, num_steps: int = 6, **options: object):
    return DecodingConfig(num_steps, spec, **options).build_decoder(mask_schedules.build("cosine"))


def at_place(spec: object) -> list[tuple[int, bool]]:
    """The code at PLACE after each draw, and whether it was masked before."""
    steps = run(torch.full((1, 16), MASK), decoder(spec), Misled())
    return [(int(step.tokens[0, PLACE]), bool(step.was_masked[0, PLACE])) for step in steps]


def test_a_wrong_token_stays_with_confidence():
    assert [code for code, _ in at_place(CONFIDENCE)] == [WRONG] * 6


def test_p2_masks_a_wrong_token_again_and_draws_the_right_one():
    found = at_place(P2)
    assert found[0] == (WRONG, True)
    assert found[1] == (WRONG, False)  # judged, and masked
    assert found[2] == (RIGHT, True)
    assert {code for code, _ in found[2:]} == {RIGHT}


def test_edit_replaces_a_wrong_token_in_place():
    found = at_place(EDIT)
    assert found[0] == (WRONG, True)
    assert found[1] == (RIGHT, False)
    assert {code for code, _ in found[1:]} == {RIGHT}


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ({**P2, "penalty": 0.0}, CONFIDENCE),  # all decided tokens have the highest score
        ({"name": "edit", "choice_temperature": 3.0, "threshold": 1.0}, {**CONFIDENCE, "choice_temperature": 3.0}),
    ],
    ids=["p2", "edit"],
)
def test_without_corrections_the_tokens_are_those_of_confidence(spec, plain):
    tokens = partly_known(MIXED)
    for mine, other in zip(run(tokens, decoder(spec)), run(tokens, decoder(plain)), strict=True):
        assert torch.equal(mine.tokens, other.tokens)
        assert torch.equal(mine.still_masked, other.still_masked)
        assert torch.equal(mine.confidence, other.confidence)
        assert torch.equal(mine.scores, other.scores)


@pytest.mark.parametrize("name", [name for name in token_selectors.names() if name != "entropy"])
def test_only_selectors_that_ask_for_it_pay_for_decided_tokens(name):
    predictor, made = Misled(), decoder(name)
    noise = SeededNoise(torch.arange(2), 16)
    list(made.steps(predictor, torch.full((2, 16), MASK), noise, mask_token_id=MASK, grid=(4, 4)))
    counts = [before for (before, _) in made.count_masked([16, 16], 16)[:-1]]
    assert predictor.shapes == ([16] * 6 if made.token_selector.needs_decided_logits else counts)


@pytest.mark.parametrize("spec", [P2, EDIT], ids=["p2", "edit"])
def test_given_tokens_are_never_judged(spec):
    """Given tokens are as wrong as can be for the predictor; they stay."""
    tokens = torch.full((2, 16), MASK)
    tokens[0, :9], tokens[1, 3:5] = WRONG, WRONG
    for step in run(tokens, decoder(spec), Misled()):
        assert torch.equal(step.tokens[tokens != MASK], tokens[tokens != MASK])
        assert not step.still_masked[tokens != MASK].any()


@pytest.mark.parametrize("spec", ["p2", "edit"])
def test_a_network_with_guidance_and_a_shared_first_step_gives_the_same_image_in_any_batch(spec):
    network = random_transformer(TransformerConfig(16, 3, (4, 4), 16, 2, 2, 32))
    model = ConditionalModel.from_network(network, torch.device("cpu"))
    made = decoder(spec)

    def tokens(labels: list[int], seeds: list[int]) -> Tensor:
        *_, last = decode_classes(model, labels, seeds, decoder=made, scales=[0.0, 1, 1, 2, 2, 2])
        return last.tokens

    whole = tokens([0, 1, 2], [5, 6, 7])
    assert torch.equal(torch.cat([tokens([label], [5 + label]) for label in range(3)]), whole)


def test_a_decided_code_that_became_impossible_gets_a_finite_score():
    log_probs = torch.tensor([[[0.0, -torch.inf]]])
    given = Candidates(
        log_probs, torch.ones(1, 1).long(), torch.zeros(1, 1).long(), torch.zeros(1, 1), 0.5, None, torch.ones(1, 1) > 0
    )
    assert token_selectors.build("p2")(given).isfinite().all()


@pytest.mark.parametrize(
    ("attributes", "rule"),
    [
        ({"needs_decided_logits": True, "follows_schedule": False}, "follows_schedule must be True"),
        ({"replaces_decided": True}, "needs_decided_logits must be True"),
    ],
)
def test_attributes_that_contradict_each_other_are_refused(monkeypatch, attributes, rule):
    @dataclass(frozen=True)
    class Odd(TokenSelector):
        kind: ClassVar[str] = "odd"

        def __call__(self, candidates):
            return candidates.gumbel

    for name, value in attributes.items():
        setattr(Odd, name, value)
    monkeypatch.setitem(token_selectors._factories, "odd", Odd)
    with pytest.raises(ValueError, match=f"token selector 'odd': {rule}"):
        token_selectors.build("odd")


def test_no_replacements_is_named():
    with pytest.raises(TypeError, match="must define replacements"):
        token_selectors.build("confidence").replacements(None)
