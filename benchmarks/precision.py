"""Measures how many tokens stay the same in bfloat16, with the same seeds.

    python benchmarks/precision.py --run runs/fashion-mnist-adaln

The table compares the final tokens with those of float32: the fraction of equal tokens, and of images all of whose
tokens are equal. The CPU seconds are those of the decoding, without the tokenizer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import format_table
from torch import Tensor

from maskgit_pl import MaskGIT
from maskgit_pl.devices import cpu_name


def decode(pipe: MaskGIT, *, num_images: int) -> tuple[Tensor, float]:
    """Decodes images of all classes in turn with the seeds 0, 1, ...

    Returns:
        Tokens (B, N), and the CPU seconds.
    """
    labels = [number % len(pipe.class_names) for number in range(num_images)]
    before = time.process_time()
    recording = pipe.record(labels, seed=range(num_images))
    return recording.steps[-1].tokens, time.process_time() - before


def measure(run: Path, *, num_images: int) -> list[dict[str, str]]:
    """Decodes in float32 and bfloat16; returns the rows of the table."""
    exact = MaskGIT.from_pretrained(run).to("cpu")
    other = MaskGIT.from_pretrained(run).to("cpu", dtype=torch.bfloat16)
    expected, seconds = decode(exact, num_images=num_images)
    tokens, other_seconds = decode(other, num_images=num_images)
    same = tokens == expected
    shares = [f"{100 * equal.float().mean():.1f} %" for equal in (same, same.all(1))]
    columns = ("precision", "CPU ms per image", "equal tokens", "equal images")
    return [
        dict(zip(columns, (precision, f"{1000 * taken / num_images:.1f}", *shown), strict=True))
        for precision, taken, shown in (("float32", seconds, ["-", "-"]), ("bfloat16", other_seconds, shares))
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run, or pretrained folder")
    parser.add_argument("--num-images", type=int, default=500, help="images per row (500)")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    print(f"{cpu_name()}, 1 thread, torch {torch.__version__}, {args.num_images} images")
    print(format_table(measure(args.run, num_images=args.num_images)))


if __name__ == "__main__":
    main()
