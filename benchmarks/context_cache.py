"""Measures the CPU seconds that `context_cache` saves, in a small trained model and in one of the released size.

    python benchmarks/context_cache.py --run runs/fashion-mnist-cosine

Each round decodes with every value in turn. The table shows the least CPU seconds per image, the median over the rounds
of the ratio to `context_cache` 1 in the same round, and the fraction of tokens that stay the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import format_table, read_cpu_name
from torch import Tensor

from maskgit_pl.decoding import ConditionalModel, DecodingConfig, decode_classes
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.pretrained import load_transformer
from maskgit_pl.provenance import describe_environment
from maskgit_pl.schedules import mask_schedules

_VALUES = (1, 2, 4)
_STEPS = 8


def decode(network: MaskedTransformer, *, context_cache: int, batch: int, guidance: float) -> tuple[Tensor, float]:
    """Decodes a batch, always with the same classes and noise.

    Returns:
        Tokens (B, N), and the CPU seconds of the decoding.
    """
    decoding = DecodingConfig(_STEPS, guidance={"name": "constant", "scale": guidance})
    # CPU time, because other programs on the machine hardly change it.
    start = time.process_time()
    *_, last = decode_classes(
        ConditionalModel.from_network(network, torch.device("cpu"), context_cache=context_cache),
        [seed % network.config.num_classes for seed in range(batch)],
        list(range(batch)),
        decoder=decoding.build_decoder(mask_schedules.build("cosine")),
        scales=decoding.scales(),
    )
    return last.tokens, time.process_time() - start


def measure(network: MaskedTransformer, *, name: str, batch: int, guidance: float, rounds: int) -> list[dict[str, Any]]:
    """Measures one model and returns one row per value; the first round does not count."""
    seconds: dict[int, list[float]] = {value: [] for value in _VALUES}
    tokens: dict[int, Tensor] = {}
    for number in range(rounds + 1):
        for value in _VALUES:
            tokens[value], spent = decode(network, context_cache=value, batch=batch, guidance=guidance)
            if number:  # round 0 warms up
                seconds[value].append(spent)
    # Ratios within a round: the speed of the machine changes between rounds.
    ratios = {value: [own / exact for own, exact in zip(seconds[value], seconds[1], strict=True)] for value in _VALUES}
    return [
        {
            "model": name,
            "guidance": guidance,
            "batch": batch,
            "context_cache": value,
            "n": rounds,
            "CPU s per image": f"{min(seconds[value]) / batch:.3g}",
            "time / exact": f"{median(ratios[value]):.2f}",
            "same tokens": f"{(tokens[value] == tokens[1]).float().mean():.1%}",
        }
        for value in _VALUES
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, metavar="RUN", help="a trained run (default: the released size only)")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size for the trained run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if args.run is not None:
        network = load_transformer(args.run / "pretrained" / "transformer").network
        if not isinstance(network, MaskedTransformer):
            raise ValueError(
                f"--run {args.run}: an autoregressive model has no context cache; name a run that decodes in parallel"
            )
        # Guidance decodes each image twice, with and without its class.
        for guidance in (0.0, 1.0):
            rows += measure(network, name=args.run.name, batch=args.batch_size, guidance=guidance, rounds=args.repeats)
    released = MaskedTransformer(TransformerConfig(1024, 1000, (16, 16))).eval().requires_grad_(requires_grad=False)
    rows += measure(released, name="released size, random weights", batch=1, guidance=0.0, rounds=args.repeats)
    print(f"{read_cpu_name()}, 1 thread, float32, torch {torch.__version__}, {_STEPS} steps")
    print(format_table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, "environment": describe_environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
