"""The layout of MaskGIL's class-to-image transformer. Used by ``importers.transformers``.

Source: arXiv:2507.13032; synbol/MaskGIL, ``Network/gpt.py``, ``Trainer/vit.py``, ``FID_sample.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.layouts import TransformerLayout, count_numbers, find_num_heads, shape_of
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.networks.backbone import BackboneConfig

__all__ = ["MASKGIL"]

_NUM_HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1536, 48): 24}  # (D, blocks): B, L, XL, XXL of gpt.py
_STEPS, _SCALE, _CHOICE_TEMPERATURE = 32, 4.0, 4.5  # FID_sample.py: inference_iters, cfg_scale, r_temp
_DROPOUT, _CLASS_DROPOUT = 0.1, 0.1  # gpt.py: resid_dropout_p and ffn_dropout_p; main.py: drop-label
_BLOCKS = "layers."


def _read_config(tensors: Mapping[str, Tensor], grid: tuple[int, int], num_heads: int | None) -> AdaLNConfig:
    """Reads the sizes of the network off the shapes. It has no table of positions: the grid is the tokenizer's."""
    vocabulary, embed_dim = shape_of(tensors, "tok_emb.weight")
    codebook_size = shape_of(tensors, "output.weight")[0] - 1
    # Rows of their table: codes, the mask token, classes, no class.
    num_classes = vocabulary - (codebook_size + 1) - 1
    if num_classes < 1:
        raise ValueError(
            f"tensor tok_emb.weight must have rows for {codebook_size} codes, the mask token, classes, and no class, "
            f"got {vocabulary}"
        )
    depth = count_numbers(tensors, _BLOCKS)
    return AdaLNConfig(
        codebook_size=codebook_size,
        num_classes=num_classes,
        grid=grid,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=find_num_heads(num_heads, _NUM_HEADS.get((embed_dim, depth)), embed_dim=embed_dim, depth=depth),
        mlp_dim=shape_of(tensors, f"{_BLOCKS}0.feed_forward.w1.weight")[0],
        num_registers=0,
        positions="rotary-raster",
        conditioning="token",
        qk_norm=False,
        tied_head=False,
        dropout=_DROPOUT,
        class_dropout=_CLASS_DROPOUT,
    )


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of their network."""
    assert isinstance(config, AdaLNConfig)
    dim, hidden, codes = config.embed_dim, config.mlp_dim, config.codebook_size
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (codes + 1 + config.num_classes + 1, dim),
        "norm.weight": (dim,),
        "output.weight": (codes + 1, dim),
    }
    for number in range(config.depth):
        block = f"{_BLOCKS}{number}"
        shapes |= {
            f"{block}.attention.wqkv.weight": (3 * dim, dim),
            f"{block}.attention.wo.weight": (dim, dim),
            f"{block}.feed_forward.w1.weight": (hidden, dim),
            f"{block}.feed_forward.w2.weight": (dim, hidden),
            f"{block}.feed_forward.w3.weight": (hidden, dim),
            f"{block}.attention_norm.weight": (dim,),
            f"{block}.ffn_norm.weight": (dim,),
        }
    return shapes


def _read_weights(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """Converts their tensors to the state dict of ``AdaLNTransformer``, float32."""
    assert isinstance(config, AdaLNConfig)
    theirs = {name: tensor.float() for name, tensor in tensors.items()}
    codes_and_mask = config.codebook_size + 1
    weights = {
        "token_embedding.weight": theirs["tok_emb.weight"][:codes_and_mask].clone(),
        "class_embedding.weight": theirs["tok_emb.weight"][codes_and_mask:].clone(),
        "head_norm.weight": theirs["norm.weight"],
        "head_embedding.weight": theirs["output.weight"],
        "head_bias": theirs["output.weight"].new_zeros(codes_and_mask),  # their head has none
    }
    for number in range(config.depth):
        block, ours = f"{_BLOCKS}{number}", f"blocks.{number}"
        qkv, gate_value = theirs[f"{block}.attention.wqkv.weight"], ("w1", "w3")
        weights |= {
            f"{ours}.attention_norm.weight": theirs[f"{block}.attention_norm.weight"],
            f"{ours}.query.weight": qkv[: config.embed_dim].clone(),
            f"{ours}.key_value.weight": qkv[config.embed_dim :].clone(),
            f"{ours}.proj.weight": theirs[f"{block}.attention.wo.weight"],
            f"{ours}.mlp_norm.weight": theirs[f"{block}.ffn_norm.weight"],
            f"{ours}.fc1.weight": torch.cat([theirs[f"{block}.feed_forward.{name}.weight"] for name in gate_value]),
            f"{ours}.fc2.weight": theirs[f"{block}.feed_forward.w2.weight"],
        }
    return weights


def _decoding(config: BackboneConfig) -> DecodingConfig:
    """Returns the decoding of ``FID_sample.py``; small grids have fewer steps than tokens."""
    num_steps = min(_STEPS, config.num_tokens)
    return DecodingConfig(
        num_steps=num_steps,
        token_selector={"name": "confidence", "choice_temperature": _CHOICE_TEMPERATURE},
        guidance={"name": "linear", "scale": _SCALE},
        tokens_per_step=_tokens_per_step(num_steps, config.num_tokens),
        draw_method="gumbel",
    )


def _tokens_per_step(num_steps: int, num_tokens: int) -> tuple[int, ...] | None:
    """Computes the number of tokens that each step decides, proportional to arccos(1 - t / (T - 1)).

    The arccos is the share of a step, not the share of tokens that stay masked as in a mask schedule.

    Args:
        num_steps: T.
        num_tokens: N.

    Returns:
        T integers that sum to N; None if the last step would decide no token, for grids of few tokens.

    Source: ``adap_sche`` of FID_sample.py.
    """
    shares = [math.acos(1 - step / max(1, num_steps - 1)) for step in range(num_steps)]
    total = sum(shares) or 1.0
    counts = [max(1, round(num_tokens * share / total)) for share in shares]
    counts[-1] += num_tokens - sum(counts)
    return tuple(counts) if counts[-1] > 0 else None


MASKGIL = TransformerLayout(
    name="MaskGIL",
    markers=("tok_emb.weight", "output.weight", "layers.0.attention.wqkv.weight"),
    tied=None,
    read_config=_read_config,
    shapes=_shapes,
    read_weights=_read_weights,
    decoding=_decoding,
)
