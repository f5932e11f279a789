"""Measures stage 2 on a large codebook with and without token groups: parameters, CPU seconds, memory of the logits.

    python benchmarks/token_groups.py --codebook-size 16384 --groups 1 2 --repeats 5

The network is that of the base recipe: 4 layers of width 128. The steps run in turn (A B A B).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import process_time

import torch
from measuring import Stopwatch, format_table, interleave, read_cpu_name
from stage2_step import Ours, Task
from torch import Tensor

from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.transformer import TransformerConfig


@dataclass(frozen=True)
class GroupedTask(Task):
    """A task whose tokens are divided into groups."""

    num_token_groups: int = 1

    @property
    def network(self) -> TransformerConfig:
        return replace(super().network, num_token_groups=self.num_token_groups)


class Decoding:
    """A forward pass that computes the logits of all codes at all positions, as a step of decoding does.

    Args:
        step: The training step whose network is run.
    """

    def __init__(self, step: Ours) -> None:
        self.network, self.batch = step.module.transformer, step.batch

    @torch.inference_mode()
    def __call__(self, watch: Stopwatch) -> Tensor:
        config = self.network.config
        tokens = torch.full_like(self.batch.content, config.mask_token_id)
        positions = torch.arange(config.num_tokens).expand_as(tokens)
        logits = self.network.forward_at(tokens, self.batch.labels, positions)
        watch.mark("decode")
        return logits


def logit_bytes(config: BackboneConfig, masked: int) -> int:
    """Returns the bytes of the float32 logits of a training step with ``masked`` tokens to predict."""
    columns = config.vocabulary_size if config.num_token_groups == 1 else config.num_code_rows
    return 4 * masked * columns


def measure(tasks: Sequence[GroupedTask], *, repeats: int) -> list[dict[str, str]]:
    """Returns a row of the table for each task."""
    steps = {str(task.num_token_groups): Ours(task, "fp32") for task in tasks}
    decodings = {name: Decoding(step) for name, step in steps.items()}
    interleave({**steps}, repeats=1)  # warm-up
    seconds = {
        kind: {name: median(watch.total for watch in watches) for name, watches in found.items()}
        for kind, found in (
            ("train", interleave({**steps}, repeats=repeats, clock=process_time)),
            ("decode", interleave({**decodings}, repeats=repeats, clock=process_time)),
        )
    }
    rows = []
    for task, (name, step) in zip(tasks, steps.items(), strict=True):
        count = sum(each.numel() for each in step.module.transformer.parameters())
        rows.append(
            {
                "groups": name,
                "parameters": f"{count:,}",
                "logits of a training step": f"{logit_bytes(task.network, int(task.mask().sum())) / 1e6:,.1f} MB",
                "training step": f"{seconds['train'][name]:.3f} CPU s",
                "decoding forward pass": f"{seconds['decode'][name]:.3f} CPU s",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codebook-size", type=int, default=2**14, help="codes (%(default)s)")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2], help="token groups to compare (1 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size (%(default)s)")
    parser.add_argument("--grid", type=int, default=16, help="rows and columns of tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    sizes = {"embed_dim": 128, "mlp_dim": 512, "num_heads": 4, "num_classes": 10, "grid": (given.grid, given.grid)}
    tasks = [
        GroupedTask(given.batch_size, codebook_size=given.codebook_size, num_token_groups=groups, **sizes)
        for groups in given.groups
    ]
    print(f"{read_cpu_name()}, {given.threads} threads, torch {torch.__version__}, {given.codebook_size} codes")
    print(format_table(measure(tasks, repeats=given.repeats)))


if __name__ == "__main__":
    main()
