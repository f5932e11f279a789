"""The layout of Halton-MaskGIT's class-to-image transformer. Used by ``importers.transformers``.

Our ``adaln`` backbone has norms without weights, since the modulation that follows scales and shifts anyway. Their
weights are folded into it: w x (1 + s) + t = x (1 + s') + t with s' = w s + w - 1, and s is linear in the condition.

Source: arXiv:2503.17076; valeoai/Halton-MaskGIT, ``Network/transformer.py``, ``Trainer/cls_trainer.py``, README.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.layouts import TransformerLayout, count_numbers, find_num_heads, shape_of
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.networks.backbone import BackboneConfig

__all__ = ["HALTON"]


@dataclass(frozen=True)
class _Published:
    """A published network.

    Attributes:
        num_heads: Number of attention heads.
        guidance_scale: Guidance scale of its FID in the README; None for a size without published weights.
    """

    num_heads: int
    guidance_scale: float | None


_PUBLISHED = {  # (D, blocks): tiny, small, base, large, xlarge of Trainer/abstract_trainer.py; scales of the README
    (384, 6): _Published(6, 1.5),
    (512, 12): _Published(6, 1.0),
    (768, 12): _Published(12, 0.7),
    (1024, 24): _Published(16, 0.5),
    (1152, 28): _Published(16, None),
}
_STEPS = 32  # README, all published figures
_EXAMPLE_SCALE = 2.0  # README, example; for networks without a published figure
_DROPOUT, _CLASS_DROPOUT = 0.1, 0.1  # Config/base_cls2img.yaml: dropout, drop_label
_BLOCKS = "transformer.layers."


def _read_config(tensors: Mapping[str, Tensor], grid: tuple[int, int], num_heads: int | None) -> AdaLNConfig:
    """Reads the sizes of the network off the shapes; the grid is that of the position table, not of the tokenizer."""
    if "in_proj.weight" in tensors:
        raise ValueError(
            "the network must read one token per position, got one that joins 2 x 2 tokens (tensor in_proj.weight, "
            "option proj 2), which is not supported; none of the published networks does"
        )
    rows, embed_dim = shape_of(tensors, "tok_emb.weight")
    num_tokens = shape_of(tensors, "pos_emb.weight")[0]
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise ValueError(f"tensor pos_emb.weight must have a square number of rows, got {num_tokens}")
    depth = count_numbers(tensors, _BLOCKS)
    inner, _ = shape_of(tensors, f"{_BLOCKS}0.attn.wq.weight")
    published = _PUBLISHED.get((embed_dim, depth))
    known = None if published is None else published.num_heads
    heads = find_num_heads(num_heads, known, embed_dim=embed_dim, depth=depth)
    # Their heads have the size D // heads, so that "small" has 6 heads of size 85 for D = 512.
    if heads > embed_dim or heads * (embed_dim // heads) != inner:
        raise ValueError(
            f"--num-heads must fit the {inner} rows of tensor {_BLOCKS}0.attn.wq.weight, {embed_dim} // heads for each "
            f"head, got {heads}"
        )
    return AdaLNConfig(
        codebook_size=rows - 1,
        num_classes=shape_of(tensors, "cls_emb.weight")[0] - 1,
        grid=(side, side),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=heads,
        attention_dim=None if inner == embed_dim else inner,
        mlp_dim=shape_of(tensors, f"{_BLOCKS}0.ff.w1.weight")[0],
        num_registers=shape_of(tensors, "reg_tokens.weight")[0] if "reg_tokens.weight" in tensors else 0,
        dropout=_DROPOUT,
        class_dropout=_CLASS_DROPOUT,
    )


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of their network; the head's table is the token embedding."""
    assert isinstance(config, AdaLNConfig)
    dim, hidden, inner = config.embed_dim, config.mlp_dim, config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "cls_emb.weight": (config.num_classes + 1, dim),
        "tok_emb.weight": (config.codebook_size + 1, dim),
        "pos_emb.weight": (config.num_tokens, dim),
        "last_norm.norm_final.weight": (dim,),
        "last_norm.norm_final.bias": (dim,),
        "last_norm.mlp.1.weight": (2 * dim, dim),
        "last_norm.mlp.1.bias": (2 * dim,),
        "head.bias": (config.codebook_size + 1,),
    }
    if config.num_registers:
        shapes["reg_tokens.weight"] = (config.num_registers, dim)
    for number in range(config.depth):
        block = f"{_BLOCKS}{number}"
        shapes |= {
            f"{block}.mlp.1.weight": (6 * dim, dim),
            f"{block}.mlp.1.bias": (6 * dim,),
            f"{block}.ln1.weight": (dim,),
            f"{block}.ln2.weight": (dim,),
            f"{block}.attn.wo.weight": (dim, inner),
            f"{block}.ff.w1.weight": (hidden, dim),
            f"{block}.ff.w2.weight": (dim, hidden),
            f"{block}.ff.w3.weight": (hidden, dim),
            **{f"{block}.attn.{name}.weight": (inner, dim) for name in ("wq", "wk", "wv")},
        }
    return shapes


