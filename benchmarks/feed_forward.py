"""Measures the MLP of a block in parts: the time of the parts over that of the whole, with packed bfloat16 weights.

    python benchmarks/feed_forward.py --repeats 9

One thread; the layers of 12 blocks run in turn, so that their weights are not in the cache. Images have 257 rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from time import process_time

import torch
import torch.nn.functional as F
from measuring import Stopwatch, format_table, interleave, read_cpu_name
from torch import Tensor, nn

from maskgit_pl.networks.kernels import PackingLinear, feed_forward, set_packing

_ROWS = 257
_SIZES = ((512, 2048, False), (768, 3072, False), (1024, 4096, False), (768, 2048, True), (1024, 4096, True))
"""Width, hidden values, and whether there is a gate, as in the backbone ``adaln``."""

Run = Callable[[Stopwatch], None]


def _gate(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def build_layers(width: int, hidden: int, *, is_gated: bool, depth: int) -> nn.ModuleList:
    """Returns the pairs of linear layers of some blocks, in bfloat16, which pack their weights."""
    torch.manual_seed(0)
    pairs = nn.ModuleList(
        nn.ModuleList([PackingLinear(width, hidden * (1 + is_gated), gelu=not is_gated), PackingLinear(hidden, width)])
        for _ in range(depth)
    )
    set_packing(pairs.requires_grad_(requires_grad=False).bfloat16(), enabled=True)
    return pairs


def make_runs(pairs: nn.ModuleList, x: Tensor, *, is_gated: bool) -> dict[str, Run]:
    """Returns functions that compute the outputs of all pairs of layers for x, in parts and as a whole."""

    def parts(watch: Stopwatch) -> None:
        for inner, outer in pairs:
            feed_forward(x, inner, outer, _gate if is_gated else None)
        watch.mark("layers")

    def whole(watch: Stopwatch) -> None:
        for inner, outer in others:
            outer(_gate(*inner(x).chunk(2, dim=-1)) if is_gated else inner(x))
        watch.mark("layers")

    width, hidden = pairs[0][0].in_features, pairs[0][1].in_features
    others = build_layers(width, hidden, is_gated=is_gated, depth=len(pairs))
    return {"parts": parts, "whole": whole}


@torch.no_grad()
def measure(
    sizes: Sequence[tuple[int, int, bool]], *, images: Sequence[int], depth: int, repeats: int
) -> list[dict[str, str]]:
    """Returns a row of the table for each size and number of images."""
    rows = []
    for width, hidden, is_gated in sizes:
        pairs = build_layers(width, hidden, is_gated=is_gated, depth=depth)
        for number in images:
            runs = make_runs(pairs, torch.randn(number, _ROWS, width).bfloat16(), is_gated=is_gated)
            interleave(runs, repeats=2)  # packs the weights
            found = interleave(runs, repeats=repeats, clock=process_time)
            seconds = {name: median(watch.total for watch in watches) / depth for name, watches in found.items()}
            rows.append(
                {
                    "layers": f"{width} -> {hidden}{' with gate' if is_gated else ''} -> {width}",
                    "images": str(number),
                    "whole, ms": f"{1000 * seconds['whole']:.1f}",
                    "parts / whole": f"{seconds['parts'] / seconds['whole']:.2f}",
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="blocks (%(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 8], help="numbers of images (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{read_cpu_name()}, 1 thread, torch {torch.__version__}, bfloat16, median of {args.repeats} rounds\n")
    print(format_table(measure(_SIZES, images=args.images, depth=args.depth, repeats=args.repeats)))


if __name__ == "__main__":
    main()
