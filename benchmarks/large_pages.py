"""Measures how memory pages change the time of packed linear layers: equal copies of them, before and after they move.

    python benchmarks/large_pages.py --dtype bfloat16 --copies 3 --repeats 25

The layers are those of the released transformer, 24 x 768, on the 257 rows of one image. The copies run in turn on one
thread and have equal weights, so that only the place of their memory differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import process_time

import torch
from measuring import Stopwatch, format_table, interleave, read_cpu_name
from torch import nn

from maskgit_pl.networks.kernels import PackingLinear, set_packing

_ROWS = 257


def build_layers(*, depth: int, embed_dim: int, dtype: torch.dtype) -> nn.ModuleList:
    """Returns the linear layers of some blocks, which pack their weights and stay in small pages for now."""
    torch.manual_seed(0)
    sizes = (embed_dim, 3 * embed_dim), (embed_dim, embed_dim), (embed_dim, 4 * embed_dim), (4 * embed_dim, embed_dim)
    layers = nn.ModuleList(PackingLinear(*size) for _ in range(depth) for size in sizes).to(dtype)
    set_packing(layers.requires_grad_(requires_grad=False), enabled=True)
    for layer in layers:
        layer.uses_in_small_pages = sys.maxsize
    return layers


def make_run(layers: nn.ModuleList) -> Callable[[Stopwatch], None]:
    """Returns a function that computes the outputs of all layers."""
    inputs = {layer.in_features: torch.randn(1, _ROWS, layer.in_features, dtype=layer.weight.dtype) for layer in layers}

    def run(watch: Stopwatch) -> None:
        for layer in layers:
            layer(inputs[layer.in_features])
        watch.mark("layers")

    return run


@torch.no_grad()
def measure(copies: Sequence[nn.ModuleList], *, repeats: int) -> list[dict[str, str]]:
    """Returns a row of the table for each copy."""
    runs = {str(number): make_run(layers) for number, layers in enumerate(copies, start=1)}
    interleave(runs, repeats=2)  # packs the weights
    before = interleave(runs, repeats=repeats, clock=process_time)
    for layer in (layer for layers in copies for layer in layers):
        layer.uses_in_small_pages = 2 + repeats  # so that the next product moves the weight
    interleave(runs, repeats=1)
    after = interleave(runs, repeats=repeats, clock=process_time)
    rows = []
    for name in runs:
        small, large = (1000 * median(watch.total for watch in found[name]) for found in (before, after))
        rows.append(
            {
                "copy": name,
                "small pages, ms": f"{small:.0f}",
                "large pages, ms": f"{large:.0f}",
                "large / small": f"{large / small:.2f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="weights (%(default)s)")
    parser.add_argument("--depth", type=int, default=24, help="blocks (%(default)s)")
    parser.add_argument("--embed-dim", type=int, default=768, help="width (%(default)s)")
    parser.add_argument("--copies", type=int, default=3, help="number of copies (%(default)s)")
    parser.add_argument("--repeats", type=int, default=25, help="rounds before and after (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{read_cpu_name()}, 1 thread, torch {torch.__version__}, {args.dtype}, median of {args.repeats} rounds\n")
    dtype = getattr(torch, args.dtype)
    copies = [build_layers(depth=args.depth, embed_dim=args.embed_dim, dtype=dtype) for _ in range(args.copies)]
    print(format_table(measure(copies, repeats=args.repeats)))


if __name__ == "__main__":
    main()
