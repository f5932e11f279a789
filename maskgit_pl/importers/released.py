"""Checkpoints of the released MaskGIT code (JAX) as pretrained folders. Used by ``maskgit import-jax``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from maskgit_pl.data.folders import write_folder
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.class_names import choose_class_names
from maskgit_pl.importers.files import check_flax_file, check_out
from maskgit_pl.importers.flax import read_flax
from maskgit_pl.importers.next_commands import training_commands
from maskgit_pl.importers.released_weights import (
    parameters,
    tokenizer_config,
    tokenizer_weights,
    transformer_config,
    transformer_weights,
)
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import fingerprint, save_tokenizer, save_transformer

__all__ = ["import_jax"]

log = logging.getLogger(__name__)

_TOKENIZER_SIZE = 256  # px, without a transformer: the smaller of the two released sizes
_STEPS, _STEPS_OF_LARGE_GRIDS, _LARGE_GRID = 8, 12, 32  # paper, tables 1 and 2: 8 steps at 256 px, 12 at 512 px
_CHOICE_TEMPERATURE = 4.5


def import_jax(
    tokenizer: Path,
    out: Path,
    *,
    transformer: Path | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a pretrained folder from released checkpoints; it appears when all parts are complete.

    1. Check the first bytes of the files, and that ``out`` is new.
    2. Read the arrays, infer sizes from their shapes, and convert them to our names and layouts.
    3. Write the folder, then log its sizes.

    Args:
        tokenizer: Checkpoint such as ``tokenizer_imagenet256_checkpoint``.
        out: Folder to make.
        transformer: Checkpoint such as ``maskgit_imagenet256_checkpoint``, trained on this tokenizer's tokens.
        image_size: Side of the images in pixels. Default: the size that follows from the transformer's grid; 256
            without a transformer.
        class_names: Name of each class. Default: ImageNet's names for 1000 classes, otherwise numbers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is of another kind, damaged, or not of this size, parts do not belong together, or the
            number of names is wrong.
        FileExistsError: if ``out`` exists.
    """
    # 1.
    check_out(out)
    for path in (tokenizer, transformer):
        if path is not None:
            check_flax_file(path)
    if transformer is None and class_names is not None:
        raise ValueError("class names must come with a transformer, which has the classes; add --transformer")
    # 2. and 3.
    vqgan, vqgan_weights = _read_tokenizer(tokenizer)
    if transformer is None:
        _write_tokenizer(out, vqgan, vqgan_weights, _TOKENIZER_SIZE if image_size is None else image_size)
        return
    config, weights = _read_transformer(transformer, vqgan)
    size = _image_size(config, vqgan, image_size)
    names = choose_class_names(class_names, config.num_classes)
    with write_folder(out, name="--out", check=check_out) as fresh:
        save_tokenizer(fresh / "tokenizer", vqgan, vqgan_weights, image_size=size)
        save_transformer(
            fresh / "transformer",
            config,
            weights,
            mask_schedule="cosine",
            decoding=_decoding(config),
            class_names=names,
            tokenizer_fingerprint=fingerprint(fresh / "tokenizer"),
        )
    _report_tokenizer(vqgan, vqgan_weights, size)
    _report_transformer(config, weights, names)
    log.info("%s: written; next: maskgit sample %s --classes 0,%d", out, out, config.num_classes - 1)


@contextmanager
def _name_file(path: Path) -> Iterator[None]:
    """Adds the name of the file to each ValueError that has none."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def _read_tokenizer(path: Path) -> tuple[VQGANConfig, dict[str, Tensor]]:
    with _name_file(path):
        arrays = parameters(read_flax(path))
        config = tokenizer_config(arrays)
        return config, tokenizer_weights(arrays, config)


def _read_transformer(path: Path, vqgan: VQGANConfig) -> tuple[TransformerConfig, dict[str, Tensor]]:
    with _name_file(path):
        arrays = parameters(read_flax(path))
        config = transformer_config(arrays, codebook_size=vqgan.codebook_size)
        return config, transformer_weights(arrays, config)


def _image_size(config: TransformerConfig, vqgan: VQGANConfig, wanted: int | None) -> int:
    """Returns the side of the images in pixels, which follows from the transformer's grid."""
    size = config.grid[0] * vqgan.downsampling_factor  # released grids are square
    if wanted is not None and wanted != size:
        raise ValueError(
            f"--image-size must be {size}, for {config.grid[0]} x {config.grid[1]} tokens of this transformer, got "
            f"{wanted}; leave --image-size out, or name the checkpoints of {wanted} px"
        )
    return size


def _decoding(config: TransformerConfig) -> DecodingConfig:
    """Returns the paper's decoding; released transformers have no null class, so there is no guidance."""
    return DecodingConfig(
        num_steps=_STEPS_OF_LARGE_GRIDS if config.grid[0] >= _LARGE_GRID else _STEPS,
        token_selector={"name": "confidence", "choice_temperature": _CHOICE_TEMPERATURE},
        guidance={"name": "constant", "scale": 0.0},
        draw_method="gumbel",
    )


def _write_tokenizer(out: Path, config: VQGANConfig, weights: Mapping[str, Tensor], size: int) -> None:
    """Writes a folder with a tokenizer only."""
    config.grid(size)  # raises for a size that is not positive
    with write_folder(out, name="--out", check=check_out) as fresh:
        save_tokenizer(fresh / "tokenizer", config, weights, image_size=size)
    _report_tokenizer(config, weights, size)
    log.info("%s: written; next: %s; then: %s", out, *training_commands(config, out / "tokenizer", size))


def _report_tokenizer(config: VQGANConfig, weights: Mapping[str, Tensor], size: int) -> None:
    log.info(
        "tokenizer: %s parameters; %d codes; images of %d x %d px are %d x %d tokens",
        f"{_count_numbers(weights):,}", config.codebook_size, size, size, *config.grid(size),
    )  # fmt: skip


def _report_transformer(config: TransformerConfig, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    log.info(
        "transformer: %s parameters; %d blocks of size %d; %d classes, %r to %r",
        f"{_count_numbers(weights):,}", config.depth, config.embed_dim, config.num_classes, names[0], names[-1],
    )  # fmt: skip


def _count_numbers(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())
