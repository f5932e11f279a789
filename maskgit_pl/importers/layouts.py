"""Layouts of released checkpoints in torch: how to recognise one, and how to read its sizes and its weights.

``importers.taming`` and ``importers.magvit2`` define layouts of tokenizers for ``importers.tokenizers``;
``importers.halton`` and ``importers.maskgil`` define those of transformers for ``importers.transformers``.

No file is executed: torch's loader for tensors reads it, and known records of training programs are skipped.
"""

from __future__ import annotations

import pickle
import re
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import shorten
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.errors import printable
from maskgit_pl.importers.files import check_torch_file
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import check_archive, read_tensors, skeletons

__all__ = [
    "CODEBOOK",
    "LevelNames",
    "TokenizerLayout",
    "TransformerLayout",
    "check_shapes",
    "count_numbers",
    "find_num_heads",
    "name_file",
    "name_some",
    "read_bits",
    "read_checkpoint",
    "read_shape",
    "read_widths",
    "remove_wrappers",
    "shape_of",
    "tokenizer_weights",
    "training_commands",
]

CODEBOOK = "quantize.embedding.weight"
"""The codebook, by the name that all projects with a table of codes give it."""
_MAX_BITS = 24  # the largest codebook that a configuration accepts
_OUTER = {"stem": "conv_in", "norm": "norm_out", "head": "conv_out"}  # our layers outside the levels -> theirs
_RECIPE, _CODES, _GRID = "paper-256", 1024, (16, 16)  # a recipe, and the sizes that it sets

# Classes that training programs store beside weights; numpy's are learning rates and scores.
_RECORDS = ("pytorch_lightning.", "lightning.", "argparse.Namespace", "omegaconf.", "numpy.")
# Types that the containers of omegaconf hold; the loader names built-in ones without their module.
_TYPES = ("typing.Any", "collections.defaultdict")
_BUILT_IN_TYPES = ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")
_MAPPING = ".AttributeDict"  # end of the name of Lightning's class of hyper-parameters
_MAX_RECORDS = 100  # each class is found by another try, so that very many of them would take hours
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts that torch adds to names


@dataclass(frozen=True)
class TokenizerLayout:
    """The layout of the tokenizers of a project.

    Attributes:
        name: Name of the project.
        is_marked: True if the tensors' names are those of this layout.
        read_config: Reads the sizes of the network off the shapes of the tensors; the second argument is the content
            of ``config.json`` beside the file, empty if there is none.
        names: Returns the project's name of each tensor of our network, for its sizes and our names.
        others: Names of tensors that are not part of the network; a name that ends in a dot is a beginning.
        prepare: Returns the tensors under today's names and with the axes of a convolution; by default all as they are.
        convert: Converts float32 tensors by our names to the state dict of our network; by default they are it.
        codes: Tensors of the quantizer, of which a file has at least one; empty if no tensor tells its kind.
        has_average: True if the project evaluates the averaged weights, where a file has them.
    """

    name: str
    is_marked: Callable[[Mapping[str, Tensor]], bool]
    read_config: Callable[[Mapping[str, Tensor], Mapping[str, Any]], VQGANConfig]
    names: Callable[[VQGANConfig, tuple[str, ...]], dict[str, str]]
    others: tuple[str, ...]
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    codes: tuple[str, ...] = (CODEBOOK,)
    has_average: bool = False


