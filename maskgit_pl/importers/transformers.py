"""Imports transformers of Halton-MaskGIT and MaskGIL as pretrained folders. Used by ``maskgit import-transformer``.

The names of the tensors tell the layouts apart, and their shapes tell the sizes. No file is executed: torch's loader
for tensors reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import ImageSize, check_integer, height_width
from maskgit_pl.data.folders import write_folder
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.files import check_out, choose_class_names
from maskgit_pl.importers.halton import HALTON
from maskgit_pl.importers.layouts import (
    TransformerLayout,
    check_shapes,
    name_file,
    name_some,
    read_checkpoint,
    remove_wrappers,
)
from maskgit_pl.importers.maskgil import MASKGIL
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.weights import check_held, check_tensor
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.pretrained import fingerprint, load_tokenizer, save_tokenizer, save_transformer

__all__ = ["ImportedTransformer", "import_transformer", "transformer_layout_of"]

_LAYOUTS = (HALTON, MASKGIL)
_WEIGHTS = ("model_state_dict", "state_dict", "model")  # entries that hold the tensors; both projects write the first
_MASK_SCHEDULE = "arccos"  # both projects: default of --sched-mode in main.py, and of get_mask_code in training


@dataclass(frozen=True)
class ImportedTransformer:
    """The network that was read, and where it is now.

    Attributes:
        folder: Pretrained folder with ``tokenizer/`` and ``transformer/``.
        layout: Name of the file's layout.
        config: Sizes of the network.
        num_parameters: Number of parameters.
        image_size: Side of the images in pixels, or (height, width).
        decoding: Decoding settings that were written.
        class_names: Name of each class.
        ignored: Other entries of the file.
    """

    folder: Path
    layout: str
    config: BackboneConfig
    num_parameters: int
    image_size: ImageSize
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    ignored: tuple[str, ...]

    def report(self) -> str:
        """Returns text for people: sizes, decoding settings, ignored entries, and the next command."""
        config, decoding, names = self.config, self.decoding, self.class_names
        (height, width), (rows, columns) = height_width(self.image_size), config.grid
        return "\n".join(
            [
                f"{self.folder}: {self.layout} layout, {self.num_parameters:,} parameters",
                f"  images    {height} x {width} -> {rows} x {columns} tokens of {config.codebook_size} codes",
                f"  network   {config.backbone}, {config.num_blocks} blocks",
                f"  classes   {config.num_classes}, {names[0]!r} to {names[-1]!r}",
                f"  decoding  {decoding.num_steps} steps, {_words(decoding.token_selector)}, guidance "
                f"{_words(decoding.guidance)}",
                f"  ignored   {name_some(self.ignored, limit=20) or 'nothing'}",
                f"next: maskgit sample {self.folder} --classes 0,{config.num_classes - 1}",
            ]
        )


def import_transformer(
    file: Path,
    out: Path,
    *,
    tokenizer: Path,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
) -> ImportedTransformer:
    """Writes a pretrained folder from a checkpoint of a transformer and its tokenizer.

    1. Check that ``out`` is new, and open the file and the tokenizer.
    2. Find the layout by the names, and read the sizes off the shapes. Check names and shapes of all tensors.
    3. Check that the tokenizer belongs to it.
    4. Check the numbers, convert them, and write both.

    Args:
        file: A ``.pth``, ``.pt`` or ``.safetensors`` file of a transformer in either layout.
        out: Pretrained folder to make.
        tokenizer: Folder of its tokenizer, or a pretrained folder that holds one, as ``import_tokenizer`` writes it.
        num_heads: Number of attention heads; by default that of the published network of this size.
        class_names: Name of each class. Default: ImageNet's names for 1000 classes, otherwise numbers.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        FileExistsError: if ``out`` exists.
        ValueError: if the file is no such transformer, describes more than it holds, has non-finite numbers, or its
            tokenizer has another codebook.
    """
    # 1.
    check_out(out)
    if num_heads is not None:
        check_integer("num_heads", num_heads, "[1, inf)")
    contents, beside = read_checkpoint(file, entries=_WEIGHTS)
    source = load_tokenizer(tokenizer / "tokenizer" if (tokenizer / "tokenizer").is_dir() else tokenizer)
    # 2.
    with name_file(file):
        tensors = _unwrap(contents)
        layout = transformer_layout_of(tensors)
        config = _check_network(layout, tensors, source.grid, num_heads, size=file.stat().st_size)
    # 3.
    image_size = _check_tokenizer(source, config, tokenizer)
    names, decoding = choose_class_names(class_names, config.num_classes), layout.decoding(config)
    decoding.check(config.num_tokens, is_autoregressive=False)
    # 4.
    with name_file(file):
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
    weights = layout.read_weights(tensors, config)
    with write_folder(out, name="--out", check=check_out) as fresh:
        network = source.network
        save_tokenizer(fresh / "tokenizer", network.config, network.state_dict(), image_size=image_size)
        save_transformer(
            fresh / "transformer",
            config,
            weights,
            mask_schedule=_MASK_SCHEDULE,
            decoding=decoding,
            class_names=names,
            tokenizer_fingerprint=fingerprint(fresh / "tokenizer"),
        )
    count = sum(tensor.numel() for tensor in weights.values())
    return ImportedTransformer(out, layout.name, config, count, image_size, decoding, names, beside)


def transformer_layout_of(tensors: Mapping[str, Any]) -> TransformerLayout:
    """Returns the layout of a state dict, by its names.

    Raises:
        ValueError: if it has neither layout. The message says what it is, if that is known.
    """
    found = [layout for layout in _LAYOUTS if all(marker in tensors for marker in layout.markers)]
    if not found:
        is_tokenizer = any(name.startswith(("encoder.", "decoder.", "quantize.")) for name in tensors)
        kind = "a tokenizer: use maskgit import-tokenizer" if is_tokenizer else "something else"
        raise ValueError(f"it must be a transformer of Halton-MaskGIT or MaskGIL, got {kind} ({name_some(tensors)})")
    return found[0]


def _check_network(
    layout: TransformerLayout, tensors: dict[str, Tensor], grid: tuple[int, int], num_heads: int | None, *, size: int
) -> BackboneConfig:
    """Returns the sizes of a network in a file of ``size`` bytes, and removes the second name of a tied tensor."""
    if layout.tied is not None:
        _untie(tensors, *layout.tied, size=size)
    check_held(tensors, size)
    config = layout.read_config(tensors, grid, num_heads)
    check_shapes(tensors, layout.shapes(config))
    return config


def _unwrap(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors by their own names, without the prefixes of wrappers."""
    for name, value in contents.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"entry {name} must be a tensor, got {type(value).__name__}")
    return remove_wrappers(contents)


