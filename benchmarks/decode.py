"""Measures decoding without a tokenizer: ours, two peers, and an autoregressive decoder.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --threads 2 --repeats 5 --json decode.json
    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --threads 1 --clock cpu --dtype bfloat16 --batch-size 8

benchmarks/README.md describes the rows and the columns of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from measuring import CLOCKS, Contender, build_parser, count_work, measure, start, write_report
from peers import BERT, ENCODER, NUM_STEPS, BertPeer, Decode, EncoderPeer, Task, build_plain, list_installed
from torch import Tensor

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    ConditionalModel,
    FirstStepLogits,
    ParallelDecoder,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.decoding.guidance import guidance_scales, guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.kernels import feed_forward, set_packing
from maskgit_pl.networks.transformer import AutoregressiveTransformer, Block, MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules

_CPU = torch.device("cpu")
_AUTOREGRESSIVE = "autoregressive, KV cache"
_UNPACKED = "ours, weights not packed"
_LINEAR, _PRODUCTS = "only the linear layers of ours", "only linear layers and attention of ours"


def build_network_config(task: Task) -> TransformerConfig:
    """Returns the task's network configuration with a null class, which guidance needs."""
    return replace(task.network, class_dropout=0.1)


class Ours:
    """Our parallel decoder, always with the same classes and noise.

    Args:
        network: Network that predicts the codes.
        task: Sizes and batch.
        hit: True if the first step of the classes is cached from an earlier run.
        guidance: Guidance schedule.
    """

    def __init__(
        self,
        network: MaskedTransformer,
        task: Task,
        *,
        hit: bool = False,
        guidance: dict[str, Any] | str = "constant",
    ) -> None:
        self.network, self.hit = network, hit
        self.config = network.config
        self.decoder = ParallelDecoder(
            mask_schedules.build("cosine"), token_selectors.build("confidence"), num_steps=NUM_STEPS
        )
        self.scales = guidance_scales(guidance_schedules.build(guidance), NUM_STEPS)
        # Room for 1000 classes and the null class.
        self.first = FirstStepLogits(
            network, num_tokens=self.config.num_tokens, mask_token_id=self.config.mask_token_id, max_labels=1001
        )
        self.model = ConditionalModel.from_network(network, _CPU, first_step_logits=self.first)
        self.seeds = list(range(task.batch))
        self.labels = [seed % task.num_classes for seed in self.seeds]
        if hit:
            self()  # fills the cache of first steps

    def __call__(self) -> Tensor:
        # Without this, the second round would already find the first step in the cache.
        if not self.hit:
            self.first.clear()
        *_, last = decode_classes(
            self.model,
            self.labels,
            self.seeds,
            decoder=self.decoder,
            scales=self.scales,
        )
        return last.tokens


def build_autoregressive(network: MaskedTransformer, task: Task) -> Decode:
    """Returns an autoregressive decoder in raster order with cached keys and values, of the same weights."""
    causal = make_autoregressive(network)
    num_tokens, seeds = causal.config.num_tokens, list(range(task.batch))
    labels = [seed % task.num_classes for seed in seeds]
    model, decoder = ConditionalModel.from_network(causal, _CPU), AutoregressiveDecoder(num_tokens)

    def decode() -> Tensor:
        *_, last = decode_autoregressive(model, labels, seeds, decoder=decoder, scales=[0.0] * num_tokens, cache=True)
        return last.tokens

    return decode


def make_autoregressive(network: MaskedTransformer) -> AutoregressiveTransformer:
    """Returns an autoregressive network with the same weights."""
    # Built without memory on the meta device; the weights are shared, not copied.
    with torch.device("meta"):
        causal = AutoregressiveTransformer(replace(network.config, attention="causal"))
    causal.load_state_dict(network.state_dict(), assign=True)
    return causal.eval().requires_grad_(requires_grad=False)


def build_products(network: MaskedTransformer, task: Task, *, attention: bool) -> Decode:
    """Returns the linear layers of all blocks and steps, with attention or without: a limit of the decoding's time."""
    config = network.config
    x = torch.randn(task.batch, config.num_tokens + 1, config.embed_dim).to(network.head_bias.dtype)

    @torch.no_grad()
    def run() -> Tensor:
        for _ in range(NUM_STEPS):
            for block in cast("Sequence[Block]", network.blocks):
                heads = block.qkv(x)
                attended = block._attend(*block._heads(heads, 3)) if attention else x
                feed_forward(block.proj(attended), block.fc1, block.fc2)
        return torch.zeros(task.batch, config.num_tokens, dtype=torch.int64)

    return run


def list_contenders(task: Task, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Decode]]:
    """Returns functions that build each decoder, by name; ours and the autoregressive ones share their weights."""
    # Seeded: every run of the benchmark measures the same weights.
    torch.manual_seed(0)
    network = MaskedTransformer(build_network_config(task)).eval().requires_grad_(requires_grad=False).to(dtype)
    unpacked = copy.deepcopy(network)
    set_packing(network, enabled=True)
    exact = partial(Ours, network, task)
    contenders: dict[str, Callable[[], Decode]] = {
        "ours": exact,
        "ours, first step cached": partial(exact, hit=True),
        "ours, guided": partial(exact, guidance={"name": "linear", "scale": 3.0}),
        _UNPACKED: lambda: Ours(unpacked, task),
        _LINEAR: lambda: build_products(network, task, attention=False),
        _PRODUCTS: lambda: build_products(network, task, attention=True),
        ENCODER: lambda: build_plain(EncoderPeer(task).to(dtype), task),
        BERT: lambda: build_plain(BertPeer(task).to(dtype), task),
        _AUTOREGRESSIVE: lambda: build_autoregressive(network, task),
    }
    return contenders


def build_contender(name: str, decode: Decode, dtype: torch.dtype) -> Contender:
    """Returns a decoder with its work."""
    return Contender(str(dtype).removeprefix("torch."), name, decode, count_work(decode), dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    names = list(list_contenders(Task(batch=1, depth=1)))
    parser = build_parser(__doc__, batch_size=1, depth=24)
    listed = f"contenders besides ours: {'; '.join(names[1:])}"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=listed)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights (%(default)s)")
    arguments = parser.parse_args(argv)
    start(arguments)
    task, dtype = Task(batch=arguments.batch_size, depth=arguments.depth), getattr(torch, arguments.dtype)
    print(f"{task.describe()}, {NUM_STEPS} steps, {arguments.dtype}, {arguments.clock} time")
    chosen = list_installed([name for name in names if arguments.only is None or name in ("ours", *arguments.only)])
    builders = list_contenders(task, dtype)
    contenders = [build_contender(name, builders[name](), dtype) for name in chosen]
    measured = measure(contenders, repeats=arguments.repeats, clock=CLOCKS[arguments.clock])
    write_report(arguments, measured, images=task.batch)


if __name__ == "__main__":
    main()
