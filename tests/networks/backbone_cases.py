"""Small configurations of every registered backbone, with its options, for the contract tests."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgit_pl.networks.backbone import Backbone, BackboneConfig, backbones, build_config
from maskgit_pl.pretrained.networks import fingerprint, load_transformer, save_transformer

SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_dim": 48}
OPTIONS: dict[str, list[dict[str, Any]]] = {  # of backbones that have options; the first one is always the default
    "bert": [{"class_dropout": 0.0}, {"num_token_groups": 2}],
    "adaln": [
        {"class_dropout": 0.0, "num_registers": 0},
        {"condition_dim": 6},
        {"condition_dim": 6, "class_dropout": 0.0},
        {"num_token_groups": 4},
    ],
}


def small_config(name: str, **options: Any) -> BackboneConfig:
    """Builds a small configuration of a backbone: 16 codes, 3 classes, 3 x 4 tokens, no dropout."""
    known = {each.name for each in fields(backbones.factory(name))}  # type: ignore[arg-type]  # every backbone is a dataclass
    sizes = {key: value for key, value in SIZES.items() if key in known}
    values = {"codebook_size": 16, "num_classes": 3, "grid": [3, 4], "dropout": 0.0, **sizes, **options}
    return build_config({"backbone": name, **values}, "test")


def save_model_of_vectors(pretrained: Path, folder: Path, *, dim: int) -> Path:
    """Saves the tokenizer of a pretrained folder with a random transformer that takes a vector for each image."""
    plain = load_transformer(pretrained / "transformer")
    shutil.copytree(pretrained / "tokenizer", folder / "tokenizer")
    config = small_config("adaln", grid=[4, 4], condition_dim=dim)
    save_transformer(
        folder / "transformer", config, create(config).state_dict(), mask_schedule="cosine", decoding=plain.decoding,
        class_names=plain.class_names, tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
    )  # fmt: skip
    return folder


def all_configs() -> list[Any]:
    """Returns the cases of a test over all backbones and options: a name for pytest and the configuration."""
    return [
        pytest.param(small_config(name, **options), id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
        for name in backbones.names()
        for options in ({}, *OPTIONS.get(name, []))
    ]


def create(config: BackboneConfig, *, seed: int = 0) -> Backbone:
    """Creates a network in evaluation mode whose weights are all random, also those that start as zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = config.create().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def inputs(config: BackboneConfig, batch: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns tokens (B, N), of which some are masked, labels (B,), the mask (B, N), and vectors (B, C) or None."""
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.codebook_size, (batch, config.num_tokens), generator=chance)
    mask = torch.rand(batch, config.num_tokens, generator=chance) < 0.6
    labels = torch.arange(batch) % config.num_classes
    vectors = torch.randn(batch, config.condition_dim, generator=chance) if config.condition_dim else None
    return tokens.masked_fill(mask, config.mask_token_id), labels, mask, vectors
