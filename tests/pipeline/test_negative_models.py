"""Negative models, and pipelines whose weights change: each gives the images of a new pipeline with its weights."""

import copy
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskgit_pl.networks.backbone import backbones, build_config
from maskgit_pl.networks.kernels import FastLinear
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import BulkOptions, generate_many
from maskgit_pl.pretrained.networks import load_transformer, save_transformer
from tests.conftest import CLASSES, peak_predictions, save_tiny_pretrained
from tests.pipeline.conftest import last_tokens

SMALL = {"bert": {"embed_dim": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}}
SMALL["adaln"] = {"embed_dim": 16, "depth": 1, "num_heads": 1, "mlp_dim": 16}
IMAGE = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)


def save_weaker(folder, strong, **changes):
    """Saves a smaller transformer for the tokens of another model: an early checkpoint without a tokenizer."""
    like = load_transformer(strong / "transformer")
    config = TransformerConfig(16, 3, changes.get("grid", (4, 4)), 8, 1, 1, 8)
    if "backbone" in changes:
        config = build_config({"codebook_size": 16, "num_classes": 3, "grid": [4, 4], **changes["backbone"]}, "network")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        weights = peak_predictions(config.create()).state_dict()
    save_transformer(
        folder / "transformer",
        config,
        weights,
        mask_schedule="cosine",
        decoding=like.decoding,
        class_names=changes.get("class_names", CLASSES),
        tokenizer_fingerprint=changes.get("fingerprint", like.tokenizer_fingerprint),
    )
    return folder


@pytest.fixture
def weaker(tiny_pretrained, tmp_path):
    return save_weaker(tmp_path / "early", tiny_pretrained)


def tokens(pipe: MaskGIT, classes=(0, 1, 2), **options) -> torch.Tensor:
    return last_tokens(pipe, list(classes), **options)


def test_a_model_that_guides_itself_gives_the_unguided_images(pipe, tiny_pretrained):
    plain = tokens(pipe, guidance_scale=0)
    assert not torch.equal(plain, tokens(pipe, guidance_scale=40.0))
    for same in (tiny_pretrained, str(tiny_pretrained / "transformer"), pipe):
        assert torch.equal(plain, tokens(pipe, guidance_scale=40.0, negative_model=same))


def test_a_negative_model_may_be_a_folder_a_network_or_a_default(pipe, tiny_pretrained, weaker):
    guided = tokens(pipe, guidance_scale=2.0, negative_model=weaker)
    assert not torch.equal(guided, tokens(pipe, guidance_scale=2.0))
    loaded = load_transformer(weaker / "transformer")
    assert torch.equal(guided, tokens(pipe, guidance_scale=2.0, negative_model=loaded))
    own = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    assert torch.equal(guided, tokens(own, guidance_scale=2.0))


@pytest.mark.parametrize("name", sorted(backbones.names()))
def test_a_negative_model_may_have_another_backbone(pipe, tiny_pretrained, tmp_path, name):
    weak = save_weaker(tmp_path / "weak", tiny_pretrained, backbone={"backbone": name, **SMALL.get(name, {})})
    guided = tokens(pipe, guidance_scale=2.0, negative_model=weak)
    assert guided.max() < 16
    assert not torch.equal(guided, tokens(pipe, guidance_scale=0))


def test_a_negative_model_takes_the_place_of_a_null_class(tmp_path):
    bare = save_tiny_pretrained(tmp_path / "bare", class_dropout=0.0)
    strong = MaskGIT.from_pretrained(bare)
    with pytest.raises(ValueError, match="no null class"):
        tokens(strong, guidance_scale=1.0)
    assert tokens(strong, guidance_scale=1.0, negative_model=save_weaker(tmp_path / "weak", bare)).max() < 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "f" * 64}, "negative_model must have the tokenizer .*, got 'ffffffffffff'"),
        ({"grid": (2, 4)}, r"negative_model must have grid \(4, 4\), .* got \(2, 4\)"),
        (
            {"backbone": {"backbone": "adaln", "condition_dim": 5, **SMALL["adaln"]}},
            "negative_model must have condition_dim 0, .* got 5",
        ),
        ({"class_names": ("Bag", "T-shirt", "Trouser")}, "negative_model must have class_names .*Ankle boot.*got.*Bag"),
    ],
)
def test_a_negative_model_of_other_tokens_is_refused(pipe, tiny_pretrained, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate([0], negative_model=save_weaker(tmp_path / "other", tiny_pretrained, **changes))


def test_other_values_of_negative_model_are_refused(pipe, tmp_path, tiny_autoregressive, weaker):
    with pytest.raises(FileNotFoundError, match=r"negative_model .*nowhere must be a run .*maskgit export RUN"):
        pipe.generate([0], negative_model=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="negative_model requires a model with bidirectional attention"):
        MaskGIT.from_pretrained(tiny_autoregressive).generate([0], negative_model=weaker)


def test_the_folder_of_a_model_may_hold_its_negative_model(tiny_pretrained, weaker, tmp_path):
    folder = Path(shutil.copytree(tiny_pretrained, tmp_path / "pretrained"))
    shutil.copytree(weaker / "transformer", folder / "negative")
    expected = tokens(MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker), guidance_scale=2.0)
    pipe = MaskGIT.from_pretrained(folder)
    assert torch.equal(tokens(pipe, guidance_scale=2.0), expected)
    (folder / "negative" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"negative_model .*negative must be a run .*maskgit export RUN"):
        MaskGIT.from_pretrained(folder)