def _untie(tensors: dict[str, Tensor], copy: str, original: str, *, size: int) -> None:
    """Removes a tensor that is another one under a second name."""
    if copy not in tensors or original not in tensors:
        return  # the check of the names reports the original; files without the copy have the same weights
    first, second = tensors[copy], tensors[original]
    if first.shape == second.shape and first.dtype == second.dtype and first.data_ptr() == second.data_ptr():
        del tensors[copy]
        return
    check_held({copy: first, original: second}, size)  # before a comparison reads all of it
    if first.shape != second.shape or not torch.equal(first, second):
        raise ValueError(f"tensor {copy} must equal {original}: the network has one table for both, got another one")
    del tensors[copy]


def _check_tokenizer(source: PretrainedTokenizer, config: BackboneConfig, folder: Path) -> ImageSize:
    """Returns the size of the images, for a tokenizer that has the codes of a transformer."""
    network = source.network.config
    if network.codebook_size != config.codebook_size:
        raise ValueError(
            f"tokenizer {folder} must have the {config.codebook_size} codes of the transformer, got "
            f"{network.codebook_size}; name the folder of its own tokenizer"
        )
    if config.grid == source.grid:
        return source.image_size
    return config.grid[0] * network.downsampling_factor  # the grid of a table of positions is square


def _words(spec: str | dict[str, Any] | None) -> str:
    """Returns a spec of a plug-in on one line, such as ``constant scale 0.5``."""
    if not isinstance(spec, dict):
        return str(spec)
    return " ".join([str(spec["name"]), *(f"{name} {value}" for name, value in spec.items() if name != "name")])
