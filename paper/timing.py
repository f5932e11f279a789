"""Times of decoding, without the tokenizer: of models for Table 1, and the clock of Figure 4."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import median
from typing import TypeAlias

import torch

from maskgit_pl.decoding import (
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.devices import describe_environment, device_name
from maskgit_pl.evaluation import EvaluatedModel, trained_recipe
from maskgit_pl.evaluation.ledger import Ledger, Row, digest_of, shorten_digest
from maskgit_pl.networks.backbone import AutoregressiveBackbone, Backbone
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import MaskSchedule

BATCH_SIZES = (1, 64)  # of the times of a model
Decode: TypeAlias = Callable[[], Iterator[DecodingStep]]

# A point has at most 15 runs, and ends when another run would exceed 10 s in all; it has at least one run.
_SECONDS, _MAX_RUNS = 10.0, 15
_WARM_UP = 8  # steps before the clock starts


def measure_costs(ledger: Ledger, models: Sequence[EvaluatedModel], bars: Bars = no_bars) -> list[Row]:
    """Times the decoding of models, each with its own settings, and reads the time of their training.

    Returns:
        A row per model. ``batch_1`` and ``batch_64`` are seconds per image, of an autoregressive model with its cache.
        Models of equal ``settings`` differ in their seed only.
    """
    rows, advance = [], bars("times of decoding", len(models))
    for model in models:
        pipe, decoding = model.pipe, model.decoding_key(model.pipe.decoding)
        digests = {name: model.identity[name] for name in ("transformer", "config")}
        key = {**digests, "num_steps": pipe.decoding.num_steps, "decoding": decoding, **describe_machine(pipe.device)}
        row = ledger.find("cost", key)
        if row is None:
            decoders = {
                str(size): build_decoder(
                    pipe.transformer.network, pipe.decoding, pipe.transformer.mask_schedule, pipe.device,
                    batch_size=size, negative=None if pipe.negative_model is None else pipe.negative_model.network,
                )
                for size in BATCH_SIZES
            }  # fmt: skip
            times = {f"batch_{size}": median(runs) / int(size) for size, runs in time_decoders(decoders, pipe.device)}
            stage = model.pretrained.parent / "transformer"
            # Without a recipe, another model is never a seed of the same settings.
            recipe = trained_recipe(stage) or digests["transformer"]
            file = stage / "training_time.json"
            training = json.loads(file.read_text()) if file.is_file() else {}
            row = ledger.add("cost", {
                **key, **times, "model": model.kind, "run": model.run,
                "backbone": pipe.transformer.network.config.backbone,
                "settings": shorten_digest(digest_of([recipe, digests["config"], key["num_steps"], decoding])),
                "training_seconds": training.get("cost"),
                "training_device": training.get("device"),
                "commit": describe_environment()["commit"],
            })  # fmt: skip
        rows.append(row)
        advance(1)
    return rows


def describe_machine(device: torch.device) -> dict[str, str]:
    """Returns the columns of the ledger that tell what a time was measured on."""
    matmul = torch.get_float32_matmul_precision()
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": "float32" if matmul == "highest" else f"float32, matmul precision {matmul}",
        "kind": device.type,
    }


def time_decoders(decoders: Mapping[str, Decode], device: torch.device) -> Iterator[tuple[str, list[float]]]:
    """Yields the name of each point with the seconds of its runs, as soon as it has enough runs.

    The points take turns, so that a change in the speed of the machine affects all of them. The last run is
    the estimate of the next one.
    """
    for decode in decoders.values():  # the first calls allocate memory and choose kernels
        deque(islice(decode(), _WARM_UP), maxlen=0)
    seconds: dict[str, list[float]] = {point: [] for point in decoders}
    waiting = deque(decoders)
    while waiting:
        point = waiting.popleft()
        runs = seconds[point]
        start = _now(device)
        deque(decoders[point](), maxlen=0)
        runs.append(_now(device) - start)
        if len(runs) < _MAX_RUNS and sum(runs) + runs[-1] <= _SECONDS:
            waiting.append(point)
        else:
            yield point, runs


def _now(device: torch.device) -> float:
    """Returns the seconds of a clock, after the work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run asynchronously
    return time.perf_counter()


def build_decoder(
    network: Backbone,
    decoding: DecodingConfig,
    mask_schedule: MaskSchedule | None,
    device: torch.device,
    *,
    batch_size: int = 1,
    negative: Backbone | None = None,
) -> partial[Iterator[DecodingStep]]:
    """Returns a function that decodes a batch of images of all classes, one by one with a cache if it is causal."""
    seeds, scales = range(batch_size), decoding.scales()
    labels = [seed % network.config.num_classes for seed in seeds]  # images of a class share their first step
    if isinstance(network, AutoregressiveBackbone):
        one_by_one = decoding.build_autoregressive_decoder(network.config.num_tokens)
        model = ConditionalModel(network, device)
        return partial(decode_autoregressive, model, labels, seeds, decoder=one_by_one, scales=scales)
    model = ConditionalModel(network, device)  # without a cache of the first step
    if negative is not None:
        model = replace(model, negative=ConditionalModel(negative, device))
    if size := network.config.condition_dim:
        model = model.bind(torch.zeros(batch_size, size, device=device))
    return partial(decode_classes, model, labels, seeds, decoder=decoding.build_decoder(mask_schedule), scales=scales)