@dataclass(frozen=True)
class LevelNames:
    """The names that a project gives to the parts of a network without self-attention, and its sizes.

    The encoder's levels are ``encoder.down.0``, ..., and the decoder's ``decoder.up.0``, ...

    Attributes:
        block: Name of the residual blocks of a level.
        middle: Name of the residual blocks of the middle.
        downsample: Name of the convolution at the end of a level of the encoder.
        upsample: Name of the convolution at the end of a level of the decoder.
        norm: Name of the norms at the beginning of the decoder's levels; None if it has none.
        lowest_first: True if the decoder's levels are numbered in the order in which they run, from the lowest
            resolution.
    """

    block: str
    middle: str
    downsample: str
    upsample: str
    norm: str | None = None
    lowest_first: bool = False

    def read_sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Reads the fields of a ``VQGANConfig`` that tell the sizes of encoder and decoder.

        Raises:
            ValueError: if a tensor is missing, or a level is no multiple of the first convolution.
        """
        levels = [f"encoder.down.{level}" for level in range(count_numbers(tensors, "encoder.down."))]
        channels, multipliers = read_widths(
            tensors, "encoder.conv_in.weight", [f"{level}.{self.block}.0.conv1.weight" for level in levels]
        )
        return {
            "in_channels": read_shape(tensors, "encoder.conv_in.weight", axes=4)[1],
            "base_channels": channels,
            "channel_multipliers": multipliers,
            "num_res_blocks": count_numbers(tensors, f"{levels[0]}.{self.block}."),
            "num_middle_blocks": count_numbers(tensors, f"encoder.{self.middle}."),
        }

    def of(self, config: VQGANConfig, ours: tuple[str, ...]) -> dict[str, str]:
        """Returns the project's name of each of our tensors, such as ``decoder.blocks.3.conv1.weight``."""
        places = {
            f"{half}.blocks.{number}": f"{half}.{place}"
            for half, found in (("encoder", self._encoder(config)), ("decoder", self._decoder(config)))
            for number, place in enumerate(found)
        }
        return {name: _name(name, places) for name in ours}

    def _encoder(self, config: VQGANConfig) -> Iterator[str]:
        """Yields the project's names of our encoder's blocks, in their order."""
        last = len(config.channel_multipliers) - 1
        for level in range(last + 1):
            yield from (f"down.{level}.{self.block}.{block}" for block in range(config.num_res_blocks))
            if level < last:
                yield f"down.{level}.{self.downsample}"
        yield from (f"{self.middle}.{block}" for block in range(config.num_middle_blocks))

    def _decoder(self, config: VQGANConfig) -> Iterator[str]:
        """Yields the project's names of our decoder's blocks, in their order."""
        yield from (f"{self.middle}.{block}" for block in range(config.num_middle_blocks))
        last = len(config.channel_multipliers) - 1
        for level in range(last, -1, -1):
            number = last - level if self.lowest_first else level
            if self.norm:
                yield f"{self.norm}.{number}"
            yield from (f"up.{number}.{self.block}.{block}" for block in range(config.num_res_blocks))
            if level > 0:
                yield f"up.{number}.{self.upsample}"


@dataclass(frozen=True)
class TransformerLayout:
    """The layout of the transformers of a project.

    Args:
        name: Name of the project.
        markers: Tensors that tell this layout from others.
        tied: Tensor that must equal another one, and that other one; None if there is no such pair.
        read_config: Reads the sizes of the network off the tensors; the arguments are the tensors, the grid of the
            tokenizer (rows, columns), and the number of attention heads or None.
        shapes: Returns the names and shapes of all tensors of a network.
        read_weights: Converts tensors of these names and shapes to the state dict of our network.
        decoding: Returns the decoding settings that the project publishes for a network.
    """

    name: str
    markers: tuple[str, ...]
    tied: tuple[str, str] | None
    read_config: Callable[[Mapping[str, Tensor], tuple[int, int], int | None], BackboneConfig]
    shapes: Callable[[BackboneConfig], dict[str, tuple[int, ...]]]
    read_weights: Callable[[Mapping[str, Tensor], BackboneConfig], dict[str, Tensor]]
    decoding: Callable[[BackboneConfig], DecodingConfig]


