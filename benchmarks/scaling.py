"""Counts the bytes that each of 8, 64 and 512 ranks holds and sends in a step, and compares them with the formulas.

    python benchmarks/scaling.py

One process trains the paper's models as rank 0: torch's ``fake`` process group sends nothing, while ``fully_shard``
and DistributedDataParallel work as on a cluster. benchmarks/README.md describes the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from collectives import CountedCollectives
from measuring import format_table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskgit_pl.estimates.run import step_time
from maskgit_pl.estimates.sharding import FLOAT, HALF, Group, Strategy, Traffic, ddp_traffic, fsdp_traffic, group_of
from maskgit_pl.estimates.transformer import Precision, block_group, mean_num_masked, root_group, step_flops
from maskgit_pl.networks.discriminator import Discriminator, DiscriminatorConfig
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.provenance import describe_environment
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.strategies import shard_blocks

PAPER = TransformerConfig(1024, 1000, (16, 16), class_dropout=0.0)
"""The transformer of recipes/transformer/paper-256.yaml."""

_STEP_BATCH, _RATE, _UTILIZATION = 256, 989e12, 0.4  # images per step; H100 in bfloat16, FLOP/s; fraction
_BANDWIDTHS = (12.5e9, 25e9, 50e9, 200e9)  # node with one port of 100, 200, 400 Gbit/s; 8 of 200


@dataclass(frozen=True)
class Counted:
    """The bytes of one micro-batch on rank 0, as counted and by the formulas.

    Args:
        model: ``tokenizer`` or ``transformer``.
        strategy: ``ddp`` or ``fsdp``.
        precision: Precision of the Trainer.
        ranks: Number of ranks n.
        shard: Bytes of trained weights on rank 0.
        expected_shard: ``shard`` by the formula.
        traffic: Bytes that each rank sends in the collectives that were called.
        expected: ``traffic`` by the formula.
        calls: Number of collectives.
    """

    model: str
    strategy: Strategy
    precision: Precision
    ranks: int
    shard: int
    expected_shard: int
    traffic: Traffic
    expected: Traffic
    calls: int

    def row(self) -> dict[str, str]:
        """Returns the row of the table."""
        return {
            "model": self.model,
            "strategy": f"{self.strategy}, {self.precision}",
            "ranks": str(self.ranks),
            "weights on rank 0, MB": f"{self.shard / 1e6:.3f}",
            "formula / counted": f"{self.expected_shard / self.shard:.4f}",
            "collectives": str(self.calls),
            "gathered, MB": f"{self.traffic.all_gather / 1e6:.1f}",
            "scattered, MB": f"{self.traffic.reduce_scatter / 1e6:.1f}",
            "all-reduced, MB": f"{self.traffic.all_reduce / 1e6:.1f}",
            "sent by a rank, MB": f"{self.traffic.total / 1e6:.1f}",
            "formula / counted ": f"{self.expected.total / self.traffic.total:.4f}",
        }


@contextmanager
def simulate_ranks(ranks: int) -> Iterator[None]:
    """Makes this process rank 0 of a group whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_transformer_fsdp(config: TransformerConfig, ranks: int, precision: Precision) -> Counted:
    """Counts a micro-batch of a few tokens under FSDP2; only the shard of this rank is allocated."""
    with torch.device("meta"):
        network = MaskedTransformer(config)
    shard_blocks(network, network.blocks, init_device_mesh("cpu", (ranks,)), precision=precision)
    # After sharding, only this rank's rows are allocated.
    network.to_empty(device="cpu")
    half = precision == "bf16-mixed"
    with CountedCollectives() as counted, torch.autocast("cpu", torch.bfloat16, enabled=half):
        _transformer_step(network.forward_masked, config)
    blocks, root = [block_group(config)] * config.depth, root_group(config)
    shards = (parameter.to_local() for parameter in network.parameters())  # type: ignore[attr-defined]  # DTensors
    held = sum(FLOAT * shard.numel() for shard in shards)
    return Counted(
        "transformer", "fsdp", precision, ranks, held, FLOAT * sum(group.shard(ranks) for group in (*blocks, root)),
        counted.traffic(ranks), fsdp_traffic(blocks, root, ranks, weight=HALF if half else FLOAT),
        sum(counted.calls.values()),
    )  # fmt: skip


def count_transformer_ddp(config: TransformerConfig, ranks: int) -> Counted:
    """Counts a micro-batch of a few tokens under DDP; bf16-mixed sends as much, because its gradients are float32."""
    network = _Masked(_build_empty(lambda: MaskedTransformer(config)))
    blocks, root = [block_group(config)] * config.depth, root_group(config)
    return _count_ddp("transformer", [network], ranks, [*blocks, root], lambda each: _transformer_step(each[0], config))


