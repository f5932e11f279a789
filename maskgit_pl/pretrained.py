"""The folder that is shared: safetensors and config.json, for a tokenizer and for a transformer.

``runs/RUN/pretrained/{tokenizer,transformer}/`` is what training and importers write and what sampling, evaluation and
stage 2 read. Weights are tensors alone, the configuration is plain JSON: nothing in it is executed. A ``decoding.json``
beside the two, which ``maskgit tune`` writes, says how to decode instead of the transformer's own configuration.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from maskgit_pl.checks import build_dataclass, check_class_names, check_integer, check_keys, shorten
from maskgit_pl.decoding import RECIPE_FORMAT, DecodingConfig, check_parallel, read_recipe
from maskgit_pl.files import read_json, sync, write_atomically, write_tensors
from maskgit_pl.networks.causal import CausalTransformer, build_transformer
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weight_file import check_fit, check_tensor, load_weights, read_tensor_header, read_tensors
from maskgit_pl.schedules import MaskSchedule, mask_schedules

__all__ = [
    "PretrainedTokenizer",
    "PretrainedTransformer",
    "fingerprint",
    "load_decoding",
    "load_tokenizer",
    "load_transformer",
    "load_weights",
    "read_config",
    "read_decoding",
    "save_decoding",
    "save_tokenizer",
    "save_transformer",
    "weights_for",
]

Kind = Literal["tokenizer", "transformer", "pipeline"]
Network = TypeVar("Network", bound=nn.Module)
_VERSION = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_DECODING = "decoding.json"
_MAX_CONFIG_BYTES = 8_000_000  # 100,000 classes with names of 80 letters
_LARGEST_IMAGE = 8192
_MOST_PIXELS = 2**20  # decoded at a time: 16 images of 256 pixels
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer as it was saved.

    Args:
        network: In evaluation mode, on the CPU, frozen.
        image_size: Height and width that it was trained on, in pixels.
        fingerprint: sha256 of its weights, hexadecimal.
    """

    network: VQGAN
    image_size: int
    fingerprint: str

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of an image of ``image_size``."""
        return self.network.config.grid(self.image_size)

    def decode(self, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Decodes tokens to images, as many at a time as ``images_at_once`` says, on the network's device.

        Args:
            tokens: (B, N) int64 in [0, K).
            grid: Rows and columns of another picture than the model's own, such as a panorama.

        Returns:
            (B, C, H, W) uint8 on the CPU: the decoded images, clipped to [0, 1], image_size high and wide or as large
            as the grid.
        """
        size = None if grid is not None and grid != self.grid else self.image_size
        rows, columns = grid or self.grid
        factor = self.network.config.downsampling_factor
        count, decoded = images_at_once(rows * factor, columns * factor), []
        with torch.inference_mode():
            for first in range(0, len(tokens), count):
                images = self.network.decode(tokens[first : first + count], (rows, columns))[..., :size, :size]
                decoded.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
            return torch.cat(decoded)


@dataclass(frozen=True)
class PretrainedTransformer:
    """A transformer as it was saved, with what decoding needs.

    Args:
        network: In evaluation mode, on the CPU, frozen.
        mask_schedule: The schedule that it was trained with; None for a causal one.
        decoding: How its images are decoded unless told otherwise.
        class_names: One for each class.
        tokenizer_fingerprint: Of the tokenizer whose tokens it knows.
    """

    network: MaskedTransformer | CausalTransformer
    mask_schedule: MaskSchedule | None
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str

    def schedule_for(self, task: str) -> MaskSchedule:
        """The mask schedule, for what only a model that decodes in parallel can do.

        Args:
            task: What is to be done with it, for the error.

        Raises:
            ValueError: A sequential model.
        """
        check_parallel(task, sequential=self.mask_schedule is None)
        assert self.mask_schedule is not None
        return self.mask_schedule


