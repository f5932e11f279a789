"""The contract of corruptions, and what decoding shows of them."""

from dataclasses import dataclass
from inspect import cleandoc
from typing import ClassVar

import pytest
import torch

from maskgit_pl.decoding import ConditionalModel, DecodingConfig, corruption, decode_classes
from maskgit_pl.decoding.corruption import Corruption, corruptions
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.registry import Registry
from maskgit_pl.schedules import mask_schedules
from tests.conftest import random_transformer
from tests.decoding.fakes import CPU


@dataclass(frozen=True)
class TwoMasks(Corruption):
    """Several mask tokens: the ids below the last one, which the network of the test has rows for."""

    in_decoding: ClassVar[bool] = True
    seen: ClassVar[list[torch.Tensor]] = []

    def __call__(self, tokens, mask, uniform, *, codebook_size, mask_token_id):
        seen = tokens.where(~mask, mask_token_id - (uniform("masks") < 0.5).long())
        self.seen.append(seen)
        return seen


def decode(seeds: list[int], shown: Corruption | None) -> list:
    network = random_transformer(TransformerConfig(16, 3, (4, 4), 16, 2, 2, 32))
    decoder = DecodingConfig(4).build_decoder(mask_schedules.build("cosine"), shown)
    scales = (0.0, 1.0, 1.0, 1.0)
    return list(decode_classes(ConditionalModel(network, CPU), [0] * len(seeds), seeds, decoder=decoder, scales=scales))


def test_decoding_shows_the_network_other_mask_tokens_and_keeps_its_own():
    TwoMasks.seen.clear()
    steps = decode([5, 6], TwoMasks())
    assert len(TwoMasks.seen) == 4
    for step, seen in zip(steps, TwoMasks.seen, strict=True):
        is_mask = seen >= 16 + 3  # the null class is the other mask
        assert torch.equal(is_mask, step.was_masked)
    first, second = (seen[seen >= 19] for seen in TwoMasks.seen[:2])
    assert set(first.tolist()) == set(second.tolist()) == {19, 20}
    assert not steps[-1].still_masked.any()
    alone = decode([6], TwoMasks())
    assert torch.equal(alone[-1].tokens[0], steps[-1].tokens[1])  # the batch changes no image


def test_the_masks_of_the_paper_are_those_without_a_corruption():
    for mine, other in zip(decode([5, 6], corruptions.build("mask")), decode([5, 6], None), strict=True):
        assert torch.equal(mine.tokens, other.tokens)


def test_the_example_at_the_head_of_the_file_holds_the_contract():
    example = cleandoc((corruption.__doc__ or "").split("::\n")[1])
    names = {**vars(corruption), "corruptions": Registry("corruption", "none", check=corruption._check_corruption)}
    exec(example, names)  # into a registry of its own
    assert names["corruptions"].names() == ["noisy"]
    names["corruptions"].build("noisy")


@pytest.mark.parametrize("seen", [lambda tokens: tokens, lambda tokens: tokens.float()])
def test_a_corruption_that_shows_a_masked_token_is_refused(seen):
    kind = type("Shows", (Corruption,), {"__call__": lambda self, tokens, *parts, **ids: seen(tokens)})
    with pytest.raises(ValueError, match="corruption 'mine': masked tokens must be mask tokens"):
        corruption._check_corruption("mine", kind())
