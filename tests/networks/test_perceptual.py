"""Perceptual distances by name give a distance for each pair of images, whose gradient reaches the images."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchmetrics.functional.image import lpips as theirs
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from maskgit_pl.networks.features import (
    FeatureDistance,
    FeatureOutput,
    build_perceptual,
    create_distance,
    load_lpips,
    perceptual_networks,
)
from maskgit_pl.training.tokenizer_losses import PerceptualConfig
from tests.installed_packages import install

MODEL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def timm_spec(tmp_path_factory):
    file = tmp_path_factory.mktemp("timm") / "model.pth"
    torch.save(timm.create_model(MODEL, pretrained=False).state_dict(), file)
    return {"name": "timm", "model": MODEL, "weights": str(file), "size": 32}


@pytest.fixture(scope="module")
def lpips_spec(tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "squeeze.pth"
    torch.save({f"features.{k}": v for k, v in torchvision.models.squeezenet1_1().features.state_dict().items()}, file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"name": "lpips", "backbone": "squeeze", "weights": str(file), "sha256": sha256}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "lpips", "lite0"])
@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_of_each_pair_and_reach_the_image_only(name, channels, timm_spec, lpips_spec):
    network = create_distance({"timm": timm_spec, "lpips": lpips_spec}.get(name, {"name": name, "size": 32}))
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


@pytest.mark.parametrize("name", ["timm", "lpips"])
def test_bfloat16_images_are_compared_in_float32(name, timm_spec, lpips_spec):
    network = create_distance({"timm": timm_spec, "lpips": lpips_spec}[name])
    images, others = torch.rand(2, 2, 3, 20, 20).bfloat16()
    assert torch.equal(network(images, others), network(images.float(), others.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images, others).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "output", "message"),
    [
        ("lpipz", "logits", r"unknown perceptual network 'lpipz': did you mean 'lpips'\? known: classifier, .*lpips"),
        ({"name": "lpips"}, "logits", "weights"),
        ({"name": "lpips", "weights": "x", "backbone": "resnet"}, "logits", "backbone must be"),
        ({"name": "lpips", "weights": "x"}, "features", "output must be left out with network 'lpips'"),
        ({"weights": "x"}, "logits", "must have the key 'name'"),
        ({"name": "timm", "model": "resnet5O", "weights": "x"}, "logits", "resnet5O"),
    ],
)
def test_a_wrong_value_is_refused_by_name(spec, output, message):
    with pytest.raises(ValueError, match=message):
        PerceptualConfig(spec, output=output)


def test_a_missing_file_is_named_with_the_flag_and_the_address():
    config = PerceptualConfig({"name": "lpips", "weights": "none.pth"}, weight=1.0)
    with pytest.raises(
        ValueError, match=r"got 'none\.pth'; download .*vgg16-397923af\.pth; set --model\.perceptual\.network\.weights"
    ):
        config.create_network()


def test_a_distance_of_another_package_is_built_by_its_name(site, monkeypatch):
    module = """
from dataclasses import dataclass
from torch import nn
class Far(nn.Module):
    def forward(self, images, others):
        return (images - others).abs().flatten(1).amax(1)
@dataclass(frozen=True)
class FarSpec:
    min_image_size: int = 1
    def create(self):
        return Far()
"""
    entry_points = f"[{perceptual_networks.group}]\nfar = far_away:FarSpec\n"
    install(site, name="far-package", entry_points=entry_points, modules={"far_away": module})
    monkeypatch.setattr(perceptual_networks, "_loaded", {})
    assert not isinstance(create_distance("far"), FeatureDistance)
    assert create_distance("far")(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).tolist() == [1, 1]
    assert build_perceptual("far").min_image_size == 1


class Outputs(nn.Module):
    """A feature network: its features are the pixels, its logits are twice the pixels."""

    def forward(self, images):
        return FeatureOutput(features=images.flatten(1), logits=2 * images.flatten(1))


@pytest.mark.parametrize(("output", "factor"), [("features", 1), ("logits", 4)])
def test_the_named_output_is_compared(output, factor):
    images, others = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = factor * (images - others).square().flatten(1).mean(1)
    assert torch.allclose(FeatureDistance(Outputs(), output)(images, others), expected)


MODELS = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}


@pytest.fixture(scope="module", params=sorted(MODELS))
def backbone(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[str, torch.nn.Module, Path, str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = MODELS[request.param]().features
    file = tmp_path_factory.mktemp("lpips") / f"{request.param}.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    return request.param, features, file, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_distance_is_torchmetrics_with_the_backbone_of_the_file(backbone, monkeypatch) -> None:
    name, features, file, sha256 = backbone
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    expected = LearnedPerceptualImagePatchSimilarity(name, normalize=True)
    images, others = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    ours = load_lpips(f"{name}={file}", sha256=sha256)
    found = ours(images, others)
    assert found.shape == (3,)
    assert float(found.mean()) == pytest.approx(float(expected(images, others)), rel=1e-6)
    assert ours(images, images).tolist() == [0, 0, 0]
    assert ours(images[:, :1], others[:, :1]).shape == (3,)
    assert ours.label == f"lpips/{name}"
    with pytest.raises(ValueError, match=rf"lpips/{name}: the edges of images must be >= \d+ pixels, got \(8, 8\)"):
        ours(images[..., :8, :8], others[..., :8, :8])


@pytest.mark.slow
def test_no_other_file_is_called_lpips(backbone, monkeypatch, tmp_path: Path) -> None:
    name, _, file, _ = backbone
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **options: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=rf"lpips '{name}' weights must be a file whose sha256 begins with"):
            load_lpips(f"{name}={file}")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"which must be torchvision's .* do not fit"):
        load_lpips(f"{name}={tmp_path / 'other.pth'}", sha256="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vgg", r"lpips 'vgg' weights must be an existing file, got ''; download https://\S+/vgg16-397923af\.pth"),
        ("alex=none.pth", r"got 'none\.pth'; download https://\S+/alexnet-owt-7be5be79\.pth"),
        ("lite0", "known: alex, squeeze, vgg"),
    ],
)
def test_a_missing_file_or_an_unknown_backbone_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        load_lpips(text)