def read_checkpoint(file: Path, *, entries: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the state dict of a checkpoint.

    Args:
        file: A file of torch.save or safetensors.
        entries: Names of the entries that may hold the state dict; the first that does is read. A file without such an
            entry is a state dict itself.

    Returns:
        The state dict, with texts as names and values of any type, and the names of the other entries.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another format, damaged, or holds a Python object, a name that is no text, or a sparse
            or nested tensor.
    """
    kind = check_torch_file(file)
    try:
        if kind == "safetensors":
            return dict(read_tensors(file)), ()
        if kind == "zip":
            with file.open("rb") as stream:
                check_archive(stream, file.stat().st_size)
        content = _load_tensors(file, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(file, str(error), entries)) from error
    except Exception as error:  # the loaders raise many types, depending on where a file is damaged
        raise ValueError(f"checkpoint {file}: cannot be read ({_first_line(error)}); download it again") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {file} must hold a state dict, got {type(content).__name__}")
    for name in entries:
        if isinstance(content.get(name), Mapping) and content[name]:
            return _check_entries(file, content[name]), tuple(str(other) for other in content if other != name)
    return _check_entries(file, content), ()


def remove_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict by the names of the network itself, without those of torch's wrappers.

    Args:
        state: State dict of a network, or of one in ``DistributedDataParallel``, ``torch.compile`` or FSDP.

    Raises:
        ValueError: if a tensor is there with and without a wrapper.
    """
    own: dict[str, Any] = {}
    for name, value in state.items():
        inner = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        while inner.startswith("module."):  # DistributedDataParallel's; elsewhere it may be the network's
            inner = inner.removeprefix("module.")
        if inner in own:
            raise ValueError(f"tensor {inner} must be there once, got it twice, with and without a prefix")
        own[inner] = value
    return own


@contextmanager
def name_file(file: Path) -> Iterator[None]:
    """Adds the name of the file to each ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error


def name_some(names: Iterable[str], *, limit: int = 3) -> str:
    """Lists the first names of a file, without control characters, and the number of the others."""
    shown = list(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(map(printable, shown[:limit])) + more


def tokenizer_weights(tensors: Mapping[str, Tensor], config: VQGANConfig, layout: TokenizerLayout) -> dict[str, Tensor]:
    """Converts prepared tensors to the state dict of our ``VQGAN``, float32.

    Args:
        tensors: Tensors of the network by the project's names.
        config: Sizes of the network.
        layout: Layout of the tensors.

    Raises:
        ValueError: if a tensor is missing, superfluous, or has another shape than ``config`` implies.
    """
    # The names and shapes of our network, without memory.
    with skeletons():
        own = {name: tuple(tensor.shape) for name, tensor in VQGAN(config).state_dict().items()}
    names = layout.names(config, tuple(own))
    check_shapes(tensors, {theirs: own[ours] for ours, theirs in names.items()})
    return layout.convert({ours: tensors[theirs].float() for ours, theirs in names.items()})


def check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that tensors have exactly the names and shapes of a network.

    Raises:
        ValueError: if a tensor is missing, superfluous, or of another shape.
    """
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"tensors are missing: {name_some(missing)}")
    left_over = sorted(tensors.keys() - wanted.keys())
    if left_over:
        raise ValueError(f"tensors are not in the network: {name_some(left_over)}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"tensor {name} must have shape {shape}, got {tuple(tensors[name].shape)}")


def count_numbers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of different numbers that follow a prefix in the names of the tensors."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def read_shape(tensors: Mapping[str, Tensor], name: str, *, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor.

    Raises:
        ValueError: if there is no such tensor, or it has another number of axes.
    """
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes:
        raise ValueError(f"tensor {name} must have {axes} axes, got shape {shape}")
    return shape


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Returns the shape of a matrix.

    Raises:
        ValueError: if there is no such tensor, or it is not a matrix with elements.
    """
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"tensor {name} must be a matrix, got shape {shape}")
    return shape[0], shape[1]


def read_bits(tensors: Mapping[str, Tensor]) -> int:
    """Returns the number of bits of a token, the number of channels of the encoder's last convolution.

    Raises:
        ValueError: if there is no such tensor, or the codebook would be too large.
    """
    bits = read_shape(tensors, "encoder.conv_out.weight", axes=4)[0]
    if not 1 <= bits <= _MAX_BITS:
        raise ValueError(f"tensor encoder.conv_out.weight must have 1 to {_MAX_BITS} rows, one a bit, got {bits}")
    return bits


