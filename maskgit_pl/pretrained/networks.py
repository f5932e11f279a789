"""A pretrained tokenizer and a pretrained transformer: the networks of a ``MaskGIT``, and the folders that hold them.

- ``tokenizer/`` and ``transformer/``: ``model.safetensors`` and ``config.json`` each.
- ``decoding.json``: decoding settings in place of the transformer's own, from ``maskgit tune``.
- ``negative/``: the negative model, a second transformer from which guidance moves away, if there is one. It is usually
  an early checkpoint of the same run, or a smaller model (Karras et al., arXiv:2406.02507).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from maskgit_pl.checks import ImageSize, build_dataclass, check_class_names, check_image_size, check_keys, height_width
from maskgit_pl.decoding import DecodingConfig, FirstStepLogits
from maskgit_pl.decoding.corruption import Corruption, corruptions
from maskgit_pl.files import read_json, sha256_of, write_tensors, write_text
from maskgit_pl.folders import check_only_known, write_folder
from maskgit_pl.networks.backbone import Backbone, BackboneConfig, build_config, create_network
from maskgit_pl.networks.kernels import free_packed
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig, to_unit_range
from maskgit_pl.networks.watch import WeightWatch
from maskgit_pl.networks.weights import check_tensor, load_network, read_tensors, tensors_digest
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.text import shorten

NEGATIVE = "negative"
"""The folder of the transformer from which guidance moves away."""
_Kind = Literal["tokenizer", "transformer", "pipeline"]
_Network = TypeVar("_Network", bound=nn.Module)

_WEIGHTS_FILE = "model.safetensors"
_CONFIG = "config.json"
_NETWORK_FILES = (_CONFIG, _WEIGHTS_FILE)
_DECODING = "decoding.json"
_VERSION = 1
_MAX_CONFIG_BYTES = 8_000_000  # 100,000 classes with names of 80 letters
_LARGEST_IMAGE = 8192
_MAX_PIXELS = 2**20  # of a batch in the tokenizer: 16 images of 256 x 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A pretrained tokenizer.

    Args:
        network: Network in evaluation mode, frozen, on the CPU.
        image_size: Size of the training images: a side, or (height, width), in pixels.
        fingerprint: sha256 of its weights, hexadecimal.
    """

    network: VQGAN
    image_size: ImageSize
    fingerprint: str

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of the token grid of an image of ``image_size``."""
        return self.network.config.grid(self.image_size)

    @property
    def token_size(self) -> int:
        """The height and width of a token in pixels."""
        return self.network.config.downsampling_factor

    @property
    def channels(self) -> int:
        """The channels C of an image."""
        return self.network.config.in_channels

    def encode(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Encodes images to tokens on the network's device, in batches of at most ``images_at_once``.

        Args:
            images: (B, C, H, W) uint8.
            batch_size: Largest batch; None for no further limit.

        Returns:
            (B, N) int64 in [0, K), on the CPU.
        """
        like = next(self.network.parameters())  # for device and dtype
        count = min(batch_size or len(images), images_at_once(*images.shape[-2:]))
        with torch.no_grad():
            parts = [self.network.encode(to_unit_range(part).to(like)).cpu() for part in torch.split(images, count)]
            return torch.cat(parts)

    def decode(self, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Decodes tokens to images on the network's device, in batches of at most ``images_at_once``.

        Args:
            tokens: (B, N) int64 in [0, K).
            grid: Rows and columns of the tokens of a canvas, such as a panorama; None for those of ``image_size``.

        Returns:
            (B, C, H, W) uint8 on the CPU, clipped. H and W are ``image_size``, or with ``grid`` those of all tokens.
        """
        # Without a grid, an image of image_size may cover only a part of its last tokens: the rest is cut off.
        height, width = height_width(self.image_size) if grid is None else (None, None)
        rows, columns = grid or self.grid
        count, decoded = images_at_once(rows * self.token_size, columns * self.token_size), []
        with torch.inference_mode():
            for part in torch.split(tokens, count):
                images = self.network.decode(part, (rows, columns))[..., :height, :width]
                decoded.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
            return torch.cat(decoded)


@dataclass(frozen=True)
class PretrainedTransformer:
    """A pretrained transformer, with the data that decoding needs.

    Args:
        network: Network in evaluation mode, frozen, on the CPU.
        mask_schedule: Mask schedule of its training; None for an autoregressive transformer.
        decoding: Default configuration of decoding.
        class_names: Name of each class.
        tokenizer_fingerprint: Fingerprint of the tokenizer whose tokens it predicts; None for that of others.
        folder: Folder that it was read from; None if it came from memory.
        corruption: Corruption of its training, if decoding shows it, too; None for all others.
    """

    network: Backbone
    mask_schedule: MaskSchedule | None
    decoding: DecodingConfig
    class_names: tuple[str, ...]
    tokenizer_fingerprint: str | None
    folder: Path | None = None
    corruption: Corruption | None = None

    @cached_property
    def first_step(self) -> FirstStepLogits:
        """The logits of the first step of each class, which are kept. An autoregressive model does not use them."""
        return FirstStepLogits(self.network)

    @cached_property
    def _watch(self) -> WeightWatch:
        return WeightWatch(self.network)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 in hex of the weights, which identifies a negative model in plans and ledgers."""
        return tensors_digest(self.network.state_dict().items())

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def schedule_for(self, task: str) -> MaskSchedule:
        """Returns the mask schedule, for a task that needs parallel decoding.

        Args:
            task: Name of the task, for the error.
        """
        if self.mask_schedule is None:
            raise ValueError(
                f"{task} requires a model with bidirectional attention, which fills masked tokens in any order, got an "
                "autoregressive one; choose another run"
            )
        return self.mask_schedule

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> None:
        """Moves the network, and casts it if a ``dtype`` is given."""
        self.network.to(device=device, dtype=dtype)
        self.follow_weights()

    def follow_weights(self) -> None:
        """Removes packed weights and kept logits if the weights may have changed; see ``networks.watch``."""
        if self._watch.has_changed():
            free_packed(self.network)
            self.first_step.clear()

    def check_tokenizer(self, fingerprint: str | None) -> None:
        """Checks that a tokenizer is the one whose tokens the network predicts; None is one of others."""
        # The same codes mean other patches in another tokenizer: the images would be noise without an error.
        if fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                "transformer must be used with the tokenizer that it was trained with, whose fingerprint is "
                f"{str(self.tokenizer_fingerprint)[:12]}, got {str(fingerprint)[:12]}; load that tokenizer, or train "
                "the transformer on this one"
            )

    def check_negative(self, negative: PretrainedTransformer) -> None:
        """Checks that another transformer predicts the same tokens of the same classes."""
        self.schedule_for("negative_model")
        config, weak = self.network.config, negative.network.config
        for name, strong_value, weak_value in (
            ("attention", config.attention, weak.attention),
            ("the tokenizer", str(self.tokenizer_fingerprint)[:12], str(negative.tokenizer_fingerprint)[:12]),
            ("codebook_size", config.codebook_size, weak.codebook_size),
            ("grid", config.grid, weak.grid),
            ("class_names", self.class_names, negative.class_names),
            ("condition_dim", config.condition_dim, weak.condition_dim or config.condition_dim),  # may have no vectors
        ):
            if strong_value != weak_value:
                raise ValueError(
                    f"negative_model must have {name} {shorten(strong_value)}, as the model that generates, got "
                    f"{shorten(weak_value)}; choose another checkpoint of the same run, or a run on the same tokens"
                )