def images_at_once(height: int, width: int) -> int:
    """Returns how many images of a size a tokenizer encodes or decodes at a time, at least 1: their pixels are bounded.

    The released tokenizer takes 130 MB for an image of 256 x 256 pixels.
    """
    return max(1, _MOST_PIXELS // (height * width))


def save_tokenizer(folder: Path, config: VQGANConfig, weights: Mapping[str, Tensor], *, image_size: int) -> None:
    """Writes a tokenizer folder; an older one is replaced when the new one is complete.

    Args:
        folder: E.g. ``runs/RUN/pretrained/tokenizer``.
        config: Sizes.
        weights: State dict of a ``VQGAN``.
        image_size: Height and width that it was trained on, in pixels.
    """
    _save(folder, "tokenizer", weights, {"network": asdict(config), "image_size": image_size})


def save_transformer(
    folder: Path,
    config: TransformerConfig,
    weights: Mapping[str, Tensor],
    *,
    mask_schedule: str | dict[str, Any] | None,
    decoding: DecodingConfig,
    class_names: tuple[str, ...],
    tokenizer_fingerprint: str,
) -> None:
    """Writes a transformer folder; arguments as of ``PretrainedTransformer``, the schedule as a recipe names it."""
    _save(
        folder,
        "transformer",
        weights,
        {
            "network": asdict(config),
            "mask_schedule": mask_schedule,
            "decoding": asdict(decoding),
            "class_names": list(class_names),
            "tokenizer_fingerprint": tokenizer_fingerprint,
        },
    )


def load_tokenizer(folder: Path | str) -> PretrainedTokenizer:
    """Reads a tokenizer folder.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing.
        ValueError: if it is not a tokenizer, a value is out of range, or the weights do not fit the configuration or
            are not finite.
    """
    folder = Path(folder)
    config = _tokenizer(read_config(folder, "tokenizer"), folder)
    network = _read_network(lambda: VQGAN(config.network), folder, num_blocks=config.network.num_blocks)
    return PretrainedTokenizer(network, config.image_size, fingerprint(folder))


def load_transformer(folder: Path | str) -> PretrainedTransformer:
    """Reads a transformer folder.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing.
        ValueError: if it is not a transformer, a value is out of range or unknown, or the weights do not fit the
            configuration or are not finite.
    """
    folder = Path(folder)
    config = _transformer(read_config(folder, "transformer"), folder)
    return PretrainedTransformer(
        _read_network(lambda: build_transformer(config.network), folder, num_blocks=config.network.depth),
        config.mask_schedule,
        config.decoding,
        config.class_names,
        config.tokenizer_fingerprint,
    )


def read_config(folder: Path | str, kind: Kind) -> dict[str, Any]:
    """Reads the configuration of a pretrained folder; that of a tokenizer or a transformer is checked as a whole.

    Returns:
        The plain values of the file.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it is not JSON, of another kind or of a newer format, or if a value is not one that the kind has.
    """
    folder = Path(folder)
    file = folder / _CONFIG
    if not file.exists():
        raise FileNotFoundError(
            f"{kind} {folder}: no {_CONFIG} there; a folder that training or an import wrote is needed"
        )
    config = read_json(file, max_bytes=_MAX_CONFIG_BYTES)
    _check_format(config, file, f"maskgit_pl.{kind}", thing=kind)
    if kind == "tokenizer":
        _tokenizer(config, folder)
    elif kind == "transformer":
        _transformer(config, folder)
    return config


def weights_for(config: TransformerConfig, pretrained: PretrainedTransformer) -> dict[str, Tensor]:
    """Weights of a pretrained transformer for a network of the same sizes, perhaps of other classes.

    The rows of codes and the mask token are taken over, the classes' too where there are as many. Rows that it does not
    have (other classes; the null class, where it was trained without class dropout) begin as the mean of its classes.

    Args:
        config: Sizes of the network that is to begin from it; dropouts and classes may differ.
        pretrained: What was read.

    Returns:
        State dict of a transformer of ``config``.

    Raises:
        ValueError: Another attention, codebook, grid, width, depth, number of heads or MLP.
    """
    old = pretrained.network.config
    if config.attention != old.attention:
        raise ValueError(
            f"model.network.attention: the pretrained transformer is {old.attention}, got {config.attention}; begin "
            "from another, or train by a recipe of its own kind (RECIPE=autoregressive is causal)"
        )
    for name in ("num_codes", "grid", "width", "depth", "num_heads", "mlp_width"):
        if getattr(config, name) != getattr(old, name):
            raise ValueError(
                f"model.network.{name}: the pretrained transformer has {getattr(old, name)}, got "
                f"{getattr(config, name)}; leave the key out, or begin from another"
            )
    weights = pretrained.network.state_dict()
    return weights | {name: _fit_rows(weights[name], old, config) for name in ("words.weight", "head_bias")}


def _fit_rows(table: Tensor, old: TransformerConfig, new: TransformerConfig) -> Tensor:
    """(old vocabulary, ...) -> (new vocabulary, ...)."""
    codes, classes = table[: old.num_codes], table[old.num_codes : old.num_codes + old.num_classes]
    mean = classes.mean(0, keepdim=True)
    if new.num_classes != old.num_classes:
        classes = mean.expand(new.num_classes, *mean.shape[1:])
    null = table[:0]
    if new.null_label is not None:
        null = table[old.num_codes + old.num_classes : -1] if old.null_label is not None else mean
    return torch.cat([codes, classes, null, table[-1:]])


def fingerprint(folder: Path | str) -> str:
    """sha256 of a folder's weights, hexadecimal: tokens of one tokenizer are never taken for another's."""
    digest = hashlib.sha256()
    with (Path(folder) / _WEIGHTS).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_decoding(
    folder: Path | str, decoding: DecodingConfig, *, tuned: Mapping[str, Any] | None = None
) -> Path | None:
    """Writes ``decoding.json``, a recipe of how this folder's images are decoded from now on.

    Args:
        folder: E.g. ``runs/RUN/pretrained``.
        decoding: The recipe.
        tuned: How it was found, in plain values; kept beside it for people.

    Returns:
        Where the recipe that was there before is kept; None where there was none.

    Raises:
        FileNotFoundError: The folder has no transformer.
    """
    file = Path(folder) / _DECODING
    content = {
        "format": RECIPE_FORMAT,
        "version": _VERSION,
        "decoding": asdict(decoding),
        "transformer": fingerprint(file.parent / "transformer"),
        "tuned": dict(tuned or {}),
    }
    old = file.with_name(f"{_DECODING}.old") if file.is_file() else None
    if old is not None:
        shutil.copyfile(file, old)  # a copy: the folder is never without a recipe
    with write_atomically(file) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
    return old


def read_decoding(folder: Path | str) -> DecodingConfig | None:
    """The recipe of ``decoding.json``; None where there is none.

    A recipe that was tuned for other weights is used all the same, and a warning says so.

    Args:
        folder: E.g. ``runs/RUN/pretrained``.

    Raises:
        ValueError: Not JSON, another format or version, unknown keys, or values that no decoder takes.
    """
    file = Path(folder) / _DECODING
    if not file.is_file():
        return None
    try:
        content, decoding = _decoding_file(file)
    except ValueError as error:
        raise ValueError(f"{error}; delete the file to decode as the model was exported") from error
    weights = fingerprint(file.parent / "transformer")
    if content.get("transformer") != weights:
        _log.warning(
            "decoding %s: tuned for a transformer with fingerprint %s, used with one with %s; "
            "`maskgit tune` finds what suits it, deleting the file gives the model's own decoding",
            file,
            str(content.get("transformer"))[:12],
            weights[:12],
        )
    return decoding


def load_decoding(file: Path | str) -> DecodingConfig:
    """The recipe of one file in the form of ``decoding.json``, wherever it lies and whatever it was tuned for.

    Raises:
        FileNotFoundError: No such file.
        ValueError: As of ``read_decoding``.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"decoding {file}: no such file; `maskgit tune` writes RUN/pretrained/{_DECODING}")
    return _decoding_file(Path(file))[1]


def _decoding_file(file: Path) -> tuple[dict[str, Any], DecodingConfig]:
    """Returns the content of a recipe's file, and the recipe."""
    decoding, content = read_recipe(file)
    return content, _checked_decoding(decoding, f"decoding {file}: decoding")


def _checked_decoding(decoding: DecodingConfig, where: str) -> DecodingConfig:
    try:
        if decoding.is_sequential:
            decoding.sequential_decoder(decoding.num_steps)
        else:
            decoding.decoder(mask_schedules.build("cosine"))  # any schedule: names and numbers are what is checked
        decoding.scales()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error
    return decoding


def _check_format(content: Mapping[str, Any], file: Path, expected: str, *, thing: str) -> None:
    found, version = content.get("format"), content.get("version")
    if found != expected:
        raise ValueError(f"{thing} {file}: format must be {expected!r}, got {shorten(found)}")
    if version != _VERSION or isinstance(version, bool):
        raise ValueError(f"{thing} {file}: version must be {_VERSION}, got {shorten(version)}; update maskgit_pl")


@dataclass(frozen=True)
class _TokenizerConfig:
    """The content of a tokenizer's ``config.json``."""

    network: VQGANConfig
    image_size: int


def _tokenizer(content: Mapping[str, Any], folder: Path) -> _TokenizerConfig:
    file = folder / _CONFIG
    check_keys(str(file), content, known=content, required=("network", "image_size"))
    try:
        network = build_dataclass(VQGANConfig, content["network"], "network")
        size = check_integer("image_size", content["image_size"], f"[1, {_LARGEST_IMAGE}]")
        network.grid(size)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file}: {error}") from error
    return _TokenizerConfig(network, size)


