"""Compares this project with a folder of arrays recorded from the released code; the README beside it says how."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import recipe
import torch
from comparators import discriminator, tokenizer, transformer
from comparators.comparison import Comparison, inputs, present
from comparators.decoding import compare_decoding
from comparators.discriminator import compare_discriminator
from comparators.folder import Folder
from comparators.losses import compare_losses
from comparators.schedules import compare_schedules
from comparators.tokenizer import compare_vqvae, nhwc, to_images
from comparators.transformer import compare_transformer
from torch import Tensor

from maskgit_pl.importers.checkpoints import read_flax
from maskgit_pl.importers.released import parameters

_NUM_CODES = 1024  # of the released ImageNet models, whose 2025 words are 1024 codes, 1000 classes and the mask token
_COMPARATORS: dict[str, Callable[[Folder, str], Iterator[Comparison]]] = {  # by how the name of an .npz begins
    "decode_": compare_decoding,
    "discriminator": compare_discriminator,
    "losses": compare_losses,
    "schedules": compare_schedules,
    "transformer_": compare_transformer,
    "vqvae": compare_vqvae,
}
_BESIDE_AN_NPZ = ("_checkpoint.msgpack", "_grads.msgpack", "_r1_grads.msgpack")


def files_of(folder: Folder) -> list[str]:
    """Returns the files to be checked one by one: every .npz, and trees without one."""
    arrays = [file for file in folder.present if file.endswith(".npz")]
    covered = {file.replace(".npz", end) for file in arrays for end in _BESIDE_AN_NPZ}
    return arrays + [file for file in folder.present if file.endswith(".msgpack") and file not in covered]


def check_file(folder: Folder, file: str) -> list[Comparison]:
    """Compares the arrays of a file and of the checkpoint and gradients beside it."""
    group = [file, *(file.replace(".npz", end) for end in _BESIDE_AN_NPZ if file.endswith(".npz"))]
    group = [name for name in dict.fromkeys(group) if name in folder]
    return _collect(folder, group, _compare(folder, file, group))


def _collect(folder: Folder, files: list[str], comparisons: Iterator[Comparison]) -> list[Comparison]:
    """Returns the worst comparison of each array of some files; an array that is not compared disagrees."""
    worst: dict[tuple[str, str], Comparison] = {}
    for comparison in comparisons:
        key = (comparison.file, comparison.array)
        worst[key] = max(worst.get(key, comparison), comparison, key=_badness)
    for file in files:
        for array in folder.contents(file):
            missing = Comparison(file, array, float("nan"), 0.0, "equal", False, "not compared")
            worst.setdefault((file, array), missing)
    return list(worst.values())


def _badness(comparison: Comparison) -> tuple[bool, float]:
    """Returns True for a disagreement, and the share of its tolerance that it uses."""
    return not comparison.agrees, comparison.difference / (comparison.tolerance or 1.0)


def _compare(folder: Folder, file: str, group: list[str]) -> Iterator[Comparison]:
    for name in group:
        if name.endswith("_checkpoint.msgpack"):  # finite float32; the importer checks names and shapes
            yield from inputs(name, folder.tree(name), folder.tree(name))
    for beginning, compare in _COMPARATORS.items():
        if file.startswith(beginning) and file.endswith(".npz"):
            yield from compare(folder, file)


@torch.no_grad()
def check_model(folder: Folder, model: str) -> list[Comparison]:
    """Makes a model's checkpoint of its released size, imports it and compares it with the recorded arrays."""
    return _collect(folder, [f"{model}.npz"], _compare_model(folder, model))


def _compare_model(folder: Folder, model: str) -> Iterator[Comparison]:
    """Raises ``ValueError`` where the recipe makes other bytes than those of the recording."""
    with tempfile.TemporaryDirectory() as made:
        checkpoint = Path(made) / f"{model}.msgpack"
        digest = recipe.write(folder.manifest["seed"], model, checkpoint)
        if digest != folder.manifest["sha256"][model]:
            raise ValueError(f"the recipe's checkpoint has the sha256 {digest}, not the recorded one")
        weights = parameters(read_flax(checkpoint))
        yield from _FULL_SIZE[re.sub(r"\d+$", "", model)](folder, f"{model}.npz", weights)


def _transformer(folder: Folder, file: str, weights: dict[str, np.ndarray]) -> Iterator[Comparison]:
    network, tokens = transformer.network_from(weights, codebook_size=_NUM_CODES), folder.arrays(file)["tokens"]
    weights.clear()  # the bytes of the file, which nothing needs any longer
    yield from inputs(file, {"tokens": tokens}, ["tokens"])
    logits = transformer.everywhere(network, tokens)["logits"]
    made = {
        "logits": logits,
        "logits_first_1024": logits[..., :1024],
        "logits_last_row": logits[:, -1],
    }
    yield from _compare_sampled(folder, file, made)


def _tokenizer(folder: Folder, file: str, weights: dict[str, np.ndarray]) -> Iterator[Comparison]:
    network, arrays = tokenizer.network_from(weights), folder.arrays(file)
    image, chosen = arrays["image"], arrays["random_indices"]
    yield from inputs(file, arrays, ["image", "random_indices"])
    features = network.encoder(to_images(image))
    codes = torch.from_numpy(chosen).long()
    made = {
        "encoder_output": nhwc(features),
        "indices": tokenizer.coded(network, features, arrays)["indices"],
        "decoded_from_random_indices": nhwc(network.decode(codes.flatten(1), (codes.shape[1], codes.shape[2]))),
    }
    yield from _compare_sampled(folder, file, made)
    yield from _compare_sampled(folder, file, tokenizer.coded(network, to_images(arrays["encoder_output"]), arrays))


def _discriminator(folder: Folder, file: str, weights: dict[str, np.ndarray]) -> Iterator[Comparison]:
    image = to_images(Folder(folder.path, folder.manifest_name).arrays("tokenizer256.npz")["image"])
    network = discriminator.network_from(weights, image_size=image.shape[-1], pooling="blur")
    said = str(folder.arrays(file)["images_are"])
    yield Comparison(file, "images_are", 0, 0, "input", said == "tokenizer256 image, then 1 - that image")
    yield from _compare_sampled(folder, file, {"logits": network(torch.cat([image, 1 - image]))})


def _compare_sampled(folder: Folder, file: str, made: dict[str, Tensor]) -> Iterator[Comparison]:
    """Compares what is recorded: whole arrays, or every k-th element along each axis as ``strides`` says."""
    arrays, strides = folder.arrays(file), folder.manifest.get("strides", {}).get(file, {})
    sampled = {}
    for name in made.keys() & arrays.keys():
        every = tuple(slice(None, None, step) for step in strides.get(name, ()))
        sampled[name] = made[name][every] if every else made[name]
    yield from present(file, sampled, arrays)


_FULL_SIZE: dict[str, Callable[[Folder, str, dict[str, np.ndarray]], Iterator[Comparison]]] = {
    "transformer": _transformer,
    "tokenizer": _tokenizer,
    "discriminator": _discriminator,
}