class Pipeline(Protocol):
    """The networks of a pipeline, which ``MaskGIT`` is."""

    transformer: PretrainedTransformer

    @property
    def tokenizer(self) -> PretrainedTokenizer:
        """The tokenizer; raises a ``ValueError`` if there is none."""


NegativeModelLike: TypeAlias = Path | str | PretrainedTransformer | Pipeline


def images_at_once(height: int, width: int) -> int:
    """Returns the largest number of images that a tokenizer encodes or decodes at a time, at least 1.

    It bounds the memory: the released tokenizer takes 130 MB for an image of 256 x 256 pixels.

    Args:
        height: Height of the images in pixels.
        width: Width of the images in pixels.
    """
    return max(1, _MAX_PIXELS // (height * width))


def save_tokenizer(folder: Path, config: VQGANConfig, weights: Mapping[str, Tensor], *, image_size: ImageSize) -> None:
    """Writes a tokenizer folder; an older one is replaced when the new one is complete.

    Args:
        folder: Folder such as ``runs/RUN/pretrained/tokenizer``.
        config: Sizes of the network.
        weights: State dict of a ``VQGAN``.
        image_size: Size of the training images: a side, or (height, width), in pixels.
    """
    _save(folder, "tokenizer", weights, {"network": asdict(config), "image_size": image_size})


def save_transformer(
    folder: Path,
    config: BackboneConfig,
    weights: Mapping[str, Tensor],
    *,
    mask_schedule: str | dict[str, Any] | None,
    decoding: DecodingConfig,
    class_names: tuple[str, ...],
    tokenizer_fingerprint: str | None,
    corruption: Corruption | None = None,
) -> None:
    """Writes a transformer folder; an older one is replaced when the new one is complete.

    Args:
        folder: Folder such as ``runs/RUN/pretrained/transformer``.
        config: Sizes of the network.
        weights: State dict of the network that ``config`` creates.
        mask_schedule: Name or mapping of the mask schedule, as in a recipe; None for an autoregressive transformer.
        decoding: See ``PretrainedTransformer``.
        class_names: See ``PretrainedTransformer``.
        tokenizer_fingerprint: See ``PretrainedTransformer``.
        corruption: See ``PretrainedTransformer``.
    """
    of_decoding = {} if corruption is None else {"corruption": corruptions.spec(corruption)}
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
            **of_decoding,
        },
    )