def count_tokenizer_ddp(config: VQGANConfig, image_size: int, ranks: int) -> Counted:
    """Counts a micro-batch of one image through both networks of stage 1 under DDP.

    The losses are plain sums, because the traffic depends only on the weights. The generator gets an image of 32 px,
    because its weights do not depend on the image size.
    """
    networks = [
        _build_empty(lambda: VQGAN(config)),
        _build_empty(
            lambda: Discriminator(DiscriminatorConfig(), in_channels=config.in_channels, image_size=image_size)
        ),
    ]

    def step(wrapped: Sequence[nn.Module]) -> None:
        output = wrapped[0](torch.rand(1, config.in_channels, 32, 32))
        (output.reconstruction.sum() + output.quantized.loss).backward()
        wrapped[1](torch.rand(1, config.in_channels, image_size, image_size)).sum().backward()

    return _count_ddp("tokenizer", networks, ranks, [group_of([network]) for network in networks], step)


def _count_ddp(
    model: str,
    networks: Sequence[nn.Module],
    ranks: int,
    groups: Sequence[Group],
    step: Callable[[Sequence[nn.Module]], None],
) -> Counted:
    counted = CountedCollectives()
    wrapped = [DistributedDataParallel(network, gradient_as_bucket_view=True) for network in networks]
    # A communication hook replaces DDP's all-reduce, which dispatch modes cannot see.
    for each in wrapped:
        counted.follow(each)
    with counted:
        step(wrapped)
    trained = [parameter for network in networks for parameter in network.parameters()]
    # DDP broadcasts the buffers before each forward pass.
    buffers = sum(buffer.nbytes for network in networks for buffer in network.buffers())
    held = sum(parameter.nbytes for parameter in trained)
    return Counted(
        model, "ddp", "32-true", ranks, held, FLOAT * sum(group.numel for group in groups),
        counted.traffic(ranks), ddp_traffic(groups, ranks, buffers=buffers), sum(counted.calls.values()),
    )  # fmt: skip


class _Masked(nn.Module):
    """A wrapper whose ``forward`` is ``forward_masked``: DDP wraps only ``forward``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Tensor, **options: str) -> Tensor:
        logits: Tensor = self.network.forward_masked(*arguments, **options)
        return logits


def _transformer_step(predict: Callable[..., Tensor], config: TransformerConfig) -> None:
    # Few tokens are enough: the traffic depends only on the weights.
    tokens = torch.zeros(1, min(4, config.num_tokens), dtype=torch.int64)
    logits = predict(tokens, tokens[:, 0], tokens == 0, vocabulary="all")
    logits.float().sum().backward()  # type: ignore[no-untyped-call]  # torch: untyped


def _build_empty(make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network with zero weights: no count depends on them."""
    with torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu").apply(_fill)


def _fill(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.zero_()


def count_all(config: TransformerConfig, vqgan: VQGANConfig, image_size: int, ranks: Sequence[int]) -> list[Counted]:
    """Counts every model with each of its strategies, for each number of ranks."""
    found: list[Counted] = []
    for number in ranks:
        with simulate_ranks(number):
            found.append(count_transformer_fsdp(config, number, "32-true"))
            found.append(count_transformer_fsdp(config, number, "bf16-mixed"))
            found.append(count_transformer_ddp(config, number))
            found.append(count_tokenizer_ddp(vqgan, image_size, number))
    return sorted(found, key=lambda one: (one.model, one.strategy, one.precision, one.ranks))


def estimate_times(counted: Sequence[Counted], config: TransformerConfig) -> list[dict[str, str]]:
    """Returns the calculated times of the transformer's work and of its traffic at several bandwidths."""
    # The head runs only on masked tokens, so the work depends on their mean number.
    masked = mean_num_masked(mask_schedules.build("cosine"), config.num_tokens)
    rows = []
    for one in (one for one in counted if one.model == "transformer"):
        batch = max(_STEP_BATCH, one.ranks)  # a rank has at least one image
        flops = step_flops(config, images=batch, masked=masked * batch)
        times = [
            step_time(flops, one.traffic, ranks=one.ranks, rate=_RATE * _UTILIZATION, bandwidth=each)
            for each in _BANDWIDTHS
        ]
        rows.append(
            {
                "strategy": f"{one.strategy}, {one.precision}",
                "ranks": str(one.ranks),
                "global batch": str(batch),
                "work, ms": f"{1e3 * times[0].computing:.2f}",
                **{
                    f"traffic at {each / 1e9:g} GB/s, ms": f"{1e3 * time.communicating:.1f}"
                    for each, time in zip(_BANDWIDTHS, times, strict=True)
                },
            }
        )
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="numbers of ranks (%(default)s)")
    parser.add_argument("--depth", type=int, default=PAPER.depth, help="layers of the transformer (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Counts and prints the tables."""
    arguments = _arguments(argv)
    config = TransformerConfig(1024, 1000, (16, 16), depth=arguments.depth, class_dropout=0.0)
    counted = count_all(config, VQGANConfig(3), 256, arguments.ranks)
    print(f"torch {torch.__version__}; one process as rank 0 of a simulated group; one micro-batch\n")
    print(format_table([one.row() for one in counted]))
    print(
        f"\nCalculated, not measured: the transformer's step in one micro-batch, its work at {_UTILIZATION:.0%} of "
        f"{_RATE / 1e12:g} TFLOP/s:\n"
    )
    print(format_table(estimate_times(counted, config)))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": describe_environment(), "counted": [asdict(one) for one in counted]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
