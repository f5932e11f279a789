"""The models at their full size, on checkpoints that ``recipe`` makes from a seed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import recipe
import torch
from torch import Tensor

from comparators import discriminator, tokenizer
from comparators.comparison import Comparison, given, present
from comparators.every import Report, collect
from comparators.folder import Folder
from comparators.tokenizer import nhwc, to_images
from comparators.transformer import everywhere
from comparators.transformer import network_from as transformer_from
from maskgit_pl.importers.checkpoints import read_flax
from maskgit_pl.importers.released import parameters

__all__ = ["check_full", "check_model"]

_NUM_CODES = 1024  # of the released ImageNet models, whose 2025 words are 1024 codes, 1000 classes and the mask token


def check_full(path: Path) -> Report:
    """Compares every model of a folder with ``full_golden.json``.

    Raises:
        FolderError: The folder, its manifest or one of its files cannot be read.
    """
    folder = Folder(path, "full_golden.json")
    report = Report(problems=list(folder.problems()))
    for model in folder.manifest["sha256"]:
        report += check_model(folder, model)
    return report


@torch.no_grad()
def check_model(folder: Folder, model: str) -> Report:
    """Makes a model's checkpoint, imports it and compares it with the recorded arrays; the checkpoint is deleted."""
    file = f"{model}.npz"
    if file not in folder:
        return Report()  # the manifest's files are checked by themselves
    return collect(folder, [file], _compare_model(folder, model))


def _compare_model(folder: Folder, model: str) -> Iterator[Comparison]:
    """Raises ``ValueError`` where the recipe makes other bytes than those of the recording."""
    with tempfile.TemporaryDirectory() as made:
        checkpoint = Path(made) / f"{model}.msgpack"
        digest = recipe.write(folder.manifest["seed"], model, checkpoint)
        if digest != folder.manifest["sha256"][model]:
            raise ValueError(f"the recipe's checkpoint has the sha256 {digest}, not the recorded one")
        weights = parameters(read_flax(checkpoint))
        yield from _COMPARATORS[re.sub(r"\d+$", "", model)](folder, f"{model}.npz", weights)


def _transformer(folder: Folder, file: str, weights: dict[str, np.ndarray]) -> Iterator[Comparison]:
    network, tokens = transformer_from(weights, codebook_size=_NUM_CODES), folder.arrays(file)["tokens"]
    weights.clear()  # the bytes of the file, which nothing needs any longer
    yield given(file, "tokens", tokens, dtype="int32", low=-1, high=network.config.vocabulary_size - 2)
    logits = everywhere(network, tokens)["logits"]
    made = {
        "logits": logits,
        "logits_first_1024": logits[..., :1024],
        "logits_last_row": logits[:, -1],
    }
    yield from _compare(folder, file, made)


def _tokenizer(folder: Folder, file: str, weights: dict[str, np.ndarray]) -> Iterator[Comparison]:
    network, arrays = tokenizer.network_from(weights), folder.arrays(file)
    image, chosen = arrays["image"], arrays["random_indices"]
    yield given(file, "image", image, dtype="float32", low=0, high=1)
    yield given(file, "random_indices", chosen, dtype="int32", low=0, high=network.config.codebook_size - 1)
    features = network.encoder(to_images(image))
    codes = torch.from_numpy(chosen).long()
    made = {
        "encoder_output": nhwc(features),
        "indices": tokenizer.coded(network, features, arrays)["indices"],
        "decoded_from_random_indices": nhwc(network.decode(codes.flatten(1), (codes.shape[1], codes.shape[2]))),
    }
    yield from _compare(folder, file, made)
    yield from _compare(folder, file, tokenizer.coded(network, to_images(arrays["encoder_output"]), arrays))


def _discriminator(folder: Folder, file: str, weights: dict[str, np.ndarray]) -> Iterator[Comparison]:
    image = to_images(Folder(folder.path, folder.manifest_name).arrays("tokenizer256.npz")["image"])
    network = discriminator.network_from(weights, image_size=image.shape[-1], pooling="blur")
    said = str(folder.arrays(file)["images_are"])
    yield Comparison(file, "images_are", 0, 0, "input", said == "tokenizer256 image, then 1 - that image")
    yield from _compare(folder, file, {"logits": network(torch.cat([image, 1 - image]))})


def _compare(folder: Folder, file: str, made: dict[str, Tensor]) -> Iterator[Comparison]:
    """Compares what is recorded: whole arrays, or every k-th element along each axis as ``strides`` says."""
    arrays, strides = folder.arrays(file), folder.manifest.get("strides", {}).get(file, {})
    sampled = {}
    for name in made.keys() & arrays.keys():
        every = tuple(slice(None, None, step) for step in strides.get(name, ()))
        sampled[name] = made[name][every] if every else made[name]
    yield from present(file, sampled, arrays)


_COMPARATORS: dict[str, Callable[[Folder, str, dict[str, np.ndarray]], Iterator[Comparison]]] = {
    "transformer": _transformer,
    "tokenizer": _tokenizer,
    "discriminator": _discriminator,
}