def load_tokenizer(folder: Path | str) -> PretrainedTokenizer:
    """Reads a tokenizer folder."""
    folder = Path(folder)
    config, image_size = _parse_tokenizer(_read_json(folder / _CONFIG, "tokenizer"), folder / _CONFIG)
    network = _read_network(lambda: VQGAN(config), folder, num_blocks=config.num_blocks)
    # Convolutions then take channels last: half the time in bfloat16 on a CPU, which has them in no other layout.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's types
    return PretrainedTokenizer(network, image_size, fingerprint(folder))


def load_transformer(folder: Path | str) -> PretrainedTransformer:
    """Reads a transformer folder."""
    folder = Path(folder)
    config, facts = _parse_transformer(_read_json(folder / _CONFIG, "transformer"), folder / _CONFIG)
    network = _read_network(lambda: create_network(config), folder, num_blocks=config.num_blocks)
    return PretrainedTransformer(network, folder=folder, **facts)


def read_config(folder: Path | str, kind: _Kind) -> dict[str, Any]:
    """Reads the configuration of a pretrained folder. That of a tokenizer or a transformer is checked completely.

    Args:
        folder: Folder of a tokenizer, a transformer, or both (``pipeline``).
        kind: Kind that the file must have.

    Returns:
        The plain values of the file.
    """
    file = Path(folder) / _CONFIG
    config = _read_json(file, kind)
    if kind == "tokenizer":
        _parse_tokenizer(config, file)
    elif kind == "transformer":
        _parse_transformer(config, file)
    return config


def fingerprint(folder: Path | str) -> str:
    """Returns the sha256 of a folder's weights, in hex, which tells tokens of one tokenizer from those of another."""
    return sha256_of(Path(folder) / _WEIGHTS_FILE)


def has_weights_of(folder: Path, other: Path) -> bool:
    """Returns True if a folder holds the weights of another one, with their configuration."""
    is_complete = all((folder / name).is_file() for name in _NETWORK_FILES)
    return is_complete and fingerprint(folder) == fingerprint(other)


def check_stage_folder(folder: Path) -> None:
    """Checks that the folder of a tokenizer or transformer holds nothing that a new one would remove."""
    check_only_known(folder, {*_NETWORK_FILES})


def copy_stage_folder(source: Path, folder: Path) -> None:
    """Copies a tokenizer or transformer, unless the folder holds the same weights already.

    Args:
        source: Pretrained folder of the stage.
        folder: Folder to write; an existing one is replaced.
    """
    if not has_weights_of(folder, source):
        # Loaded pipelines map the file of the weights to memory, so that overwriting it would change them.
        with write_folder(folder, check=check_stage_folder) as fresh:
            for name in _NETWORK_FILES:
                shutil.copyfile(source / name, fresh / name)


