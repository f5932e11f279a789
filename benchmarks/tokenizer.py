"""Measures a tokenizer: images per second that are encoded and decoded, ours and diffusers' VQModel of equal sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measuring import DTYPES, Contender, Precision, build_parser, compare, count_work, list_precisions, start
from peers import VQMODEL, list_available
from stage1_step import Task, build_diffusers
from torch import Tensor

from maskgit_pl.networks.vqgan import VQGAN, to_unit_range

Halves = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Functions that encode images (B, 3, H, W) in [0, 1] to tokens, and decode these."""


def build_ours(task: Task, dtype: torch.dtype) -> Halves:
    """Returns our tokenizer as the pipeline and ``maskgit tokenize`` call it: its quantizer is in float32."""
    network = VQGAN(task.network).eval().requires_grad_(requires_grad=False)
    for half in (network.encoder, network.decoder):
        half.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's types
    grid = task.network.grid(task.image_size)

    def decode(tokens: Tensor) -> Tensor:
        codes = network.quantizer.lookup(tokens).to(dtype).mT.unflatten(2, grid)
        images: Tensor = network.decoder(codes)
        return images

    return lambda images: network.quantizer.nearest(network.encoder(images)), decode


def build_peer(task: Task, dtype: torch.dtype) -> Halves:
    """Returns the VQModel of diffusers, with channels last as ours; it decodes codes, which its decoder looks up."""
    network: Any = build_diffusers(task).eval().to(dtype, memory_format=torch.channels_last)
    grid = task.network.grid(task.image_size)

    def encode(images: Tensor) -> Tensor:
        tokens: Tensor = network.quantize(network.encode(images).latents)[2][2]
        return tokens.view(len(images), -1)

    def decode(tokens: Tensor) -> Tensor:
        codes = network.quantize.get_codebook_entry(tokens, (len(tokens), *grid, task.code_dim))
        images: Tensor = network.decode(codes, force_not_quantize=True).sample
        return images

    return encode, decode


BUILDERS = {"ours": build_ours, VQMODEL: build_peer}


@torch.no_grad()
def list_contenders(task: Task, name: str, precision: Precision) -> list[Contender]:
    """Returns both halves of a tokenizer; all see the same images."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    halves = [torch.no_grad()(half) for half in BUILDERS[name](task, dtype)]
    encode = partial(halves[0], to_unit_range(task.data().content).to(dtype))
    runs = {"encode": encode, "decode": partial(halves[1], encode())}
    return [
        Contender(f"{half}, {precision}", name, run, task.batch, count_work(run), dtype) for half, run in runs.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    arguments = start(build_parser(__doc__, batch_size=4, image_size=Task.image_size), argv)
    task = Task(arguments.batch_size, arguments.image_size)
    print(task.describe())
    names, precisions = list_available(list(BUILDERS)), list_precisions()
    pairs = [(name, precision) for precision in precisions for name in names]
    compare(arguments, [each for name, precision in pairs for each in list_contenders(task, name, precision)])


if __name__ == "__main__":
    main()
