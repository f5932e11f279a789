"""Imports tokenizers that others released as pretrained folders. Used by ``maskgit import-tokenizer``.

The names of the tensors tell the layouts apart, and their shapes tell the sizes. No file is executed: torch's loader
for tensors reads it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from maskgit_pl.checks import check_choice
from maskgit_pl.data.folders import write_folder
from maskgit_pl.files import read_json
from maskgit_pl.importers.files import TOKENIZER_LAYOUTS, check_out, find_weights
from maskgit_pl.importers.layouts import (
    TokenizerLayout,
    name_file,
    name_some,
    read_checkpoint,
    remove_wrappers,
    tokenizer_weights,
    training_commands,
)
from maskgit_pl.importers.magvit2 import MASKBIT, OPEN_MAGVIT2, OPEN_MUSE
from maskgit_pl.importers.taming import DIFFUSERS, IBQ, LLAMAGEN, TAMING
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.networks.weights import check_held, check_tensor
from maskgit_pl.pipeline.pretrained import save_tokenizer

__all__ = ["ImportedTokenizer", "import_tokenizer", "tokenizer_layout_of"]

_LAYOUTS = (TAMING, LLAMAGEN, DIFFUSERS, MASKBIT, OPEN_MAGVIT2, IBQ, OPEN_MUSE)
# Entries that hold the tensors; as in LlamaGen, its average comes before "model".
_WEIGHTS = ("state_dict", "ema", "model", "model_state_dict")
_AVERAGE = "model_ema."
_SAME_NAMES = "tokenizers of IBQ have the same names, but choose other codes; if this is one, import with --layout IBQ"
_GUMBEL = ("quantize.embed.weight", "quantize.proj.weight")
_TRANSFORMER = re.compile(r"(^|\.)(transformer|first_stage_model|tok_emb|tok_embeddings|layers\.0)\.")


@dataclass(frozen=True)
class ImportedTokenizer:
    """A tokenizer that was imported.

    Attributes:
        folder: Tokenizer folder, for ``load_tokenizer``.
        layout: Name of the file's layout.
        config: Sizes of the network.
        num_parameters: Number of parameters, codebook included.
        ignored: Other entries of the file.
    """

    folder: Path
    layout: str
    config: VQGANConfig
    num_parameters: int
    ignored: tuple[str, ...]

    def report(self, image_size: int) -> str:
        """Returns text for people: sizes, ignored entries, and the next commands."""
        config = self.config
        tokenize, train = training_commands(config, self.folder, image_size)
        rows, columns = config.grid(image_size)
        return "\n".join(
            [
                f"{self.folder}: {self.layout} layout, {self.num_parameters:,} parameters",
                f"  images    {config.in_channels} x {image_size} x {image_size} -> {rows} x {columns} tokens"
                f"{'' if config.signed_images else ', in [0, 1] inside'}",
                f"  codebook  {config.codebook_size} codes of size {config.code_dim}, quantizer "
                f"{config.quantizer['name'] if isinstance(config.quantizer, Mapping) else config.quantizer}",
                f"  network   channels {' '.join(map(str, config.widths))}, {config.num_res_blocks} blocks a level"
                f"{_attention_words(config)}",
                f"  ignored   {name_some(self.ignored, limit=20) or 'nothing'}",
                *([f"  note      {_SAME_NAMES}"] if self.layout == TAMING.name else []),
                f"next: {tokenize}",
                f"then: {train}",
            ]
        )


def import_tokenizer(
    file: Path, out: Path, *, image_size: int = 256, layout: str | None = None, signed_images: bool | None = None
) -> ImportedTokenizer:
    """Writes ``out/tokenizer`` from a checkpoint.

    1. Check that ``out`` is new, and open the file.
    2. Find the layout by the names, and separate the network's tensors from others.
    3. Check the numbers, read the sizes off the shapes, and check names and shapes of all tensors.
    4. Convert and write them.

    Args:
        file: A ``.ckpt``, ``.pt``, ``.bin`` or ``.safetensors`` file of a tokenizer, or a folder of diffusers.
        out: Pretrained folder to make.
        image_size: Side of the square images that it will encode, in pixels; no file has it.
        layout: Name of the layout, such as ``IBQ``; by default the one that the names of the tensors tell.
        signed_images: True if the network expects images in [-1, 1], False if in [0, 1]; by default as in the published
            networks. Only networks of taming-transformers, LlamaGen, diffusers and IBQ have the choice.

    Raises:
        FileNotFoundError: if there is no such file.
        FileExistsError: if ``out`` exists.
        ValueError: if it is not such a tokenizer, describes more than it holds, has non-finite numbers, or its
            downsampling factor does not divide the size.
    """
    # 1.
    check_out(out)
    if layout is not None:
        check_choice("layout", layout, TOKENIZER_LAYOUTS)
    file = find_weights(file)
    contents, beside = read_checkpoint(file, entries=_WEIGHTS)
    with name_file(file):
        # 2.
        contents = remove_wrappers(contents)
        kind = tokenizer_layout_of(contents, layout)
        found, ignored = _network_tensors(contents, kind)
        if kind.has_average and any(name.startswith(_AVERAGE) for name in contents):
            found = _average_tensors(found, contents)
            ignored = (*(name for name in ignored if not name.startswith(_AVERAGE)), "the last, not averaged weights")
        # 3.
        check_held(found, file.stat().st_size)
        for name, tensor in found.items():
            check_tensor(name, tensor)
        tensors = kind.prepare(found)
        config = kind.read_config(tensors, _read_settings(file) if kind is DIFFUSERS else {})
        if signed_images is not None:
            config = replace(config, signed_images=signed_images)
        weights = tokenizer_weights(tensors, config, kind)
    # 4.
    config.grid(image_size)
    with write_folder(out, name="--out", check=check_out) as fresh:
        save_tokenizer(fresh / "tokenizer", config, weights, image_size=image_size)
    count = sum(tensor.numel() for tensor in weights.values())
    return ImportedTokenizer(out / "tokenizer", kind.name, config, count, (*beside, *ignored))


def tokenizer_layout_of(tensors: Mapping[str, Any], name: str | None = None) -> TokenizerLayout:
    """Returns the layout of a state dict, by its names.

    Args:
        tensors: State dict of a tokenizer, perhaps with other entries.
        name: Name of the layout, or None. The names of IBQ and taming-transformers are the same, but not the code that
            they choose, so that averaged weights, which IBQ writes and taming-transformers does not, ask for it.

    Raises:
        ValueError: if it has none of the layouts, not the named one, or two. The message says what it is, if that is
            known.
    """
    gumbel = [name for name in _GUMBEL if name in tensors]
    if gumbel:
        raise ValueError(
            f"the tokenizer must quantize to the nearest code, got a Gumbel-softmax tokenizer ({gumbel[0]}); "
            "name another one, such as vqgan_imagenet_f16_16384 of taming-transformers"
        )
    found = [layout for layout in _LAYOUTS if layout.is_marked(tensors)]
    if not found:
        is_transformer = any(map(_TRANSFORMER.search, tensors))
        kind = "a transformer" if is_transformer else "something else"
        way_out = "its tokenizer, or use maskgit import-transformer" if is_transformer else "a file of one of these"
        known = ", ".join(TOKENIZER_LAYOUTS)
        raise ValueError(f"it must be a tokenizer of {known}, got {kind} ({name_some(tensors)}); name {way_out}")
    chosen = _choose_layout(found, tensors, name)
    codes = chosen.codes
    if codes and not any(name in tensors for name in codes):
        raise ValueError(f"tensor {' or '.join(codes)} must be there: it is the codebook; name a tokenizer")
    return chosen


def _choose_layout(found: Sequence[TokenizerLayout], tensors: Mapping[str, Any], name: str | None) -> TokenizerLayout:
    """Returns the named one of the layouts that a file may have, or the first."""
    names = [layout.name for layout in found]
    if name is not None and name not in names:
        raise ValueError(f"--layout must be {' or '.join(names)} for the names of these tensors, got {name}")
    if name is None and len(found) > 1 and any(tensor.startswith(_AVERAGE) for tensor in tensors):
        raise ValueError(
            f"--layout must be given, {' or '.join(names)}: the file has averaged weights ({_AVERAGE}*), and the names "
            "of its tensors are those of both"
        )
    return found[0 if name is None else names.index(name)]


def _read_settings(file: Path) -> dict[str, Any]:
    """Returns the content of ``config.json`` beside a file of diffusers, empty if there is none."""
    path = file.with_name("config.json")
    return read_json(path) if path.is_file() else {}


def _network_tensors(contents: Mapping[str, Any], layout: TokenizerLayout) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the network's tensors, and the names of known others with their counts."""
    # Only known others are ignored: an unknown tensor means another network.
    tensors: dict[str, Tensor] = {}
    ignored: Counter[str] = Counter()
    for name, value in contents.items():
        known = next((other for other in layout.others if _matches(name, other)), None)
        if known is not None:
            ignored[f"{known}*" if known.endswith(".") else known] += 1
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            raise ValueError(f"entry {name} must be a tensor, got {type(value).__name__}")
    return tensors, tuple(
        f"{name} ({count} tensors)" if name.endswith("*") else name for name, count in ignored.items()
    )


def _average_tensors(tensors: Mapping[str, Tensor], contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the averaged weights in place of the last ones.

    An average has the name of its weight without dots, such as ``model_ema.encoderconv_inweight``.
    """
    names = {name: f"{_AVERAGE}{name.replace('.', '')}" for name in tensors}
    missing = [name for name in names.values() if not isinstance(contents.get(name), Tensor)]
    if missing:
        raise ValueError(f"averaged tensors are missing: {name_some(missing)}")
    return {name: contents[average] for name, average in names.items()}


def _matches(name: str, known: str) -> bool:
    return name.startswith(known) if known.endswith(".") else name == known


def _attention_words(config: VQGANConfig) -> str:
    """Returns where a network has self-attention, such as ``, self-attention in level 4 and the middle``."""
    places = [f"level {level}" for level in config.attention_levels]
    if config.layout == "taming" and config.middle_attention:
        places.append("the middle")
    return f", self-attention in {' and '.join(places)}" if places else ""
