"""Compares this project with a folder of arrays recorded from the released code; the README beside it says how.

    python tests/golden/check.py tests/golden            # every array of every file
    python tests/golden/check.py --full tests/golden     # and the full-size models (a minute or two, 0.7 GB of disk)

Exit codes: 0 everything agrees, 1 an array differs or was not compared, 2 the folder cannot be read.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import recipe
import torch
from comparators import discriminator, tokenizer, transformer
from comparators.comparison import Comparison, inputs, present
from comparators.decoding import compare_decoding
from comparators.discriminator import compare_discriminator
from comparators.folder import Folder, FolderError
from comparators.losses import compare_losses
from comparators.schedules import compare_schedules
from comparators.tokenizer import compare_vqvae, nhwc, to_images
from comparators.transformer import compare_transformer
from torch import Tensor

from maskgit_pl.importers.checkpoints import read_flax
from maskgit_pl.importers.released import parameters

__all__ = ["Report", "check_file", "check_model", "files_of", "main"]

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


@dataclass
class Report:
    """The result of a check.

    Attributes:
        comparisons: One per recorded array or parameter, the worst if it was compared in several ways.
        problems: Other problems, a line each.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Returns True if everything was compared and agrees."""
        return not self.problems and all(comparison.agrees for comparison in self.comparisons)

    @property
    def agreeing(self) -> int:
        """The number of arrays that agree."""
        return sum(comparison.agrees for comparison in self.comparisons)

    def summary(self) -> str:
        """The last line: ``N of M arrays agree``, and how many of the M are inputs."""
        inputs = sum(comparison.kind == "input" for comparison in self.comparisons)
        total = len(self.comparisons)
        return f"{self.agreeing} of {total} arrays agree ({total - inputs} compared, {inputs} inputs)"

    def failures(self) -> list[str]:
        """Returns the lines that name each disagreement."""
        return [*self.problems, *(str(made) for made in self.comparisons if not made.agrees)]

    def __iadd__(self, other: Report) -> Report:
        return Report(self.comparisons + other.comparisons, self.problems + other.problems)


def files_of(folder: Folder) -> list[str]:
    """Returns the files to be checked one by one: every .npz, and trees without one."""
    arrays = [file for file in folder.present if file.endswith(".npz")]
    covered = {file.replace(".npz", end) for file in arrays for end in _BESIDE_AN_NPZ}
    return arrays + [file for file in folder.present if file.endswith(".msgpack") and file not in covered]


def check_file(folder: Folder, file: str) -> Report:
    """Compares a file and the checkpoint and gradients beside it."""
    group = [file, *(file.replace(".npz", end) for end in _BESIDE_AN_NPZ if file.endswith(".npz"))]
    group = [name for name in dict.fromkeys(group) if name in folder]
    return _collect(folder, group, _compare(folder, file, group))


def _collect(folder: Folder, files: list[str], comparisons: Iterator[Comparison]) -> Report:
    """Returns a comparison for each array of some files; an array without one is named.

    Raises:
        FolderError: One of the files cannot be read.
    """
    made: list[Comparison] = []
    problems = []
    try:
        made.extend(comparisons)
    except FolderError:
        raise
    except Exception as error:  # any error of an array that does not fit is reported, and the other files are compared
        problems = [f"{files[0]}: comparing ended with {type(error).__name__}: {error}".replace("\n", " ")]
    seen = {(comparison.file, comparison.array) for comparison in made}
    rest = [
        Comparison(file, array, float("nan"), 0.0, "equal", False, "not compared")
        for file in files
        for array in folder.names(file)
        if (file, array) not in seen
    ]
    return Report([*_worst(made), *rest], problems)


def _worst(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Returns one comparison per array: that which disagrees, or uses most of its tolerance."""
    found: dict[tuple[str, str], Comparison] = {}
    for made in comparisons:
        key = (made.file, made.array)
        found[key] = max(found.get(key, made), made, key=_badness)
    return list(found.values())


def _compare(folder: Folder, file: str, group: list[str]) -> Iterator[Comparison]:
    for name in group:
        if name.endswith("_checkpoint.msgpack"):
            yield from _checkpoint(folder, name)
    for beginning, compare in _COMPARATORS.items():
        if file.startswith(beginning) and file.endswith(".npz"):
            yield from compare(folder, file)


def _checkpoint(folder: Folder, file: str) -> Iterator[Comparison]:
    """Checks that all weights are finite float32; the importer checks names and shapes."""
    yield from inputs(file, folder.tree(file), folder.tree(file))


def _badness(comparison: Comparison) -> tuple[bool, float]:
    """Returns True for a disagreement, and the share of its tolerance that it uses."""
    return not comparison.agrees, comparison.difference / (comparison.tolerance or 1.0)


# Models of the released sizes, on checkpoints that ``recipe`` makes from a seed


@torch.no_grad()
def check_model(folder: Folder, model: str) -> Report:
    """Makes a model's checkpoint, imports it and compares it with the recorded arrays; the checkpoint is deleted."""
    file = f"{model}.npz"
    if file not in folder:
        return Report()  # the manifest's files are checked by themselves
    return _collect(folder, [file], _compare_model(folder, model))


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


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each array, other problems, and the count; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare this project with arrays recorded from the released code.")
    parser.add_argument("folder", type=Path, help="folder with a manifest.json")
    parser.add_argument("--full", action="store_true", help="also compare the full-size models of FOLDER/full")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order
    try:
        folder = Folder(arguments.folder)
        report = Report(problems=list(folder.problems()))
        for file in files_of(folder):
            report += check_file(folder, file)
        if arguments.full:
            folder = Folder(arguments.folder / "full", "full_golden.json")
            report += Report(problems=list(folder.problems()))
            for model in folder.manifest["sha256"]:
                report += check_model(folder, model)
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for comparison in report.comparisons:
        print(comparison)
    for problem in report.problems:
        print(f"OFF {problem}")
    print(report.summary())
    return 0 if report.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
