"""Measures a training step of both stages in bf16-mixed as a fraction of its time in float32, for several widths.

    python benchmarks/training_precision.py --threads 1 --clock cpu --repeats 5

The steps are ours, those of ``stage1_step.py`` (without the perceptual network) and ``stage2_step.py``. The widths from
which ``trainer.precision: auto`` chooses bf16-mixed follow from the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median

import stage1_step
import stage2_step
import torch
from measuring import CLOCKS, Stopwatch, format_table, interleave, read_cpu_name
from peers import Task

_STAGE_1 = ((16, 64, 4), (32, 64, 4), (32, 128, 2), (64, 64, 4), (64, 128, 2), (128, 64, 2))  # channels, side, batch
_STAGE_2 = ((128, 192, 256, 384, 512, 768), ((16, 8), (8, 32)))  # widths; side of the grid and batch


def compare(steps: dict[str, Callable[[Stopwatch], object]], *, repeats: int, clock: str) -> dict[str, str]:
    """Runs the steps ``fp32`` and ``bf16`` in turn; returns the columns of a row."""
    found = interleave(steps, repeats=1 + repeats, clock=CLOCKS[clock])
    times = {name: [watch.total for watch in found[name][1:]] for name in steps}  # the first round has no moments yet
    ratio = median(half / whole for half, whole in zip(times["bf16"], times["fp32"], strict=True))
    return {**{f"{name}, s": f"{median(times[name]):.3f}" for name in steps}, "bf16 / fp32": f"{ratio:.2f}"}


def stage_1(channels: int, side: int, batch: int) -> dict[str, Callable[[Stopwatch], object]]:
    """Returns the steps of a tokenizer for images of ``side`` x ``side`` pixels."""
    task = stage1_step.Task(
        batch=batch, image_size=side, base_channels=channels, num_groups=min(32, channels), has_perceptual=False
    )
    return {"fp32": stage1_step.Ours(task, "fp32"), "bf16": stage1_step.Ours(task, "bf16")}


def stage_2(width: int, side: int, batch: int) -> dict[str, Callable[[Stopwatch], object]]:
    """Returns the steps of a transformer for ``side`` x ``side`` tokens."""
    task = Task(batch=batch, embed_dim=width, mlp_dim=4 * width, num_heads=max(1, width // 64), grid=(side, side))
    return {"fp32": stage2_step.Ours(task, "fp32"), "bf16": stage2_step.Ours(task, "bf16")}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (%(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: if other programs run")
    parser.add_argument("--smallest", action="store_true", help="measure only the smallest network of each stage")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{read_cpu_name()}, {args.threads} threads, torch {torch.__version__}, n = {args.repeats} rounds\n")
    options = {"repeats": args.repeats, "clock": args.clock}
    rows = []
    for channels, side, batch in _STAGE_1[: 1 if args.smallest else None]:
        size = {"stage": "1", "width": f"{channels}", "batch": f"{batch} of {side} x {side} pixels"}
        rows.append(size | compare(stage_1(channels, side, batch), **options))
    widths, sizes = _STAGE_2
    for width in widths[: 1 if args.smallest else None]:
        for side, batch in sizes:
            size = {"stage": "2", "width": f"{width}", "batch": f"{batch} of {side} x {side} tokens"}
            rows.append(size | compare(stage_2(width, side, batch), **options))
    print(format_table(rows))


if __name__ == "__main__":
    main()