def read_widths(tensors: Mapping[str, Tensor], first: str, blocks: list[str]) -> tuple[int, tuple[int, ...]]:
    """Reads the channels of the first convolution, and those of each level as multiples of it.

    Args:
        tensors: Tensors by the project's names.
        first: Name of the first convolution's weight.
        blocks: Name of the weight of the first convolution of each level.

    Raises:
        ValueError: if a tensor is missing, there is no level, or a level is no multiple of the first convolution.
    """
    if not blocks:
        raise ValueError("tensors are missing: those of the levels of the encoder")
    channels = read_shape(tensors, first, axes=4)[0]
    widths = [read_shape(tensors, name, axes=4)[0] for name in blocks]
    if not channels or any(width % channels for width in widths):
        raise ValueError(
            f"channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return channels, tuple(width // channels for width in widths)


def find_num_heads(given: int | None, published: int | None, *, embed_dim: int, depth: int) -> int:
    """Returns the number of attention heads, which no shape of a tensor tells.

    Args:
        given: The number that the user names, or None.
        published: The number of the published network of this size, or None if there is none.
        embed_dim: D of the network, for the message.
        depth: Number of blocks, for the message.

    Raises:
        ValueError: if neither number is known.
    """
    if given is not None:
        return given
    if published is None:
        raise ValueError(
            f"the number of attention heads must be given for a network of {depth} blocks of size {embed_dim}, as no "
            "tensor tells it and no published network has this size; add --num-heads"
        )
    return published


def training_commands(config: VQGANConfig, folder: Path, image_size: int) -> tuple[str, str]:
    """Returns the commands that make the tokens of a data set and train a transformer on them.

    Args:
        config: Sizes of the tokenizer; those that the recipe sets otherwise become flags.
        folder: Tokenizer folder.
        image_size: Side of the images in pixels.
    """
    words = ["--dataset", "NAME", "--recipe", _RECIPE, "--tokenizer", str(folder)]
    rows, columns = config.grid(image_size)
    if config.codebook_size != _CODES:
        words += ["--model.network.codebook_size", str(config.codebook_size)]
    if (rows, columns) != _GRID:
        words += ["--model.network.grid", f"[{rows},{columns}]"]
    options = shlex.join(words)
    return f"maskgit tokenize {options}", f"maskgit train transformer {options}"


def _check_entries(file: Path, state: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a state dict after a check that its names are texts, and its tensors are of the usual layout."""
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(
                f"checkpoint {file} must hold tensors by their names, got the name {shorten(name)}, which is no text; "
                "name a file of weights"
            )
        # A tensor of another layout has no shape or no memory to compare.
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            got = "a nested tensor" if value.is_nested else value.layout
            raise ValueError(f"checkpoint {file}: tensor {shorten(name)} must be a dense CPU tensor, got {got}")
    return dict(state)


def _load_tensors(file: Path, *, mmap: bool) -> Any:
    """Reads a file with torch's loader for tensors, and with a stand-in for each known class of training programs.

    Lightning before 1.7 keyed its callbacks' states by their classes, LlamaGen stores its arguments, and the optimizer
    of Halton-MaskGIT has a learning rate of numpy. The classes are never imported.

    1. Load with the stand-ins so far.
    2. If the loader names a class of ``_RECORDS`` that has no stand-in, make one, and try again.
    """
    stand_ins: list[tuple[type, str]] = []
    while True:
        # 1.
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # torch's type lacks the pairs
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            # 2.
            name = _find_unknown_class(str(error))
            if name is None or not _is_record(name) or any(name == known for _, known in stand_ins):
                raise
            if len(stand_ins) >= _MAX_RECORDS:
                raise
            # The loader fills mappings of a few classes only.
            kind = OrderedDict if name.endswith(_MAPPING) else type(name.rpartition(".")[2], (_Record,), {})
            stand_ins.append((kind, name))


class _Record:
    """A stand-in for an object of a training program: it accepts any arguments and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        return


def _find_unknown_class(text: str) -> str | None:
    """Returns the class that torch's loader for tensors names in its refusal, if there is one."""
    found = re.search(r"GLOBAL (\S+)", text)
    if found is None:
        return None
    return f"builtins.{found[1]}" if found[1] in _BUILT_IN_TYPES else found[1]


def _is_record(name: str) -> bool:
    """Returns True if a class of this name is passed over."""
    module, _, last = name.rpartition(".")
    return name.startswith(_RECORDS) or name in _TYPES or (module == "builtins" and last in _BUILT_IN_TYPES)


def _refusal(file: Path, text: str, entries: Sequence[str]) -> str:
    """Returns the message for a file that torch's loader refuses, with the way out.

    Args:
        file: The file.
        text: Message of the loader.
        entries: Names of the entries that may hold the weights.
    """
    found = _find_unknown_class(text)
    if found is None:
        return f"checkpoint {file}: damaged, or not a file of torch.save; download it again"
    return (
        f"checkpoint {file} must hold tensors only, got also {found}, a Python object; on a machine that trusts the "
        "file, load it with the program that wrote it and save only the weights: "
        f'torch.save(checkpoint["..."], "weights.pt") with the name of its weights, such as {" or ".join(entries)}'
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _name(name: str, places: Mapping[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    part, _, inner = layer.rpartition(".")
    if layer == "quantizer":
        return CODEBOOK
    if layer in places or inner == "conv":  # a sampling, whose only layer is a convolution
        return f"{places[layer if layer in places else part]}.{kind}"
    if part in places:
        return f"{places[part]}.{'nin_shortcut' if inner == 'shortcut' else inner}.{kind}"
    return f"{part}.{_OUTER[inner]}.{kind}"
