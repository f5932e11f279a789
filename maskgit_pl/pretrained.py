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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskgit_pl.decoding import DecodingConfig, check_parallel
from maskgit_pl.files import write_atomically
from maskgit_pl.networks.causal import CausalTransformer, build_transformer
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
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
Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)
_VERSION = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_DECODING, _DECODING_FORMAT = "decoding.json", "maskgit_pl.decoding"
_ERROR_LENGTH = 400  # torch lists every name that differs
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
        FileNotFoundError: No such folder, or a file is missing.
        ValueError: Not a tokenizer, or weights that do not fit its configuration.
    """
    folder = Path(folder)
    config = read_config(folder, "tokenizer")
    sizes = _dataclass(VQGANConfig, config["network"], folder)
    network = _read_network(lambda: VQGAN(sizes), folder)
    return PretrainedTokenizer(network, int(config["image_size"]), fingerprint(folder))


def load_transformer(folder: Path | str) -> PretrainedTransformer:
    """Reads a transformer folder.

    Raises:
        FileNotFoundError: No such folder, or a file is missing.
        ValueError: Not a transformer, an unknown schedule, one where it does not belong, or weights that do not fit its
            configuration.
    """
    folder = Path(folder)
    config = read_config(folder, "transformer")
    sizes = _dataclass(TransformerConfig, config["network"], folder)
    spec = config["mask_schedule"]
    if (spec is None) != (sizes.attention == "causal"):
        raise ValueError(
            f"{folder / _CONFIG}: bidirectional attention goes with a mask schedule and causal attention without, got "
            f"{sizes.attention} and {spec!r}"
        )
    return PretrainedTransformer(
        _read_network(lambda: build_transformer(sizes), folder),
        None if spec is None else mask_schedules.build(spec),
        _dataclass(DecodingConfig, config["decoding"], folder),
        tuple(config["class_names"]),
        config["tokenizer_fingerprint"],
    )


def read_config(folder: Path | str, kind: Kind) -> dict[str, Any]:
    """The configuration of a pretrained folder, checked to be of that kind.

    Raises:
        FileNotFoundError: No such folder or file.
        ValueError: Not JSON, another kind, or a newer format.
    """
    file = Path(folder) / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{kind} {folder}: no {_CONFIG} there; a folder that training or an import wrote is needed"
        )
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{kind} {file}: not JSON ({error})") from error
    expected = f"maskgit_pl.{kind}"
    if not isinstance(config, dict) or config.get("format") != expected:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{kind} {file}: format {expected!r} is needed, got {found!r}")
    if config.get("version") != _VERSION:
        raise ValueError(f"{kind} {file}: version {_VERSION} is known, got {config.get('version')}; update maskgit_pl")
    return config


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], folder: Path, *, assign: bool = False) -> None:
    """Puts the weights of a pretrained folder into a network.

    Args:
        network: Of the same sizes.
        weights: Its state dict.
        folder: Where they come from, for the error.
        assign: Whether the network takes these very tensors instead of their values.

    Raises:
        ValueError: They are of another network; the text names the first names or shapes that differ.
    """
    try:
        network.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        shown = text if len(text) <= _ERROR_LENGTH else f"{text[:_ERROR_LENGTH]} ..."
        raise ValueError(f"weights {folder}: they do not fit the network's sizes: {shown}") from error


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
        "format": _DECODING_FORMAT,
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
    """The content of a recipe's file, and the recipe."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:  # text that is no UTF-8 too
        raise ValueError(f"decoding {file}: not JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != _DECODING_FORMAT:
        raise ValueError(f"decoding {file}: format {_DECODING_FORMAT!r} is needed, got {found!r}")
    if content.get("version") != _VERSION:
        raise ValueError(f"decoding {file}: version {_VERSION} is known, got {content.get('version')}")
    return content, _checked_decoding(content.get("decoding"), file)


def _checked_decoding(values: Any, file: Path) -> DecodingConfig:
    if not isinstance(values, dict):
        raise ValueError(f"decoding {file}: 'decoding' must be a mapping, got {type(values).__name__}")
    known = {field.name for field in fields(DecodingConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"decoding {file}: unknown keys {unknown}; known: {sorted(known)}")
    try:
        decoding = DecodingConfig(**values)
        if decoding.is_sequential:
            decoding.sequential_decoder(decoding.num_steps)
        else:
            decoding.decoder(mask_schedules.build("cosine"))  # any schedule: names and numbers are what is checked
        decoding.scales()
    except (TypeError, ValueError) as error:
        raise ValueError(f"decoding {file}: {error}") from error
    return decoding


def _save(folder: Path, kind: Kind, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{state}-{os.getpid()}") for state in ("partial", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, fresh / _WEIGHTS)
        content = {"format": f"maskgit_pl.{kind}", "version": _VERSION, **config}
        (fresh / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # the swap failed halfway
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _read_network(build: Callable[[], Network], folder: Path) -> Network:
    """A network with a folder's weights, frozen. Built without memory: drawing first weights would take longer."""
    file = folder / _WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {_WEIGHTS} there")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"weights {file}: not safetensors, or not whole ({error}); copy or make it again") from error
    with torch.device("meta"):
        network = build()
    types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    load_weights(network, {name: w.to(types.get(name, w.dtype)) for name, w in weights.items()}, folder, assign=True)
    empty = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    if empty:
        raise TypeError(f"network of {folder}: tensors outside of its state dict cannot be read, got {empty}")
    return network.requires_grad_(False).eval()


def _dataclass(kind: type[Config], values: Mapping[str, Any], folder: Path) -> Config:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # every Config here is a dataclass
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{folder / _CONFIG}: unknown keys {unknown} for {kind.__name__}; known: {sorted(known)}")
    return kind(**values)
