"""Measures decoding without a tokenizer: ours, two peers, and an autoregressive decoder.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --repeats 5 --json decode.json
    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py --dtype bfloat16 --batch-size 8

benchmarks/README.md describes the rows and the columns of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from measuring import Contender, build_parser, compare, count_work, start
from peers import BERT, ENCODER, NUM_STEPS, BertPeer, Decode, EncoderPeer, Task, build_plain, list_installed
from torch import Tensor

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    ConditionalModel,
    DecodingConfig,
    FirstStepLogits,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.networks.kernels import set_packing
from maskgit_pl.networks.transformer import AutoregressiveTransformer, MaskedTransformer
from maskgit_pl.schedules import mask_schedules

_CPU = torch.device("cpu")


def build_ours(
    network: MaskedTransformer, task: Task, *, first_step_cached: bool = False, device: torch.device = _CPU
) -> Decode:
    """Returns our parallel decoder, always with the same classes and noise.

    Args:
        network: Network that predicts the codes.
        task: Sizes and batch.
        first_step_cached: True if the first step of the classes is known from an earlier run.
        device: Device of the network.
    """
    config, decoding = network.config, DecodingConfig(NUM_STEPS)
    decoder, scales = decoding.build_decoder(mask_schedules.build("cosine")), decoding.scales()
    cache = FirstStepLogits(
        network, num_tokens=config.num_tokens, mask_token_id=config.mask_token_id, max_labels=task.batch
    )
    model = ConditionalModel.from_network(network, device, first_step_logits=cache if first_step_cached else None)
    seeds, labels = list(range(task.batch)), task.labels

    def decode() -> Tensor:
        *_, last = decode_classes(model, labels, seeds, decoder=decoder, scales=scales)
        return last.tokens

    return decode


def build_autoregressive(network: MaskedTransformer, task: Task) -> Decode:
    """Returns an autoregressive decoder in raster order with cached keys and values, of the same weights."""
    # Built without memory on the meta device; the weights are shared, not copied.
    with torch.device("meta"):
        causal = AutoregressiveTransformer(replace(network.config, attention="causal"))
    causal.load_state_dict(network.state_dict(), assign=True)
    causal.eval().requires_grad_(requires_grad=False)
    num_tokens, seeds = causal.config.num_tokens, list(range(task.batch))
    model, decoder = ConditionalModel.from_network(causal, _CPU), AutoregressiveDecoder(num_tokens)
    scales = [0.0] * num_tokens

    def decode() -> Tensor:
        *_, last = decode_autoregressive(model, task.labels, seeds, decoder=decoder, scales=scales, cache=True)
        return last.tokens

    return decode


def list_builders(task: Task, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Decode]]:
    """Returns functions that build each decoder, by name; ours and the autoregressive one share their weights."""
    # Seeded: every run of the benchmark measures the same weights.
    torch.manual_seed(0)
    network = MaskedTransformer(task.network).eval().requires_grad_(requires_grad=False).to(dtype)
    unpacked = copy.deepcopy(network)
    set_packing(network, enabled=True)
    return {
        "ours": lambda: build_ours(network, task),
        "ours, first step cached": lambda: build_ours(network, task, first_step_cached=True),
        "ours, weights not packed": lambda: build_ours(unpacked, task),
        ENCODER: lambda: build_plain(EncoderPeer(task).to(dtype), task),
        BERT: lambda: build_plain(BertPeer(task).to(dtype), task),
        "autoregressive, KV cache": lambda: build_autoregressive(network, task),
    }


def build_contender(name: str, task: Task, decode: Decode, dtype: torch.dtype) -> Contender:
    """Returns a decoder with its work after its first run, which fills the cache of the first step."""
    decode()
    return Contender(str(dtype).removeprefix("torch."), name, decode, task.batch, count_work(decode), dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    names = list(list_builders(Task(batch=1, depth=1)))
    parser = build_parser(__doc__, batch_size=1, depth=24)
    listed = f"contenders besides ours: {'; '.join(names[1:])}"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=listed)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights (%(default)s)")
    arguments = parser.parse_args(argv)
    start(arguments)
    task, dtype = Task(batch=arguments.batch_size, depth=arguments.depth), getattr(torch, arguments.dtype)
    print(f"{task.describe()}, {NUM_STEPS} steps, {arguments.dtype}")
    builders = list_builders(task, dtype)
    chosen = list_installed([name for name in names if name in ("ours", *arguments.only)])
    compare(arguments, [build_contender(name, task, builders[name](), dtype) for name in chosen])


if __name__ == "__main__":
    main()