def save_decoding(
    folder: Path | str,
    decoding: DecodingConfig,
    *,
    tuned: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``decoding.json``, by which the images of this folder are decoded from then on.

    Args:
        folder: Folder such as ``runs/RUN/pretrained``.
        decoding: Configuration of decoding.
        tuned: Record of the search that found it, in plain values, for people.
    """
    file = Path(folder) / _DECODING
    content = {
        "format": "maskgit_pl.decoding",
        "version": _VERSION,
        "decoding": asdict(decoding),
        "transformer": fingerprint(file.parent / "transformer"),
        "tuned": dict(tuned or {}),
    }
    write_text(file, json.dumps(content, indent=2) + "\n")


def read_decoding(folder: Path | str) -> DecodingConfig | None:
    """Reads ``decoding.json``; returns None if there is none.

    A file that was tuned for other weights is used too, with a warning.

    Args:
        folder: Folder such as ``runs/RUN/pretrained``.
    """
    file = Path(folder) / _DECODING
    if not file.is_file():
        return None
    content = _read_json(file, "decoding")
    check_keys(f"decoding {file}", content, known=content, required=("decoding",))
    decoding = _build_decoding(content["decoding"], f"decoding {file}: decoding")
    # Tuned settings fit one set of weights; after more training they may not be the best.
    weights = fingerprint(file.parent / "transformer")
    if content.get("transformer") != weights:
        _log.warning(
            "decoding %s: tuned for a transformer with fingerprint %s, used with one with %s; run "
            "`maskgit tune` for this one, or delete the file to use the model's own decoding",
            file,
            str(content.get("transformer"))[:12],
            weights[:12],
        )
    return decoding


def _save(folder: Path, kind: _Kind, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    # Checked before anything is written: a diverged run keeps its older export.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    for name, tensor in tensors.items():
        try:
            if tensor.is_floating_point():
                check_tensor(name, tensor)
        except ValueError as error:
            raise ValueError(f"{kind} {folder} is not written: {error}") from error
    content = {"format": f"maskgit_pl.{kind}", "version": _VERSION, **config}
    with write_folder(folder, check=check_stage_folder) as fresh:
        write_tensors(fresh / _WEIGHTS_FILE, tensors)
        write_text(fresh / _CONFIG, json.dumps(content, indent=2) + "\n")


def _read_network(build: Callable[[], _Network], folder: Path, *, num_blocks: int) -> _Network:
    """Returns a network of ``num_blocks`` blocks, each of at least one tensor, with the weights of a folder, frozen."""
    file = folder / _WEIGHTS_FILE
    weights = read_tensors(file)
    if num_blocks > len(weights):  # millions of blocks take long to build, also without memory
        raise ValueError(
            f"{folder / _CONFIG}: network of {num_blocks} blocks must fit {_WEIGHTS_FILE}, which holds {len(weights)} "
            "tensors"
        )
    return load_network(build, weights, file).requires_grad_(requires_grad=False).eval()


def _read_json(file: Path, kind: str) -> dict[str, Any]:
    """Returns the content of a file of our format and version."""
    if not file.exists():
        raise FileNotFoundError(
            f"{kind} {file.parent}: no {file.name} there; name a folder that training or an import wrote"
        )
    config = read_json(file, max_bytes=_MAX_CONFIG_BYTES)
    if config.get("format") != f"maskgit_pl.{kind}":
        raise ValueError(f"{kind} {file}: format must be 'maskgit_pl.{kind}', got {shorten(config.get('format'))}")
    if config.get("version") != _VERSION:
        raise ValueError(
            f"{kind} {file}: version must be {_VERSION}, got {shorten(config.get('version'))}; update maskgit_pl"
        )
    return config


def _parse_tokenizer(content: Mapping[str, Any], file: Path) -> tuple[VQGANConfig, ImageSize]:
    """Returns the sizes of the network and of the images in a ``config.json``, which a stranger may have written."""
    check_keys(str(file), content, known=content, required=("network", "image_size"))
    try:
        network = build_dataclass(VQGANConfig, content["network"], "network")
        size = check_image_size("image_size", content["image_size"], f"[1, {_LARGEST_IMAGE}]")
        network.grid(size)  # raises if the network cannot encode this size
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file}: {error}") from error
    return network, size


def _parse_transformer(content: Mapping[str, Any], file: Path) -> tuple[BackboneConfig, dict[str, Any]]:
    """Returns the sizes of the network and the other arguments of ``PretrainedTransformer`` in a ``config.json``."""
    names = ("network", "mask_schedule", "decoding", "class_names", "tokenizer_fingerprint")
    check_keys(str(file), content, known=content, required=names)
    network = build_config(content["network"], f"{file}: network")
    spec, tokenizer = content["mask_schedule"], content["tokenizer_fingerprint"]
    if (spec is None) != (network.attention == "causal"):
        raise ValueError(
            f"{file}: mask_schedule must be set for bidirectional and null for causal attention, got {shorten(spec)} "
            f"for {network.attention}"
        )
    if not isinstance(tokenizer, str | None):
        raise ValueError(f"{file}: tokenizer_fingerprint must be a string or null, got {shorten(tokenizer)}")
    decoding = _build_decoding(content["decoding"], f"{file}: decoding")
    class_names = check_class_names(f"{file}: class_names", content["class_names"], network.num_classes)
    try:
        schedule = None if spec is None else mask_schedules.build(spec)
        corruption = corruptions.build(content["corruption"]) if "corruption" in content else None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return network, {
        "mask_schedule": schedule,
        "decoding": decoding,
        "class_names": class_names,
        "tokenizer_fingerprint": tokenizer,
        "corruption": corruption,
    }


def _build_decoding(values: Any, where: str) -> DecodingConfig:
    """Returns settings in plain values after building a decoder from them, which checks the names and numbers."""
    decoding = build_dataclass(DecodingConfig, values, where)
    try:
        if decoding.is_autoregressive:
            decoding.build_autoregressive_decoder(decoding.num_steps)
        else:
            decoding.build_decoder(mask_schedules.build("cosine"))  # any schedule serves
        decoding.scales()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error
    return decoding
