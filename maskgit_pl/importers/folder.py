"""Writes the pretrained folder of an import, and describes what was read, left out and written. Used by all importers.

Released checkpoints hold no class names, so that they are given here too.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.data.folders import has_content, resolve_folder, write_folder
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.checkpoints import name_some
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import fingerprint, save_tokenizer, save_transformer

__all__ = ["Imported", "ImportedTransformer", "check_out", "choose_class_names", "write_import"]

_IMAGENET_CLASSES = 1000
_RECIPE, _CODES, _GRID = "paper-256", 1024, (16, 16)  # a recipe, and the sizes that it sets


@dataclass(frozen=True)
class ImportedTransformer:
    """A transformer that was read.

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
        ignored: Entries of the file that were left out.
        notes: Sentences for the user.
    """

    folder: Path
    layout: str
    tokenizer: VQGANConfig
    weights: Mapping[str, Tensor]
    image_size: ImageSize
    transformer: ImportedTransformer | None = None
    ignored: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the tokenizer, codebook included, or of the transformer if there is one."""
        weights = self.weights if self.transformer is None else self.transformer.weights
        return sum(tensor.numel() for tensor in weights.values())

    def __str__(self) -> str:
        """Returns sizes, entries that were left out, notes, and the next commands."""
        config, quantizer = self.tokenizer, self.tokenizer.quantizer
        (height, width), (rows, columns) = height_width(self.image_size), config.grid(self.image_size)
        lines = [
            f"{self.folder}: {self.layout} layout, {self.num_parameters:,} parameters",
            f"  images    {config.in_channels} x {height} x {width} -> {rows} x {columns} tokens"
            f"{'' if config.signed_images else ', in [0, 1] inside'}",
            f"  codebook  {config.codebook_size} codes of size {config.code_dim}, quantizer "
            f"{quantizer['name'] if isinstance(quantizer, Mapping) else quantizer}",
            f"  tokenizer channels {' '.join(map(str, config.widths))}, {config.num_res_blocks} blocks a level"
            f"{_attention_words(config)}",
        ]
        if self.transformer is not None:
            network, decoding, names = self.transformer.config, self.transformer.decoding, self.transformer.class_names
            lines += [
                f"  network   {network.backbone}, {network.num_blocks} blocks",
                f"  classes   {network.num_classes}, {names[0]!r} to {names[-1]!r}",
                f"  decoding  {decoding.num_steps} steps, {_words(decoding.token_selector)}, guidance "
                f"{_words(decoding.guidance)}",
            ]
        lines.append(f"  ignored   {name_some(self.ignored, limit=20) or 'nothing'}")
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes), *self._next()])

    def _next(self) -> list[str]:
        """Returns the next commands: sample, or make tokens and train a transformer on them."""
        if self.transformer is not None:
            return [f"next: maskgit sample {self.folder} --classes 0,{self.transformer.config.num_classes - 1}"]
        config, grid = self.tokenizer, self.tokenizer.grid(self.image_size)
        words = ["--dataset", "NAME", "--recipe", _RECIPE, "--tokenizer", str(self.folder / "tokenizer")]
        if config.codebook_size != _CODES:
            words += ["--model.network.codebook_size", str(config.codebook_size)]
        if grid != _GRID:
            words += ["--model.network.grid", f"[{grid[0]},{grid[1]}]"]
        options = shlex.join(words)
        return [f"next: maskgit tokenize {options}", f"then: maskgit train transformer {options}"]


def write_import(imported: Imported) -> Imported:
    """Writes a pretrained folder, which appears when all of it is complete, and returns its description.

    Raises:
        ValueError: if ``image_size`` is not a multiple of the tokenizer's downsampling factor.
        FileExistsError: see ``check_out``.
    """
    imported.tokenizer.grid(imported.image_size)
    with write_folder(imported.folder, name="--out", check=check_out) as fresh:
        tokenizer, transformer = fresh / "tokenizer", imported.transformer
        save_tokenizer(tokenizer, imported.tokenizer, imported.weights, image_size=imported.image_size)
        if transformer is not None:
            save_transformer(
                fresh / "transformer",
                transformer.config,
                transformer.weights,
                mask_schedule=transformer.mask_schedule,
                decoding=transformer.decoding,
                class_names=transformer.class_names,
                tokenizer_fingerprint=fingerprint(tokenizer),
            )
    return imported


def check_out(folder: Path) -> None:
    """Checks that an import can write a folder without overwriting anything: transformers may depend on what is there.

    Raises:
        FileExistsError: if it exists, unless it is an empty folder.
        ValueError: if it cannot be written (``folders.resolve_folder``).
    """
    if folder.is_symlink() or has_content(folder) or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"import {folder} must be a new or empty folder, got one with content; name another with --out"
        )
    resolve_folder("--out", folder)


def choose_class_names(given: Path | Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes of an imported transformer, whose file has none.

    Args:
        given: One name per class, or a text file with one name per line; None for ImageNet's names if there are 1000
            classes, otherwise numbers.
        num_classes: Number of classes of the transformer.

    Raises:
        ValueError: if there is no such file in UTF-8, the number of names is wrong, or one is empty.
    """
    if isinstance(given, Path):
        try:
            # Windows writes a byte order mark.
            given = [line.strip() for line in given.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"class names {given} must be a text in UTF-8, one name per line, got {error}") from error
    if given is None and num_classes == _IMAGENET_CLASSES:
        from timm.data.imagenet_info import ImageNetInfo  # half of the import time of an importer

        info = ImageNetInfo()  # in the order of the synset ids of ILSVRC 2012
        return tuple(info.index_to_description(number).partition(",")[0].strip() for number in range(num_classes))
    names = tuple(map(str, range(num_classes)) if given is None else given)
    if len(names) != num_classes or not all(name.strip() for name in names):
        empty = sum(not name.strip() for name in names)
        raise ValueError(
            f"class names must be {num_classes}, one for each class of the transformer, got {len(names)}, {empty} of "
            "them empty; change the list, or leave it out"
        )
    return names


def _attention_words(config: VQGANConfig) -> str:
    """Returns where a tokenizer has self-attention, such as ``, self-attention in level 4 and the middle``."""
    places = [f"level {level}" for level in config.attention_levels]
    if config.layout == "taming" and config.middle_attention:
        places.append("the middle")
    return f", self-attention in {' and '.join(places)}" if places else ""


def _words(spec: str | dict[str, Any] | None) -> str:
    """Returns a spec of a plug-in on one line, such as ``constant scale 0.5``."""
    if not isinstance(spec, dict):
        return str(spec)
    return " ".join([str(spec["name"]), *(f"{name} {value}" for name, value in spec.items() if name != "name")])
