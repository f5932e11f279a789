"""Converts tensors of another project by a table of names, writes the pretrained folder, and describes it.

A project is a list of ``Rule``. ``convert`` compares the names and shapes of a file with those that follow from our
network, which is built without memory, before it takes memory for a tensor. The sizes of a network are read off the
shapes of a file. Used by all importers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.folders import has_content, resolve_folder, write_folder
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.networks.weights import check_shapes, skeletons
from maskgit_pl.pretrained.networks import fingerprint, save_tokenizer, save_transformer
from maskgit_pl.registry import describe

_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Rule:
    """A rule that makes a tensor of ours from tensors of another project, whose rows, in their order, are its rows.

    Attributes:
        ours: Name of our tensor.
        theirs: Names of one or more tensors of the project, separated by spaces, all of one shape.
        axes: Pattern of einops from the axes of each of theirs to ours; empty if they are the same.
    """

    ours: str
    theirs: str
    axes: str = ""


def number_rules(rules: Iterable[Rule], depth: int) -> list[Rule]:
    """Returns rules for a network of ``depth`` blocks: one with ``{}`` in its names stands for every block."""
    return [
        Rule(rule.ours.replace("{}", str(number)), rule.theirs.replace("{}", str(number)), rule.axes)
        for rule in rules
        for number in range(depth if "{}" in rule.ours else 1)
    ]


def shapes_of(create: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a network, which is created without memory."""
    with skeletons():
        return {name: tuple(tensor.shape) for name, tensor in create().state_dict().items()}


def convert(
    tensors: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], **axes: int
) -> dict[str, Tensor]:
    """Converts tensors by rules.

    Args:
        tensors: Tensors of a network by the project's names.
        rules: The table of the project; rules of tensors that our network does not have are not applied.
        shapes: Shape of each of our tensors.
        axes: Sizes of axes that patterns name.

    Returns:
        float32 tensors by our names. They share memory with ``tensors`` where nothing had to change.
    """
    rules = [rule for rule in rules if rule.ours in shapes]
    check_shapes(tensors, {name: shape for rule in rules for name, shape in _their_shapes(rule, shapes, axes)})
    weights: dict[str, Tensor] = {}
    for rule in rules:
        parts = [tensors[name].float() for name in rule.theirs.split()]
        if rule.axes:
            parts = [rearrange(part, rule.axes, **_named_in(rule, axes)) for part in parts]
        weights[rule.ours] = (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
    return weights


def count_numbers(names: Iterable[str], prefix: str) -> int:
    """Returns the number of different numbers that follow a prefix in names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    return len({match[1] for name in names if (match := pattern.match(name))})


def shape_of(tensors: Mapping[str, Any], name: str, axes: int = 2) -> tuple[int, ...]:
    """Returns the shape of a tensor from which a size is read."""
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}, which tells a size of the network")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or not all(shape):
        raise ValueError(f"tensor {name} must have {axes} axes of sizes >= 1, got shape {shape}")
    return shape


def read_widths(channels: int, widths: list[int]) -> tuple[int, ...]:
    """Returns the channels of each level as multiples of those of the first convolution."""
    if not widths or any(width % channels for width in widths):
        raise ValueError(
            f"channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return tuple(width // channels for width in widths)


def _their_shapes(
    rule: Rule, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]
) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the names and shapes of the tensors that a rule reads: the pattern, backwards."""
    theirs, (rows, *others) = rule.theirs.split(), shapes[rule.ours]
    shape = (rows // len(theirs), *others)
    if rule.axes:
        before, after = rule.axes.split(" -> ")
        like = torch.empty(shape, device="meta")
        shape = tuple(rearrange(like, f"{after} -> {before}", **_named_in(rule, axes)).shape)
    return [(name, shape) for name in theirs]


def _named_in(rule: Rule, axes: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in axes.items() if name in rule.axes}


@dataclass(frozen=True)
class ImportedTransformer:
    """A transformer that was read: what ``save_transformer`` writes.

    Attributes:
        config: Sizes of the network.
        weights: State dict of the network that ``config`` creates.
        mask_schedule: Mask schedule of its training.
        decoding: Decoding settings that the project publishes.
        class_names: Name of each class.
    """

    config: BackboneConfig
    weights: Mapping[str, Tensor]
    mask_schedule: str
    decoding: DecodingConfig
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """A pretrained folder and what it is made of; ``str`` is text for people.

    Attributes:
        folder: Pretrained folder with ``tokenizer/`` and perhaps ``transformer/``.
        layout: Name of the project whose file was read.
        tokenizer: Sizes of the tokenizer.
        weights: State dict of the tokenizer.
        image_size: Side of the images in pixels, or (height, width).
        transformer: The transformer, or None.
        notes: Sentences for the user.
    """

    folder: Path
    layout: str
    tokenizer: VQGANConfig
    weights: Mapping[str, Tensor]
    image_size: ImageSize
    transformer: ImportedTransformer | None = None
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """Returns sizes, notes, and the next command."""
        config, (height, width) = self.tokenizer, height_width(self.image_size)
        rows, columns = config.grid(self.image_size)
        weights = self.weights if self.transformer is None else self.transformer.weights
        lines = [
            f"{self.folder}: {self.layout} layout, {sum(map(Tensor.numel, weights.values())):,} parameters",
            f"  images    {config.in_channels} x {height} x {width} -> {rows} x {columns} tokens of "
            f"{config.codebook_size} codes",
        ]
        following = f"tokenize --dataset NAME --recipe RECIPE --tokenizer {self.folder / 'tokenizer'}"
        if self.transformer is not None:
            network, decoding = self.transformer.config, self.transformer.decoding
            lines.append(f"  network   {network.num_blocks} blocks, {network.num_classes} classes")
            lines.append(f"  decoding  {decoding.num_steps} steps, {describe(decoding.token_selector)}")
            following = f"sample {self.folder} --classes 0,{network.num_classes - 1}"
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes), f"next: maskgit {following}"])


def write_import(imported: Imported) -> Imported:
    """Writes a pretrained folder, which appears when all of it is complete, and returns its description."""
    imported.tokenizer.grid(imported.image_size)
    with write_folder(imported.folder, name="--out", check=check_out) as fresh:
        tokenizer, transformer = fresh / "tokenizer", imported.transformer
        save_tokenizer(tokenizer, imported.tokenizer, imported.weights, image_size=imported.image_size)
        if transformer is not None:
            folder = fresh / "transformer"
            save_transformer(folder, **vars(transformer), tokenizer_fingerprint=fingerprint(tokenizer))
    return imported


def check_out(folder: Path) -> None:
    """Checks that an import writes a folder without overwriting what is there, on which transformers may depend."""
    if folder.is_symlink() or has_content(folder) or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"import {folder} must be a new or empty folder, got one with content; name another with --out"
        )
    resolve_folder("--out", folder)


def choose_class_names(num_classes: int) -> tuple[str, ...]:
    """Returns the class names of an imported transformer, whose file has none: ImageNet's for 1000, else numbers."""
    if num_classes != _IMAGENET_CLASSES:
        return tuple(map(str, range(num_classes)))
    from timm.data.imagenet_info import ImageNetInfo  # half of the import time of an importer

    info = ImageNetInfo()  # in the order of the synset ids of ILSVRC 2012
    return tuple(info.index_to_description(number).partition(",")[0].strip() for number in range(num_classes))
