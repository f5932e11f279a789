"""The graphs that are exported: network calls with fixed shapes except for the batch, and their random inputs.

Shapes: B images, N tokens, K codes, C channels, H W pixels, D size of a conditioning vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgit_pl.image_format import height_width
from maskgit_pl.networks.backbone import Backbone, BackboneConfig
from maskgit_pl.pretrained import PretrainedTokenizer, PretrainedTransformer

__all__ = ["Graph", "graphs_of"]

_MASKED = 0.5  # fraction of masked tokens in random inputs


@dataclass(frozen=True)
class Graph:
    """A network call that becomes a file.

    Args:
        name: Name of the file without its suffix.
        part: Registered part that decides whether it can be exported, such as ``quantizer 'ema'``, for errors.
        module: The call, in evaluation mode on the CPU.
        output: Name of its output.
        draw: Draws random inputs (B, ...) by name, in the order of the arguments, for a batch size B.
        tolerance: Largest difference to the module that is accepted; see ``difference``.
        is_optional: True if the graph is left out, with a warning, when it cannot be exported. Images are generated
            without it.
    """

    name: str
    part: str
    module: nn.Module
    output: str
    draw: Callable[[int, torch.Generator], Mapping[str, Tensor]]
    tolerance: float
    is_optional: bool = False

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """Returns how far a result is from ours: the largest absolute difference, or the fraction of other tokens.

        Args:
            ours: Output of ``module``.
            theirs: Output of the exported file, of the same shape.

        Raises:
            ValueError: if shape or dtype differ.
        """
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{self.name}: the output must be {ours.dtype} {tuple(ours.shape)}, got {theirs.dtype} "
                f"{tuple(theirs.shape)}"
            )
        if ours.is_floating_point():
            return (ours - theirs).abs().max().item()
        return (ours != theirs).float().mean().item()


class _TokenDecoder(nn.Module):
    """Decodes tokens (B, N) int64 to images (B, C, H, W) float32 in [0, 255], clipped and not rounded."""

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        super().__init__()
        self.network, self.grid = tokenizer.network, tokenizer.grid
        self.height, self.width = height_width(tokenizer.image_size)

    def forward(self, tokens: Tensor) -> Tensor:
        images = self.network.decode(tokens, self.grid)[..., : self.height, : self.width]
        return images.clamp(0, 1) * 255


class _ImageEncoder(nn.Module):
    """Encodes images (B, C, H, W) float32 in [0, 255] to tokens (B, N) int64."""

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        super().__init__()
        self.network = tokenizer.network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.encode(images / 255)


class _Logits(nn.Module):
    """Computes the logits (B, N, K) float32 of tokens (B, N) and labels (B,) int64, and of vectors (B, D) if any."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, labels: Tensor, vectors: Tensor | None = None) -> Tensor:
        logits: Tensor = self.network(tokens, labels, vectors=vectors)
        return logits


def graphs_of(tokenizer: PretrainedTokenizer, transformer: PretrainedTransformer) -> list[Graph]:
    """Returns the graphs of a model: ``tokenizer-decoder``, ``tokenizer-encoder`` and ``transformer``.

    Args:
        tokenizer: Tokenizer on the CPU.
        transformer: Transformer on the CPU, with weights that are not packed.
    """
    sizes, config = tokenizer.network.config, transformer.network.config
    spec = sizes.quantizer if isinstance(sizes.quantizer, str) else sizes.quantizer["name"]
    shape = sizes.in_channels, *height_width(tokenizer.image_size)
    num_tokens = tokenizer.grid[0] * tokenizer.grid[1]

    def draw_tokens(batch: int, chance: torch.Generator) -> dict[str, Tensor]:
        return {"tokens": torch.randint(sizes.codebook_size, (batch, num_tokens), generator=chance)}

    def draw_images(batch: int, chance: torch.Generator) -> dict[str, Tensor]:
        return {"images": torch.rand(batch, *shape, generator=chance) * 255}

    return [
        Graph("tokenizer-decoder", f"quantizer {spec!r}", _TokenDecoder(tokenizer).eval(), "images", draw_tokens, 0.25),
        Graph(
            "tokenizer-encoder",
            f"encoder of quantizer {spec!r}",
            _ImageEncoder(tokenizer).eval(),
            "tokens",
            draw_images,
            0.01,
            is_optional=True,
        ),
        Graph(
            "transformer",
            f"backbone {config.backbone!r}",
            _Logits(transformer.network).eval(),
            "logits",
            lambda batch, chance: _draw_partly_masked(config, batch, chance),
            1e-3,
        ),
    ]


def _draw_partly_masked(config: BackboneConfig, batch: int, chance: torch.Generator) -> dict[str, Tensor]:
    """Draws the inputs of a transformer. Half of the tokens are masked, except with causal attention."""
    tokens = torch.randint(config.codebook_size, (batch, config.num_tokens), generator=chance)
    if config.attention == "bidirectional":
        is_masked = torch.rand(tokens.shape, generator=chance) < _MASKED
        tokens = tokens.masked_fill(is_masked, config.mask_token_id)
    num_labels = config.num_classes + (config.null_label is not None)
    inputs = {"tokens": tokens, "labels": torch.randint(num_labels, (batch,), generator=chance)}
    if config.condition_dim:
        inputs["vectors"] = torch.randn(batch, config.condition_dim, generator=chance)
    return inputs
