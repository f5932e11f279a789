"""The classifiers of the data set at hand: any size, any colour, and what is read back is what was kept."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgit_pl.checks import height_width
from maskgit_pl.networks.classifiers import (
    SMALL,
    ClassifierSizes,
    create_classifier,
    describe_classifier,
    load_classifier,
)
from maskgit_pl.networks.features import feature_networks

NAMES = ("bag", "boot", "coat")


def images(channels: int = 1, side: int = 8, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def save(folder: Path, sizes: ClassifierSizes) -> torch.nn.Module:
    """Writes a folder as training does, and returns the network."""
    torch.manual_seed(0)
    network = create_classifier(sizes).eval()
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(
        json.dumps({**describe_classifier(sizes, NAMES), "data": "other keys are ignored"})
    )
    return network


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [7, 64, (24, 40), (9, 64), (1, 30)])
def test_the_small_network_accepts_any_size_and_colour(size, channels):
    network = create_classifier(ClassifierSizes(channels, size, 5, width=4)).eval()
    pixels = torch.randint(0, 256, (2, channels, *height_width(size)), dtype=torch.uint8)
    assert network(pixels).logits.shape == (2, 5)


@pytest.mark.parametrize(("model", "channels"), [("resnet18", 1), ("mobilenetv3_small_050", 3)])
def test_networks_of_timm_learn_from_images_of_28_pixels(model, channels):
    network = create_classifier(ClassifierSizes(channels, 28, 5, model))
    assert network.size == 28
    output = network.train()(images(channels, 28))
    assert output.logits.shape == (2, 5)
    output.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("size", "model", "message"),
    [
        (28, "resnt18", "did you mean 'resnet18'"),
        (28, "§§§", r"timm\.list_models"),
        (0, SMALL, "image_size must be an integer in"),
    ],
)
def test_unknown_networks_and_wrong_sizes_are_refused(size, model, message):
    with pytest.raises(ValueError, match=message):
        ClassifierSizes(1, size, 10, model)


@pytest.mark.parametrize("model", [SMALL, "resnet18"])
def test_a_loaded_classifier_computes_what_the_saved_one_did(tmp_path, model):
    network = save(tmp_path, ClassifierSizes(1, 8, 3, model, width=4))
    classifier = load_classifier(tmp_path)
    assert classifier.class_names == NAMES
    torch.testing.assert_close(classifier(images()).logits, network(images()).logits.detach())
    feature_network = feature_networks.build({"name": "classifier", "folder": str(tmp_path)}).create()
    assert torch.equal(feature_network(images()).features, classifier(images()).features)


def test_a_loaded_classifier_is_frozen_and_gradients_reach_the_images(tmp_path):
    save(tmp_path, ClassifierSizes(1, 8, 3, width=4))
    classifier = load_classifier(tmp_path).train()
    pixels = (images().float() / 255).requires_grad_()
    classifier(pixels).features.sum().backward()
    assert not any(module.training for module in classifier.modules())
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_are_the_same_in_one_channel_and_in_three(tmp_path, channels):
    save(tmp_path, ClassifierSizes(channels, 8, 3, width=4))
    classifier, grey = load_classifier(tmp_path), images()
    torch.testing.assert_close(classifier(grey).logits, classifier(grey.expand(-1, 3, -1, -1)).logits)
    torch.testing.assert_close(classifier(grey).logits, classifier(grey.float() / 255).logits)


def test_weights_and_sizes_of_a_stranger_are_refused_by_file(tmp_path):
    save(tmp_path, ClassifierSizes(1, 8, 3, width=4))
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    save_file({**load_file(file), "head.bias": torch.tensor([0.0, math.nan, 0.0])}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'head\.bias' must hold finite numbers, got nan"):
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
    save(tmp_path, ClassifierSizes(1, 8, 3, width=4))
    config = json.loads((tmp_path / "config.json").read_text())
    for broken, match in (
        ("{", "is not valid JSON"),
        (
            json.dumps({"width": 24, "seed": 0}),
            r"format and version \('maskgit_pl.classifier', 1\), got \(None, None\); train it again",
        ),
        (json.dumps({**config, "version": 2}), r"got \('maskgit_pl.classifier', 2\)"),
        (json.dumps({**config, "network": {**config["network"], "width": 8}}), "do not fit"),
    ):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=match):
            load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must be an existing file, got .*model\.safetensors"):
        load_classifier(tmp_path)
