import torch

from maskgit_pl.evaluation.extractors import extract, iter_image_batches
from tests.evaluation.feature_networks import Few, few, pictures

IMAGES = pictures(23)


def test_networks_see_each_image_once_and_features_are_sorted_by_index() -> None:
    counts: list[int] = []
    networks = [few("first"), few("second", seed=1, knows_classes=False)]
    batches = reversed(list(iter_image_batches(lambda rows: IMAGES[rows.start : rows.stop], 23)))
    features = extract(networks, batches, on_images=counts.append)
    output = Few()(IMAGES)
    for name in ("pooled", "logits", "spatial"):
        expected = output.features if name == "pooled" else getattr(output, name)
        torch.testing.assert_close(getattr(features["first"], name), expected)
    assert counts == [7, 16]
    assert not features["first"].pooled.requires_grad
    assert not torch.equal(features["first"].pooled, features["second"].pooled)
    assert features["second"].logits is None  # an inception score of them would mean nothing