def test_a_saved_pipeline_holds_its_negative_model(tiny_pretrained, weaker):
    pipe = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    weak = (weaker / "transformer" / "model.safetensors").read_bytes()
    for _ in range(2):  # first over the folder of the negative model, then over its own folder
        pipe.save_pretrained(weaker)
        assert (weaker / "negative" / "model.safetensors").read_bytes() == weak
        again = MaskGIT.from_pretrained(weaker)
        assert torch.equal(tokens(again, guidance_scale=3.0), tokens(pipe, guidance_scale=3.0))
        pipe = again


def test_a_pipeline_without_a_negative_model_is_saved_over_one_with_it(pipe, tiny_pretrained, weaker, tmp_path):
    MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker).save_pretrained(tmp_path / "copy")
    pipe.save_pretrained(tmp_path / "copy")
    assert MaskGIT.from_pretrained(tmp_path / "copy").negative_model is None


def test_the_plan_of_many_images_has_the_negative_model(pipe, tiny_pretrained, weaker, tmp_path):
    six = BulkOptions(num_images=6)
    generate_many(pipe, tmp_path / "made.npz", six)
    guided = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    with pytest.raises(ValueError, match="negative_model None -> "):
        generate_many(guided, tmp_path / "made.npz", six)
    # Without guidance the negative model changes nothing, and is not part of the plan.
    unguided = replace(six, decoding=pipe.decoding_with(guidance_scale=0))
    generate_many(guided, tmp_path / "plain.npz", unguided)
    assert generate_many(pipe, tmp_path / "plain.npz", unguided).made == 0


def fused_adamw(network: nn.Module) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.3, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        logits = network(torch.zeros(3, 16, dtype=torch.int64), torch.arange(3)).flatten(0, 1)
        F.cross_entropy(logits, torch.arange(48) % 16).backward()
        optimizer.step()


def write_with_numpy(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.detach().numpy()[:] *= -2


def write_one_row_with_numpy(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, FastLinear):
            layer.weight.detach().numpy()[1] += 3


CHANGES = [fused_adamw, write_with_numpy, write_one_row_with_numpy]
CALLS = {
    "generate": lambda pipe: pipe.generate([0, 1, 2], seed=0, output_type="pt"),
    "inpaint": lambda pipe: pipe.inpaint(IMAGE, IMAGE[0] > 20, classes=[1], output_type="pt", blend=0),
    "panorama": lambda pipe: pipe.panorama([1], 16, output_type="pt"),
}


@pytest.fixture
def own(tiny_pretrained) -> MaskGIT:
    """Returns a pipeline whose weights a test may change."""
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    pipe.transformer.network.requires_grad_(requires_grad=True)
    return pipe


def renewed(pipe: MaskGIT, **options) -> MaskGIT:
    """Returns a new pipeline with the present weights of another."""
    transformer = replace(pipe.transformer, network=copy.deepcopy(pipe.transformer.network))
    return MaskGIT(pipe.tokenizer, transformer, **options)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_follows_its_weights(own, change):
    guided = renewed(own, negative_model=own)
    options = {"guidance_scale": 50.0, "seed": 0, "output_type": "pt"}
    before, guided_before = [call(own) for call in CALLS.values()], guided.generate([0, 1, 2], **options)
    change(own.transformer.network)
    for call, images in zip(CALLS.values(), before, strict=True):
        after = call(renewed(own))
        assert not torch.equal(images, after)
        assert torch.equal(call(own), after)
    after = guided.generate([0, 1, 2], negative_model=renewed(own), **options)
    assert not torch.equal(guided_before, after)
    assert torch.equal(guided.generate([0, 1, 2], **options), after)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_follow_their_own_weights(own, copied):
    before = CALLS["generate"](own)
    twin = copied(own)
    assert torch.equal(CALLS["generate"](twin), before)
    write_with_numpy(twin.transformer.network)
    assert torch.equal(CALLS["generate"](twin), CALLS["generate"](renewed(twin)))
    assert torch.equal(CALLS["generate"](own), before)
