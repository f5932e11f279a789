"""Measures a tokenizer: images per second that are encoded and decoded, ours and others of equal sizes.

    python benchmarks/tokenizer.py --threads 1 --repeats 5 --json tokenizer.json

benchmarks/README.md describes the contenders and the columns of the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import CLOCKS, MatrixProduct, Stopwatch, format_table, interleave, read_cpu_name
from stage1_step import PEER, Task, build_diffusers, count_flops, list_installed
from stage2_step import is_bfloat16_slow
from torch import Tensor

from maskgit_pl.distributed import describe_environment
from maskgit_pl.networks.vqgan import VQGAN
from maskgit_pl.pipeline.grids import to_unit_range

BFLOAT16 = "ours, bf16"

Half = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A tokenizer in two halves.

    Args:
        encode: Images (B, 3, H, W) float32 in [0, 1] to tokens.
        decode: Tokens to images.
    """

    encode: Half
    decode: Half


def build_ours(task: Task, network: VQGAN) -> Contender:
    """Returns our tokenizer as the pipeline and ``maskgit tokenize`` call it."""
    grid, dtype = network.grid(task.image_size), next(network.decoder.parameters()).dtype

    def decode(tokens: Tensor) -> Tensor:
        codes = network.quantizer.lookup(tokens).to(dtype).mT.unflatten(2, grid)
        images: Tensor = network.decoder(codes)
        return images

    return Contender(lambda images: network.quantizer.nearest(network.encoder(images.to(dtype))), decode)


def build_plain(task: Task, network: VQGAN) -> Contender:
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

    return Contender(encode, decode)


def build_peer(task: Task) -> Contender:
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

    return Contender(encode, decode)


def build(task: Task, names: Sequence[str]) -> dict[str, Contender]:
    """Builds contenders by name; all but the peer have the same weights."""
    torch.manual_seed(0)
    network = VQGAN(task.network).eval().requires_grad_(requires_grad=False)
    channels_last: Any = copy.deepcopy(network)
    half = copy.deepcopy(network)
    for part in (half.encoder, half.decoder):
        part.to(torch.bfloat16)
    builders: dict[str, Callable[[], Contender]] = {
        "ours": lambda: build_ours(task, network),
        "ours, channels_last": lambda: build_ours(task, channels_last.to(memory_format=torch.channels_last)),
        BFLOAT16: lambda: build_ours(task, half),
        "plain": lambda: build_plain(task, network),
        PEER: lambda: build_peer(task),
    }
    return {name: builders[name]() for name in names}


@dataclass(frozen=True)
class Measured:
    """The measurements of one contender.

    Args:
        name: Name of the contender.
        images: Images of a batch.
        flops: FLOPs of a batch, by half.
        seconds: Seconds of a batch in each round, by half.
        ratios: Median over the rounds of the time divided by our time in the same round, by half.
        peak: Best rate of a float32 matrix product over all rounds, in FLOP/s.
    """

    name: str
    images: int
    flops: dict[str, int]
    seconds: dict[str, list[float]]
    ratios: dict[str, float]
    peak: float

    def row(self) -> dict[str, str]:
        """Returns the row of the table."""
        cells = {"tokenizer": self.name}
        for half, seconds in self.seconds.items():
            middle = median(seconds)
            cells[f"{half}, images/s"] = f"{self.images / middle:.3g}"
            cells[f"{half}, time / ours"] = f"{self.ratios[half]:.2f}"
            cells[f"{half}, % of peak"] = f"{100 * self.flops[half] / middle / self.peak:.0f}"
        return cells


@torch.no_grad()  # inference mode hides convolutions from the counter
def measure(
    task: Task,
    names: Sequence[str],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    product_size: int = 2048,
) -> list[Measured]:
    """Times both halves of the contenders in turn, and the machine's peak in the same rounds; ``ours`` must be one."""
    contenders = build(task, names)
    images = to_unit_range(task.data().content)
    tokens = {name: contender.encode(images) for name, contender in contenders.items()}
    flops = {name: _count(contender, images, tokens[name]) for name, contender in contenders.items()}

    def run(name: str) -> Callable[[Stopwatch], None]:
        def both(watch: Stopwatch) -> None:
            contenders[name].encode(images)
            watch.mark("encode")
            contenders[name].decode(tokens[name])
            watch.mark("decode")

        return both

    product = MatrixProduct(torch.float32, product_size)
    product.rate(repeats=1)
    timed: Mapping[str, Callable[[Stopwatch], object]] = {"product": product, **{name: run(name) for name in names}}
    watches = interleave(timed, repeats=repeats, clock=clock)
    peak = product.flops / min(watch.total for watch in watches["product"])
    seconds = {name: {half: [watch.parts[half] for watch in watches[name]] for half in flops[name]} for name in names}
    return [
        Measured(name, task.batch, flops[name], seconds[name], _ratios(seconds[name], seconds["ours"]), peak)
        for name in names
    ]


def _count(contender: Contender, images: Tensor, tokens: Tensor) -> dict[str, int]:
    found = {}
    for half, run, argument in (("encode", contender.encode, images), ("decode", contender.decode, tokens)):
        with count_flops() as counter:
            run(argument)
        found[half] = counter.flops
    return found


def _ratios(seconds: Mapping[str, list[float]], ours: Mapping[str, list[float]]) -> dict[str, float]:
    return {half: median(a / b for a, b in zip(each, ours[half], strict=True)) for half, each in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="batch size (%(default)s)")
    parser.add_argument("--image-size", type=int, default=Task.image_size, help="side in pixels (%(default)s)")
    parser.add_argument("--base-channels", type=int, default=Task.base_channels, help="width (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (%(default)s)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: if other programs run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    task = Task(arguments.batch_size, arguments.image_size, arguments.base_channels)
    names = ["ours", "ours, channels_last", BFLOAT16, "plain", PEER]
    if PEER not in list_installed():
        names.remove(PEER)
        print(f"{PEER} is not installed and is left out; to install it: python -m pip install -e '.[benchmarks]'")
    if is_bfloat16_slow():
        names.remove(BFLOAT16)
        print("bf16 is left out: this CPU has no bfloat16 instructions")
    print(f"{read_cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats} rounds")
    print(f"{task.image_size} px, batch {task.batch}, channels {task.network.widths}, {arguments.clock} time")
    measured = measure(task, names, repeats=arguments.repeats, clock=CLOCKS[arguments.clock])
    print(f"matrix-product peak, fp32: {measured[0].peak / 1e9:.1f} GFLOP/s\n")
    print(format_table([one.row() for one in measured]))
    if arguments.json:
        report = {
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "measured": [asdict(one) for one in measured],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
