"""Tokens in groups through a whole run: training on binary codes, resume, export, images, edits and likelihood."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import AutoregressiveDecoding, DecodingConfig
from maskgit_pl.evaluation.likelihood import bind_conditions, negative_elbo
from maskgit_pl.networks.backbone import BackboneConfig, build_config
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, save_tokenizer
from maskgit_pl.training.checkpoints import newest_checkpoint
from maskgit_pl.training.optimizers import LearningRate
from tests.modules import autoregressive_model, masked_model
from tests.short_runs import data, fit

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "num_classes": 3, "grid": (4, 4)}
LEFT_HALF = torch.arange(64).reshape(8, 8) % 8 < 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of 64 binary codes: 8 px images, 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("binary") / "tokenizer"
    sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "num_groups": 2}
    config = VQGANConfig(1, **sizes, codebook_size=64, code_dim=6, quantizer="lfq")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_tokenizer(folder, config, VQGAN(config).state_dict(), image_size=8)
    return folder


def network(backbone: str, num_groups: int, **options: object) -> BackboneConfig:
    values = {"backbone": backbone, "codebook_size": 64, "num_token_groups": num_groups, **SIZES, **options}
    return build_config(values, "test")


def bits_per_token(pipe: MaskGIT, tokens: Tensor) -> float:
    """The order-agnostic bound, in bits per token."""
    own = pipe.transformer.network
    predictor, index = bind_conditions(own, torch.zeros(len(tokens), dtype=torch.int64), None)
    nats = negative_elbo(predictor, tokens, index, mask_token_id=own.config.mask_token_id, draws=16)
    return float(nats.mean()) / (math.log(2) * tokens.shape[1])


@pytest.mark.trainings
@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "num_groups"), [("bert", 2), ("adaln", 3)])
def test_a_model_of_groups_trains_resumes_generates_edits_and_is_measured(
    backbone, num_groups, tokenizer, tiny_shards, tmp_path
):
    def made():
        torch.manual_seed(0)
        decoding = DecodingConfig(num_steps=4, guidance={"name": "linear", "scale": 1.0}, top_k=20)
        config = network(backbone, num_groups)
        return masked_model(config, tokenizer, decoding=decoding, rate=LearningRate(1e-2), ema_decay=0.9)

    module = made()
    straight = fit(module, data(tiny_shards), steps=40, folder=tmp_path / "a")
    first = fit(made(), data(tiny_shards), steps=3, folder=tmp_path / "b")
    resume = newest_checkpoint(tmp_path / "b")
    second = fit(made(), data(tiny_shards), steps=40, folder=tmp_path / "b", resume=resume)
    assert first.losses + second.losses == straight.losses
    losses = [float.fromhex(loss) for loss in straight.losses]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    module.export(tmp_path, class_names=("a", "b", "c"))
    pipe = MaskGIT.from_pretrained(tmp_path)
    assert pipe.transformer.network.config.num_token_groups == num_groups
    images = pipe.generate([0, 1, 2], seed=0)
    assert [image.size for image in images] == [(8, 8)] * 3
    (edited,) = pipe.inpaint(images[0], LEFT_HALF, classes=[1], seed=0, num_steps=2)
    assert edited.size == (8, 8)
    if backbone == "bert":
        assert len(pipe.generate([0, 1], seed=0, token_selector="p2")) == 2
    pixels = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = load_tokenizer(tokenizer).network.encode(pixels)
    assert 0 < bits_per_token(pipe, tokens) < 3 * math.log2(64)


@pytest.mark.slow
def test_the_baseline_of_groups_trains_and_generates(tokenizer, tiny_shards, tmp_path):
    config = network("bert", 2, attention="causal")
    module = autoregressive_model(config, tokenizer, decoding=AutoregressiveDecoding("constant"))
    fit(module, data(tiny_shards), steps=2, folder=tmp_path / "checkpoints")
    module.export(tmp_path, class_names=("a", "b", "c"))
    images = MaskGIT.from_pretrained(tmp_path).generate([0, 1], seed=0)
    assert [image.size for image in images] == [(8, 8)] * 2
