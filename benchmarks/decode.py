"""Measures decoding without a tokenizer: ours with both backbones, networks of peers, and an autoregressive decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from measuring import Contender, build_parser, compare, count_work, start
from peers import NUM_STEPS, PEERS, Decode, Task, build_peer, build_plain, list_available
from torch import Tensor

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    ConditionalModel,
    DecodingConfig,
    FirstStepLogits,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.networks.backbone import Backbone
from maskgit_pl.networks.kernels import set_packing
from maskgit_pl.networks.transformer import AutoregressiveTransformer
from maskgit_pl.schedules import mask_schedules

_CPU = torch.device("cpu")
_AUTOREGRESSIVE = "autoregressive, KV cache"
NAMES = (
    "ours", "ours, class seen", "ours, weights not packed", "ours, adaln", "ours, adaln, class seen", *PEERS,
    _AUTOREGRESSIVE,
)  # fmt: skip


def build_ours(
    network: Backbone, task: Task, *, first_step_cached: bool = False, device: torch.device = _CPU
) -> Decode:
    """Returns our parallel decoder, always with the same classes and noise.

    Args:
        network: Network that predicts the codes.
        task: Sizes and batch.
        first_step_cached: True if the first step of the classes is known from an earlier run.
        device: Device of the network.
    """
    decoding = DecodingConfig(NUM_STEPS)
    decoder, scales = decoding.build_decoder(mask_schedules.build("cosine")), decoding.scales()
    cache = FirstStepLogits(network) if first_step_cached else None
    model = ConditionalModel(network, device, cache)
    seeds, labels = list(range(task.batch)), task.labels

    def decode() -> Tensor:
        *_, last = decode_classes(model, labels, seeds, decoder=decoder, scales=scales)
        return last.tokens

    return decode


def build_autoregressive(network: Backbone, task: Task) -> Decode:
    """Returns an autoregressive decoder in raster order with cached keys and values, of the same weights."""
    # Built without memory on the meta device; the weights are shared, not copied.
    with torch.device("meta"):
        causal = AutoregressiveTransformer(replace(network.config, attention="causal"))
    causal.load_state_dict(network.state_dict(), assign=True)
    causal.eval().requires_grad_(requires_grad=False)
    set_packing(causal, enabled=True)
    num_tokens, seeds = causal.config.num_tokens, list(range(task.batch))
    model, decoder = ConditionalModel(causal, _CPU), AutoregressiveDecoder(num_tokens)
    scales = [0.0] * num_tokens

    def decode() -> Tensor:
        *_, last = decode_autoregressive(model, task.labels, seeds, decoder=decoder, scales=scales, cache=True)
        return last.tokens

    return decode


@cache
def create_network(task: Task, dtype: torch.dtype, *, packed: bool) -> Backbone:
    """Creates a network, always with the same weights."""
    torch.manual_seed(0)
    network = task.network.create().eval().requires_grad_(requires_grad=False).to(dtype)
    set_packing(network, enabled=packed)
    return network


def build(name: str, task: Task, dtype: torch.dtype, peers: Path | None = None) -> Decode:
    """Builds a decoder by name; those of a backbone have the same weights."""
    if name in PEERS:
        assert peers is not None
        return build_plain(build_peer(name, task, peers).to(dtype), task)
    task = replace(task, backbone="adaln" if "adaln" in name else "bert")
    network = create_network(task, dtype, packed="not packed" not in name)
    if name == _AUTOREGRESSIVE:
        return build_autoregressive(network, task)
    return build_ours(network, task, first_step_cached="class seen" in name)


def build_contender(name: str, task: Task, dtype: torch.dtype, peers: Path | None = None) -> Contender:
    """Returns a decoder with its work."""
    decode = build(name, task, dtype, peers)
    if name.startswith("ours"):
        decode()  # packs the weights, and fills the cache of the first step
    return Contender(str(dtype).removeprefix("torch."), name, decode, task.batch, count_work(decode), dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = build_parser(__doc__, batch_size=1, depth=24)
    listed = f"contenders besides ours, of: {'; '.join(NAMES[1:])} (all but the last, which takes ten times as long)"
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES[:-1], metavar="NAME", help=listed)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights (%(default)s)")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="folder with clones of the peers")
    arguments = start(parser, argv)
    task, dtype = Task(batch=arguments.batch_size, depth=arguments.depth), getattr(torch, arguments.dtype)
    print(f"{task.describe()}, {NUM_STEPS} steps, {arguments.dtype}")
    names = list_available([name for name in NAMES if name in ("ours", *arguments.only)], arguments.peers)
    compare(arguments, [build_contender(name, task, dtype, arguments.peers) for name in names])


if __name__ == "__main__":
    main()