@dataclass(frozen=True)
class _TransformerConfig:
    """The content of a transformer's ``config.json``."""

    network: TransformerConfig
    mask_schedule: MaskSchedule | None
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str


def _transformer(content: Mapping[str, Any], folder: Path) -> _TransformerConfig:
    file = folder / _CONFIG
    names = ("network", "mask_schedule", "decoding", "class_names", "tokenizer_fingerprint")
    check_keys(str(file), content, known=content, required=names)
    network = build_dataclass(TransformerConfig, content["network"], f"{file}: network")
    decoding = build_dataclass(DecodingConfig, content["decoding"], f"{file}: decoding")
    return _TransformerConfig(
        network,
        _mask_schedule(content["mask_schedule"], network.attention, file),
        _checked_decoding(decoding, f"{file}: decoding"),
        check_class_names(f"{file}: class_names", content["class_names"], network.num_classes),
        _text(content["tokenizer_fingerprint"], f"{file}: tokenizer_fingerprint"),
    )


def _mask_schedule(spec: Any, attention: str, file: Path) -> MaskSchedule | None:
    if (spec is None) != (attention == "causal"):
        raise ValueError(
            f"{file}: bidirectional attention goes with a mask schedule and causal attention without, got "
            f"{attention} and {shorten(spec)}"
        )
    try:
        return None if spec is None else mask_schedules.build(spec)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {shorten(value)}")
    return value


