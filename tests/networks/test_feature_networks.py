"""The classifiers of the data set at hand: any size, any colour, and what is read back is what was kept."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgit_pl.networks.feature_networks import (
    SMALL,
    ClassifierSizes,
    create_classifier,
    describe_classifier,
    load_classifier,
    weights_digest,
)
from maskgit_pl.networks.features import feature_networks

NAMES = ("bag", "boot", "coat")


def images(channels: int = 1, side: int = 8, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def kept(folder: Path, sizes: ClassifierSizes) -> torch.nn.Module:
    """Writes a folder as training does, and returns the network."""
    torch.manual_seed(0)
    network = create_classifier(sizes).eval()
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({**describe_classifier(sizes, NAMES), "data": "other keys pass"}))
    return network


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [7, 28, 32, 64])
def test_the_small_network_takes_any_size_and_colour(side, channels):
    output = create_classifier(ClassifierSizes(channels, side, 5, width=4))(images(channels, side))
    assert output.logits.shape == (2, 5)
    assert len(output.features) == 2


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, "resnet18"])
@pytest.mark.parametrize("size", [(24, 40), (9, 64), (64, 9), (1, 30)])
def test_images_that_are_not_square_keep_their_shape(size, model):
    network = create_classifier(ClassifierSizes(3, size, 5, model, width=4)).eval()
    assert network(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)).logits.shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "mobilenetv3_small_050"])
def test_networks_of_timm_learn_from_images_of_28_pixels(model, channels):
    network = create_classifier(ClassifierSizes(channels, 28, 5, model))
    assert network.size == 28
    output = network.train()(images(channels, 28))
    assert output.logits.shape == (2, 5)
    output.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_network_that_does_not_take_small_images_sees_them_larger():
    network = create_classifier(ClassifierSizes(1, 28, 5, "convnext_atto"))
    assert network.size == 224
    with torch.no_grad():
        assert network(images(1, 28)).logits.shape == (2, 5)


def test_unknown_networks_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean.* resnet18"):
        ClassifierSizes(1, 28, 10, "resnt18")
    with pytest.raises(ValueError, match="did you mean small"):
        ClassifierSizes(1, 28, 10, "smal")
    with pytest.raises(ValueError, match=r"timm\.list_models"):
        ClassifierSizes(1, 28, 10, "§§§")
    with pytest.raises(ValueError, match="image_size must be an integer in"):
        ClassifierSizes(1, 0, 10)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, "resnet18"])
def test_what_is_read_gives_what_was_kept(tmp_path, model):
    network = kept(tmp_path, ClassifierSizes(1, 8, 3, model, width=4))
    found = load_classifier(tmp_path)
    assert found.class_names == NAMES
    torch.testing.assert_close(found(images()).logits, network(images()).logits.detach())
    as_a_feature_network = feature_networks.build({"name": "classifier", "folder": str(tmp_path)}).create()
    assert torch.equal(as_a_feature_network(images()).features, found(images()).features)


def test_what_is_read_stays_as_it_is_and_lets_gradients_through(tmp_path):
    kept(tmp_path, ClassifierSizes(1, 8, 3, width=4))
    found = load_classifier(tmp_path).train()
    pixels = (images().float() / 255).requires_grad_()
    found(pixels).features.sum().backward()
    assert not any(module.training for module in found.modules())
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in found.parameters())


@pytest.mark.parametrize(("channels", "other"), [(1, 3), (3, 1)])
def test_grey_images_are_the_same_in_one_channel_and_in_three(tmp_path, channels, other):
    kept(tmp_path, ClassifierSizes(channels, 8, 3, width=4))
    found, grey = load_classifier(tmp_path), images(1)
    expanded = {1: grey, 3: grey.expand(-1, 3, -1, -1)}
    torch.testing.assert_close(found(expanded[channels]).logits, found(expanded[other]).logits)
    torch.testing.assert_close(found(grey).logits, found(grey.float() / 255).logits)


def test_weights_and_sizes_of_a_stranger_are_refused_by_file(tmp_path):
    kept(tmp_path, ClassifierSizes(1, 8, 3, width=4))
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    good = load_file(file)
    save_file({**good, "head.bias": torch.tensor([0.0, math.nan, 0.0])}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'head\.bias' must hold finite numbers, got nan"):
        load_classifier(tmp_path)
    save_file({**good, "head.bias": torch.ones(3, dtype=torch.int32)}, file)
    with pytest.raises(ValueError, match=r"tensor 'head\.bias' must be floating point, got torch.int32"):
        load_classifier(tmp_path)
    large = {**config["network"], "model": "vit_giant_patch14_224"}  # 4 GB of weights, were it built
    (tmp_path / "config.json").write_text(json.dumps({**config, "network": large}))
    start = time.process_time()
    with pytest.raises(ValueError, match="do not fit"):
        load_classifier(tmp_path)
    assert time.process_time() - start < 10


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="maskgit train-classifier"):
        load_classifier(tmp_path)
    kept(tmp_path, ClassifierSizes(1, 8, 3, width=4))
    config = json.loads((tmp_path / "config.json").read_text())
    for broken, match in (
        ("{", "is not valid JSON"),
        ("[]", "must hold a mapping"),
        (json.dumps({"width": 24, "seed": 0}), "format must be 'maskgit_pl.classifier', got None; train it again"),
        (json.dumps({**config, "version": 2}), "version must be 1, got 2"),
        (json.dumps({**config, "network": {**config["network"], "depth": 3}}), "depth"),
        (json.dumps({**config, "network": {**config["network"], "width": 8}}), "do not fit"),
    ):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=match):
            load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights .*model\.safetensors: no such file"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("model", ["small", "resnet18"])
def test_weights_that_see_images_of_another_size_have_another_digest(model: str) -> None:
    one, other = (create_classifier(ClassifierSizes(1, size, 3, model, 4)) for size in (28, 27))
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) != weights_digest(other)
