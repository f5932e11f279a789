"""Peak rates of cards."""

import pytest

from maskgit_pl.estimates.cards import CARDS


def test_a_cards_rate_is_that_of_the_precision():
    card = CARDS["h100"]
    assert card.rate("32-true") < card.rate("32-true", tensor_float32=True) < card.rate("bf16-mixed")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_no_card_is_slower_with_fewer_bits(card):
    assert card.float32 <= card.tensor_float32 <= card.bfloat16
    assert 1e9 < card.memory < 1e12