def _save(folder: Path, kind: Kind, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    for name, tensor in tensors.items():
        try:
            if tensor.is_floating_point():
                check_tensor(name, tensor)
        except ValueError as error:
            raise ValueError(f"{kind} {folder} is not written: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{state}-{os.getpid()}") for state in ("partial", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write_tensors(fresh / _WEIGHTS, tensors)
        content = {"format": f"maskgit_pl.{kind}", "version": _VERSION, **config}
        with write_atomically(fresh / _CONFIG) as stream:
            stream.write((json.dumps(content, indent=2) + "\n").encode())
        sync(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():  # the swap failed halfway
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _read_network(build: Callable[[], Network], folder: Path, *, num_blocks: int) -> Network:
    """Returns a network with a folder's weights, frozen.

    1. The header of the file is read. A network with more blocks than it has tensors is refused before it is built.
    2. The network is built without memory, which is also quicker than drawing first weights, and its names and shapes
       are compared with the header.
    3. The tensors are read and checked.

    Args:
        build: Makes the network.
        folder: With ``model.safetensors``.
        num_blocks: Blocks of the network, each of at least one tensor.
    """
    file = folder / _WEIGHTS
    header = read_tensor_header(file)  # 1
    if num_blocks > len(header):
        raise ValueError(
            f"{folder / _CONFIG}: network of {num_blocks} blocks must fit {_WEIGHTS}, which holds {len(header)} tensors"
        )
    with torch.device("meta"):  # 2
        network = build()
    check_fit(network, header, f"weights {file}")
    types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    weights = {name: tensor.to(types[name]) for name, tensor in read_tensors(file).items()}  # 3
    load_weights(network, weights, file, assign=True)
    empty = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    if empty:
        raise TypeError(f"network of {folder}: tensors outside of its state dict cannot be read, got {empty}")
    return network.requires_grad_(False).eval()
