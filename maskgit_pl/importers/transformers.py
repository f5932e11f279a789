"""Imports transformers of Halton-MaskGIT as pretrained folders. Used by ``maskgit import-transformer``.

They are our ``adaln`` backbone. A table has the names of the tensors, whose shapes tell all sizes except the number of
attention heads.

Source: Halton-MaskGIT, arXiv:2503.17076; valeoai/Halton-MaskGIT, ``Network/transformer.py``, ``Config``,
README, ``Trainer/cls_trainer.py`` and ``Trainer/abstract_trainer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.checkpoints import check_weights, name_file, name_some, read_checkpoint, select_tensors
from maskgit_pl.importers.conversion import (
    Imported,
    ImportedTransformer,
    Rule,
    check_out,
    choose_class_names,
    convert,
    count_numbers,
    number_rules,
    shape_of,
    shapes_of,
    write_import,
)
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.pretrained.networks import load_tokenizer

_MASK_SCHEDULE = "arccos"  # default of --sched-mode in main.py, and of get_mask_code in training
_STEPS = 32  # README, all figures
_DROPOUT, _CLASS_DROPOUT = 0.1, 0.1  # configurations of the training
# (D, blocks) -> attention heads: tiny, small, base, large, xlarge; guidance scale of its FID.
_HEADS = {(384, 6): 6, (512, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
_SCALES = {(384, 6): 1.5, (512, 12): 1.0, (768, 12): 0.7, (1024, 24): 0.5}
_SCALE = 2.0  # of the example in its README; for networks without a published figure
_MARKS = ("cls_emb.weight", "last_norm.mlp.1.weight")  # tensors that tell this project from others
_COPY = "head.weight"  # a second name of tok_emb.weight


def import_transformer(
    file: Path,
    out: Path,
    *,
    tokenizer: Path,
    num_heads: int | None = None,
) -> Imported:
    """Writes a pretrained folder from a checkpoint of a transformer and its tokenizer.

    1. Check that ``out`` is new, and open the file and the tokenizer.
    2. Find the project by the names, and read the sizes off the shapes.
    3. Build the network without memory, check names, shapes and numbers, and convert them.
    4. Check that the tokenizer belongs to it, and write both.

    Args:
        file: A ``.pth``, ``.pt`` or ``.safetensors`` file of a transformer of Halton-MaskGIT.
        out: Pretrained folder to make.
        tokenizer: Folder of its tokenizer, or a pretrained folder that holds one, as ``import_tokenizer`` writes it.
        num_heads: Number of attention heads; by default that of the published network of this size.
    """
    # 1.
    check_out(out)
    if num_heads is not None:
        check_integer("num_heads", num_heads, "[1, inf)")
    contents = read_checkpoint(file)
    source = load_tokenizer(tokenizer / "tokenizer" if (tokenizer / "tokenizer").is_dir() else tokenizer)
    with name_file(file):
        # 2.
        tensors = select_tensors(contents, (_COPY,))
        if not all(mark in tensors for mark in _MARKS):
            raise ValueError(
                f"it must be a transformer of Halton-MaskGIT, got something else ({name_some(tensors)}); import a "
                "tokenizer with maskgit import-tokenizer"
            )
        check_weights(tensors, file.stat().st_size)
        config = read_config(tensors, num_heads)
        # 3.
        weights = convert_weights(tensors, config)
    # 4.
    vqgan = source.network.config
    if vqgan.codebook_size != config.codebook_size:
        raise ValueError(
            f"tokenizer {tokenizer} must have the {config.codebook_size} codes of the transformer, got "
            f"{vqgan.codebook_size}; name the folder of its own tokenizer"
        )
    image_size = source.image_size
    if config.grid != source.grid:
        image_size = config.grid[0] * vqgan.downsampling_factor  # the grid of a table of positions is square
    names, decoding = choose_class_names(config.num_classes), published_decoding(config)
    transformer = ImportedTransformer(config, weights, _MASK_SCHEDULE, decoding, names)
    state = source.network.state_dict()
    return write_import(Imported(out, "Halton-MaskGIT", vqgan, state, image_size, transformer))


_RULES = (
    Rule("token_embedding.weight", "tok_emb.weight"),
    Rule("class_embedding.weight", "cls_emb.weight"),
    Rule("position_embedding.weight", "pos_emb.weight"),
    Rule("register_embedding.weight", "reg_tokens.weight"),
    Rule("blocks.{}.query.weight", "transformer.layers.{}.attn.wq.weight"),
    Rule("blocks.{}.key_value.weight", "transformer.layers.{}.attn.wk.weight transformer.layers.{}.attn.wv.weight"),
    Rule("blocks.{}.proj.weight", "transformer.layers.{}.attn.wo.weight"),
    Rule("blocks.{}.fc1.weight", "transformer.layers.{}.ff.w1.weight transformer.layers.{}.ff.w3.weight"),
    Rule("blocks.{}.fc2.weight", "transformer.layers.{}.ff.w2.weight"),
    Rule("blocks.{}.modulation.weight", "transformer.layers.{}.mlp.1.weight"),
    Rule("blocks.{}.modulation.bias", "transformer.layers.{}.mlp.1.bias"),
    Rule("blocks.{}.norm1.weight", "transformer.layers.{}.ln1.weight"),
    Rule("blocks.{}.norm2.weight", "transformer.layers.{}.ln2.weight"),
    Rule("head_modulation.weight", "last_norm.mlp.1.weight"),
    Rule("head_modulation.bias", "last_norm.mlp.1.bias"),
    Rule("norm.weight", "last_norm.norm_final.weight"),
    Rule("norm.bias", "last_norm.norm_final.bias"),
    Rule("head_bias", "head.bias"),
)


def read_config(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> AdaLNConfig:
    """Reads the sizes of the network off the shapes; the grid is that of the table of positions.

    Args:
        tensors: Tensors by their names in the file.
        num_heads: Number of attention heads, which no shape tells; None for that of the published network of this size.
    """
    rows, embed_dim = shape_of(tensors, "tok_emb.weight")
    side = math.isqrt(shape_of(tensors, "pos_emb.weight")[0])
    depth = count_numbers(tensors, "transformer.layers.")
    inner, _ = shape_of(tensors, "transformer.layers.0.attn.wq.weight")
    num_heads = num_heads or _HEADS.get((embed_dim, depth))
    if num_heads is None:
        raise ValueError(
            f"the number of attention heads must be given for a network of {depth} blocks of size {embed_dim}, as no "
            "tensor tells it and no published network has this size; add --num-heads"
        )
    return AdaLNConfig(
        codebook_size=rows - 1,
        num_classes=shape_of(tensors, "cls_emb.weight")[0] - 1,
        grid=(side, side),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        # Their heads have the size D // heads, so that "small" has 6 heads of size 85 for D = 512.
        attention_dim=None if inner == embed_dim else inner,
        mlp_dim=shape_of(tensors, "transformer.layers.0.ff.w1.weight")[0],
        num_registers=shape_of(tensors, "reg_tokens.weight")[0] if "reg_tokens.weight" in tensors else 0,
        dropout=_DROPOUT,
        class_dropout=_CLASS_DROPOUT,
    )


def convert_weights(tensors: Mapping[str, Tensor], config: AdaLNConfig) -> dict[str, Tensor]:
    """Converts the tensors to the state dict of our ``AdaLNTransformer`` of these sizes, float32.

    The norms of our ``adaln`` backbone have no weights, so that the modulations take them.
    """
    rules = number_rules(_RULES, config.depth)
    norms = {rule.ours: (config.embed_dim,) for rule in rules if "norm" in rule.ours}
    weights = convert(tensors, rules, shapes_of(config.create) | norms)
    weights |= _fold(weights, "head_modulation", [weights.pop("norm.weight")], weights.pop("norm.bias"))
    for block in range(config.depth):
        gains = [weights.pop(f"blocks.{block}.norm{number}.weight") for number in (1, 2)]
        weights |= _fold(weights, f"blocks.{block}.modulation", gains)
    return weights


def _fold(
    weights: Mapping[str, Tensor], layer: str, gains: Sequence[Tensor], bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Returns a linear layer that gives shift, scale and perhaps gate of each norm, the norms' weights folded into it.

    With the norm w x + b and their shift t and scale s, (w x + b) (1 + s) + t = x (1 + s') + t', where
    1 + s' = w (1 + s) and t' = t + b (1 + s). Both are linear in the condition.

    Args:
        weights: Tensors by our names.
        layer: Our name of the layer. Its rows are shift, scale and, in blocks, gate of each norm.
        gains: w of each norm, in the order of the rows.
        bias: b of the norms, if they have one.
    """
    # Parts (norms, shift / scale / gate, D, D + 1): the last column is the bias.
    dim = weights[f"{layer}.weight"].shape[1]
    rows = torch.cat([weights[f"{layer}.weight"], weights[f"{layer}.bias"].unsqueeze(1)], dim=1)
    parts = rearrange(rows, "(norms parts d) columns -> norms parts d columns", norms=len(gains), d=dim).clone()
    for shift_scale_gate, gain in zip(parts, gains, strict=True):
        one_and_scale = shift_scale_gate[1].clone()
        one_and_scale[:, -1] += 1
        shift_scale_gate[1] = one_and_scale * gain.unsqueeze(1)
        shift_scale_gate[1, :, -1] -= 1
        if bias is not None:
            shift_scale_gate[0] += one_and_scale * bias.unsqueeze(1)
    folded = parts.flatten(0, 2)
    return {f"{layer}.weight": folded[:, :-1].contiguous(), f"{layer}.bias": folded[:, -1].contiguous()}


def published_decoding(config: AdaLNConfig) -> DecodingConfig:
    """Returns the decoding of the README's figures; small grids have fewer steps than tokens."""
    num_steps = min(_STEPS, config.num_tokens)
    scale = _SCALES.get((config.embed_dim, config.depth), _SCALE)
    return DecodingConfig(
        num_steps=num_steps,
        token_selector="halton",
        guidance={"name": "constant", "scale": scale},
        tokens_per_step=_count_tokens(num_steps, config.num_tokens),
    )


def _count_tokens(num_steps: int, num_tokens: int) -> tuple[int, ...]:
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