def _read_weights(tensors: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """Converts their tensors to the state dict of ``AdaLNTransformer``, float32."""
    assert isinstance(config, AdaLNConfig)
    theirs = {name: tensor.float() for name, tensor in tensors.items()}
    weights = {
        "token_embedding.weight": theirs["tok_emb.weight"],
        "class_embedding.weight": theirs["cls_emb.weight"],
        "position_embedding.weight": theirs["pos_emb.weight"],
        "head_bias": theirs["head.bias"],
        **_modulation("head_modulation", theirs, "last_norm.mlp.1", ("last_norm.norm_final",)),
    }
    if config.num_registers:
        weights["register_embedding.weight"] = theirs["reg_tokens.weight"]
    for number in range(config.depth):
        weights |= _block_weights(theirs, f"{_BLOCKS}{number}", f"blocks.{number}")
    return weights


def _block_weights(theirs: Mapping[str, Tensor], block: str, ours: str) -> dict[str, Tensor]:
    """Returns the weights of a block, by our names."""

    def join(*names: str) -> Tensor:
        return torch.cat([theirs[f"{block}.{name}.weight"] for name in names])

    return {
        f"{ours}.query.weight": theirs[f"{block}.attn.wq.weight"],
        f"{ours}.key_value.weight": join("attn.wk", "attn.wv"),
        f"{ours}.proj.weight": theirs[f"{block}.attn.wo.weight"],
        f"{ours}.fc1.weight": join("ff.w1", "ff.w3"),
        f"{ours}.fc2.weight": theirs[f"{block}.ff.w2.weight"],
        **_modulation(f"{ours}.modulation", theirs, f"{block}.mlp.1", (f"{block}.ln1", f"{block}.ln2")),
    }


def _modulation(ours: str, theirs: Mapping[str, Tensor], layer: str, norms: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns a linear layer that gives shift, scale and perhaps gate of each norm, the norms' weights folded into it.

    With the norm w x + b and their shift t and scale s, (w x + b) (1 + s) + t = x (1 + s') + t', where
    1 + s' = w (1 + s) and t' = t + b (1 + s).

    Args:
        ours: Our name of the layer.
        theirs: Their tensors.
        layer: Their name of the layer. Its rows are shift, scale and, in blocks, gate of each norm.
        norms: Their names of the norms, in the order of the rows.
    """
    # Parts (norms, shift / scale / gate, D, D + 1): the last column is the bias.
    dim = theirs[f"{layer}.weight"].shape[1]
    rows = torch.cat([theirs[f"{layer}.weight"], theirs[f"{layer}.bias"].unsqueeze(1)], dim=1)
    parts = rearrange(rows, "(norms parts d) columns -> norms parts d columns", norms=len(norms), d=dim).clone()
    for shift_scale_gate, norm in zip(parts, norms, strict=True):
        gain = theirs[f"{norm}.weight"].unsqueeze(1)
        one_and_scale = shift_scale_gate[1].clone()
        one_and_scale[:, -1] += 1
        shift_scale_gate[1] = one_and_scale * gain
        shift_scale_gate[1, :, -1] -= 1
        if f"{norm}.bias" in theirs:
            shift_scale_gate[0] += one_and_scale * theirs[f"{norm}.bias"].unsqueeze(1)
    folded = parts.flatten(0, 2)
    return {f"{ours}.weight": folded[:, :-1].contiguous(), f"{ours}.bias": folded[:, -1].contiguous()}


def _decoding(config: BackboneConfig) -> DecodingConfig:
    """Returns the decoding of the README's figures; small grids have fewer steps than tokens."""
    assert isinstance(config, AdaLNConfig)
    published = _PUBLISHED.get((config.embed_dim, config.depth))
    scale = None if published is None else published.guidance_scale
    num_steps = min(_STEPS, config.num_tokens)
    return DecodingConfig(
        num_steps=num_steps,
        token_selector="halton",
        guidance={"name": "constant", "scale": _EXAMPLE_SCALE if scale is None else scale},
        tokens_per_step=_tokens_per_step(num_steps, config.num_tokens),
        draw_method="gumbel",
    )


def _tokens_per_step(num_steps: int, num_tokens: int) -> tuple[int, ...]:
    """Computes the number of tokens that each step decides: floor(N (1 - 2 / pi arccos(t / T))) after t steps.

    It is the schedule ``arccos`` but for rounding: at least t tokens are decided after t steps.

    Args:
        num_steps: T.
        num_tokens: N.

    Returns:
        T integers >= 1 that sum to N.

    Source: Sampler/halton_sampler.py, in float32 as there: for N = 576 and T = 32, 191 tokens after 16 steps, not 192.
    """
    steps = range(1, num_steps + 1)
    left = torch.tensor([step / num_steps for step in steps]).acos() / (math.pi / 2)
    decided = [0, *(max(step, int(ratio)) for step, ratio in zip(steps, (1 - left) * num_tokens, strict=True))]
    return tuple(after - before for before, after in pairwise(decided))


HALTON = TransformerLayout(
    name="Halton-MaskGIT",
    markers=("cls_emb.weight", "last_norm.mlp.1.weight"),
    tied=("head.weight", "tok_emb.weight"),
    read_config=_read_config,
    shapes=_shapes,
    read_weights=_read_weights,
    decoding=_decoding,
)
