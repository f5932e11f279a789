"""Measures a tokenizer: images per second that are encoded and decoded, ours and others of equal sizes.

    python benchmarks/tokenizer.py --repeats 5 --json tokenizer.json

benchmarks/README.md describes the contenders and the columns of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measuring import Contender, build_parser, compare, count_work, list_precisions, start
from peers import VQMODEL, list_installed
from stage1_step import Task, build_diffusers
from torch import Tensor

from maskgit_pl.networks.vqgan import VQGAN
from maskgit_pl.pipeline.grids import to_unit_range

BFLOAT16 = "ours, bf16"

Half = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Halves:
    """A tokenizer in two halves.

    Args:
        encode: Images (B, 3, H, W) float32 in [0, 1] to tokens.
        decode: Tokens to images.
    """

    encode: Half
    decode: Half


def build_ours(task: Task, network: VQGAN) -> Halves:
    """Returns our tokenizer as the pipeline and ``maskgit tokenize`` call it."""
    grid, dtype = network.grid(task.image_size), next(network.decoder.parameters()).dtype

    def decode(tokens: Tensor) -> Tensor:
        codes = network.quantizer.lookup(tokens).to(dtype).mT.unflatten(2, grid)
        images: Tensor = network.decoder(codes)
        return images

    return Halves(lambda images: network.quantizer.nearest(network.encoder(images.to(dtype))), decode)


def build_plain(task: Task, network: VQGAN) -> Halves:
    """Returns the same network with the quantizer of taming-transformers, which also computes codes and losses.

    Source: ``VQModel.encode`` and ``decode_code``, and ``VectorQuantizer2`` of CompVis/taming-transformers.
    """
    grid, codebook = network.grid(task.image_size), network.quantizer.lookup(torch.arange(task.codebook_size))

    def encode(images: Tensor) -> Tensor:
        features = network.encoder(images).permute(0, 2, 3, 1).contiguous()
        rows = features.view(-1, features.shape[-1])
        distances = (
            (rows**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * torch.einsum("bd,nd->bn", rows, codebook)
        )
        tokens = distances.argmin(1)
        codes = codebook[tokens].view(features.shape)
        _ = ((codes - features) ** 2).mean() + ((codes - features) ** 2).mean()  # both parts of its loss
        _ = (features + (codes - features)).permute(0, 3, 1, 2).contiguous()
        return tokens.view(len(images), -1)

    def decode(tokens: Tensor) -> Tensor:
        images: Tensor = network.decoder(codebook[tokens].mT.unflatten(2, grid).contiguous())
        return images

    return Halves(encode, decode)


def build_peer(task: Task) -> Halves:
    """Returns the VQModel of diffusers; it decodes codes, which its decoder looks up from tokens."""
    network: Any = build_diffusers(task).eval()
    grid = task.network.grid(task.image_size)

    def encode(images: Tensor) -> Tensor:
        tokens: Tensor = network.quantize(network.encode(images).latents)[2][2]
        return tokens.view(len(images), -1)

    def decode(tokens: Tensor) -> Tensor:
        codes = network.quantize.get_codebook_entry(tokens, (len(tokens), *grid, task.code_dim))
        images: Tensor = network.decode(codes, force_not_quantize=True).sample
        return images

    return Halves(encode, decode)


def build(task: Task, names: Sequence[str]) -> dict[str, Halves]:
    """Builds tokenizers by name; all but the peer have the same weights."""
    torch.manual_seed(0)
    network = VQGAN(task.network).eval().requires_grad_(requires_grad=False)
    half = copy.deepcopy(network)
    for part in (half.encoder, half.decoder):
        part.to(torch.bfloat16)
    builders: dict[str, Callable[[], Halves]] = {
        "ours": lambda: build_ours(task, network),
        BFLOAT16: lambda: build_ours(task, half),
        "plain": lambda: build_plain(task, network),
        VQMODEL: lambda: build_peer(task),
    }
    return {name: builders[name]() for name in names}


@torch.no_grad()
def list_contenders(task: Task, names: Sequence[str]) -> list[Contender]:
    """Returns both halves of each tokenizer, on the same images."""
    images = to_unit_range(task.data().content)
    contenders = []
    for name, halves in build(task, names).items():
        encode = torch.no_grad()(partial(halves.encode, images))
        decode = torch.no_grad()(partial(halves.decode, encode()))
        for half, run in (("encode", encode), ("decode", decode)):
            contenders.append(Contender(half, name, run, task.batch, count_work(run)))
    return contenders


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    arguments = build_parser(__doc__, batch_size=4, image_size=Task.image_size).parse_args(argv)
    start(arguments)
    task = Task(arguments.batch_size, arguments.image_size)
    names = list_installed(["ours", *([BFLOAT16] if "bf16" in list_precisions() else []), "plain", VQMODEL])
    print(task.describe())
    compare(arguments, list_contenders(task, names))


if __name__ == "__main__":
    main()
