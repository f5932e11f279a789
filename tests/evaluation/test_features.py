import pytest
import torch

from maskgit_pl.evaluation.features import Extractor, extract, own_batches, own_image_batches
from maskgit_pl.networks.features import Lite0Spec
from tests.evaluation.feature_networks import Few, few, pictures

IMAGES = pictures(23)


def read(rows: range) -> torch.Tensor:
    return IMAGES[rows.start : rows.stop]


def test_features_are_those_of_each_image_in_order() -> None:
    done: list[int] = []
    found = extract([few()], own_image_batches(read, 23, batch_size=5), on_images=done.append)["classifier"]
    output = Few()(IMAGES)
    torch.testing.assert_close(found.pooled, output.features)
    torch.testing.assert_close(found.logits, output.logits)
    torch.testing.assert_close(found.spatial, output.spatial)
    assert done == [5, 5, 5, 5, 3]
    assert len(found) == 23
    assert not found.pooled.requires_grad


def test_images_are_put_into_the_order_of_their_numbers() -> None:
    batches = list(own_image_batches(read, 23, batch_size=5))
    one, other = (extract([few()], order)["classifier"] for order in (batches, reversed(batches)))
    assert torch.equal(one.pooled, other.pooled)


def test_several_networks_see_the_same_images_once() -> None:
    seen: list[range] = []

    def counted(rows: range) -> torch.Tensor:
        seen.append(rows)
        return read(rows)

    networks = [few("one"), few("other", seed=1, knows_classes=False)]
    found = extract(networks, own_image_batches(counted, 23))
    assert seen == [range(23)]
    assert not torch.equal(found["one"].pooled, found["other"].pooled)
    assert found["one"].logits is not None
    assert found["other"].logits is None  # an inception score of them would mean nothing
    assert extract([], own_image_batches(counted, 23)) == {}


def test_whole_batches_are_dealt_to_ranks_by_number(monkeypatch) -> None:
    shares = []
    for rank in range(2):
        monkeypatch.setattr("maskgit_pl.evaluation.ranks.rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(list(own_batches(23, batch_size=5)))
    assert shares == [[range(5), range(10, 15), range(20, 23)], [range(5, 10), range(15, 20)]]


def test_the_same_image_twice_and_no_image_at_all_are_refused() -> None:
    batch = (IMAGES[:5], torch.arange(5))
    with pytest.raises(ValueError, match=r"features of classifier: each image must come once"):
        extract([few()], [batch, batch])
    with pytest.raises(ValueError, match="at least one image"):
        extract([few()], [])
    with pytest.raises(ValueError, match="each label at most once"):
        extract([few(), few(seed=1)], [batch])


def test_an_extractor_is_made_from_a_name_or_a_spec(monkeypatch) -> None:
    monkeypatch.setattr(Lite0Spec, "create", lambda self: Few())
    for named in ("lite0", {"name": "lite0", "size": 64}, Lite0Spec()):
        made = Extractor.create(named)
        assert (made.label, made.knows_classes) == ("lite0", False)
    assert made.digest == Extractor.create("lite0").digest != few(seed=1).digest
