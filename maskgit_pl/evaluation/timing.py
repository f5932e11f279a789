"""Decoding times: Figure 4 of the paper, over the number of tokens with random weights, and those of models.

The tokenizer is not timed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from maskgit_pl.decoding import (
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.devices import describe_environment, device_name, find_device
from maskgit_pl.evaluation.evaluator import EvaluatedModel
from maskgit_pl.evaluation.folders import read_run_recipe, remove_untrained
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row, digest_of, shorten_digest
from maskgit_pl.evaluation.options import NUM_TOKENS, ReportOptions
from maskgit_pl.evaluation.pages import Page, figure_to_png, heading, markdown_table, paragraph
from maskgit_pl.evaluation.reconstruction import now
from maskgit_pl.networks.backbone import (
    AutoregressiveBackbone,
    Backbone,
    BackboneConfig,
    build_config,
    create_network,
)
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline.sharing import local_folder
from maskgit_pl.pretrained.networks import read_config
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.text import markdown, plain_label
from maskgit_pl.training.speed import read_training_time

METHODS = ("MaskGIT", "autoregressive, KV cache", "autoregressive, no cache")
BATCH_SIZES = (1, 64)  # of the times of a model
Decode: TypeAlias = Callable[[], Iterator[DecodingStep]]

SIZES = TransformerConfig(1024, 1000, (16, 16), embed_dim=256, depth=8, num_heads=8, mlp_dim=1024)  # for a CPU
# A point has at most 15 runs, and ends when another run would exceed 10 s in all; it has at least one run.
_SECONDS, _MAX_RUNS = 10.0, 15
_WARM_UP = 8  # steps before the clock starts

_COLOURS = {"MaskGIT": "#0d7d6c", "autoregressive, KV cache": "#d98b1f", "autoregressive, no cache": "#c0392b"}


def figure_4(
    run: Path | str | None = None,
    options: ReportOptions | None = None,
    *,
    num_tokens: Sequence[int] = NUM_TOKENS,
    bars: Bars = no_bars,
) -> Page:
    """Makes Figure 4: the time per image over the number of tokens, for autoregressive decoding and MaskGIT.

    Args:
        run: Run folder or pretrained folder whose sizes are timed, with random weights; None for sizes that suit a CPU.
        options: Folder of the results, and device; None for the defaults.
        num_tokens: Numbers N of tokens, all squares.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run does not exist.
        ValueError: if a number of tokens is not a square, or the device does not exist.
    """
    options = options or ReportOptions()
    config: BackboneConfig = SIZES
    if run is not None:
        folder = local_folder(run) / "transformer"
        config = build_config(read_config(folder, "transformer").get("network"), f"{folder / 'config.json'}: network")
    rows = measure_timings(
        Ledger(options.results / FILE_NAME),
        sizes=config,
        num_tokens=num_tokens,
        device=find_device(options.device),
        bars=bars,
    )
    return replace(make_timing_page(rows), folder=options.results)


def measure_timings(
    ledger: Ledger,
    *,
    sizes: BackboneConfig = SIZES,
    num_tokens: Sequence[int] = NUM_TOKENS,
    device: torch.device | str = "cpu",
    bars: Bars = no_bars,
) -> list[Row]:
    """Times each method at each N with batch size 1, and returns the points, sorted by N and method.

    ``sizes`` are those of the networks, without the grid. Points in the ledger are not measured again.
    """
    device = torch.device(device)
    for count in num_tokens:
        if count < 1 or math.isqrt(count) ** 2 != count:
            raise ValueError(f"num_tokens must be squares, such as 16 or 256, got {count}")
    rows, advance = [], bars("figure 4: points", len(METHODS) * len(set(num_tokens)))
    for count in sorted(set(num_tokens)):
        # Source of T: paper, Table 1: 12 steps from 1,024 tokens, 8 below, and at most one per token.
        num_steps = min(count, 12 if count >= 1024 else 8)
        # The key of a point is everything that changes the time.
        common = {"num_tokens": count, "network": _describe(sizes), **_describe_machine(device)}
        keys = {
            method: {"method": method, "num_steps": num_steps if method == "MaskGIT" else count, **common}
            for method in METHODS
        }
        measured = {method: row for method, key in keys.items() if (row := ledger.find("timing", key)) is not None}
        advance(len(measured))
        missing = [method for method in METHODS if method not in measured]
        decoders = _build_random_decoders(sizes, count, num_steps, device) if missing else {}
        for method, seconds in _time({method: decoders[method] for method in missing}, device):
            measured[method] = ledger.add("timing", {
                **keys[method], "seconds_per_image": median(seconds), "least": min(seconds), "runs": len(seconds),
                "commit": describe_environment()["commit"],
            })  # fmt: skip
            advance(1)
        rows += [measured[method] for method in METHODS]
    return rows


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
        key = {**digests, "num_steps": pipe.decoding.num_steps, "decoding": decoding, **_describe_machine(pipe.device)}
        row = ledger.find("cost", key)
        if row is None:
            decoders = {
                str(size): _build_decoder(
                    pipe.transformer.network, pipe.decoding, pipe.transformer.mask_schedule, pipe.device,
                    batch_size=size, negative=None if pipe.negative_model is None else pipe.negative_model.network,
                )
                for size in BATCH_SIZES
            }  # fmt: skip
            times = {f"batch_{size}": median(runs) / int(size) for size, runs in _time(decoders, pipe.device)}
            stage = model.pretrained.parent / "transformer"
            # Without a recipe, another model is never a seed of the same settings.
            recipe = remove_untrained(read_run_recipe(stage / "config.yaml")) or digests["transformer"]
            training = read_training_time(stage)
            row = ledger.add("cost", {
                **key, **times, "model": model.kind, "run": model.run,
                "backbone": pipe.transformer.network.config.backbone,
                "settings": shorten_digest(digest_of([recipe, digests["config"], key["num_steps"], decoding])),
                "training_seconds": training and training.cost,
                "training_device": training and training.device,
                "commit": describe_environment()["commit"],
            })  # fmt: skip
        rows.append(row)
        advance(1)
    return rows


def _describe_machine(device: torch.device) -> dict[str, str]:
    matmul = torch.get_float32_matmul_precision()
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": "float32" if matmul == "highest" else f"float32, matmul precision {matmul}",
        "kind": device.type,
    }


def _describe(sizes: BackboneConfig) -> str:
    """Returns the sizes and options of a network in words, which identify it in the ledger."""
    left_out = ("backbone", "attention", "grid", "class_dropout", "dropout", "condition_dim")
    words = [f"{field.name} {getattr(sizes, field.name)}" for field in fields(sizes) if field.name not in left_out]
    return ", ".join([sizes.backbone, *words])


def _time(decoders: Mapping[str, Decode], device: torch.device) -> Iterator[tuple[str, list[float]]]:
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
        start = now(device)
        deque(decoders[point](), maxlen=0)
        runs.append(now(device) - start)
        if len(runs) < _MAX_RUNS and sum(runs) + runs[-1] <= _SECONDS:
            waiting.append(point)
        else:
            yield point, runs


def _build_random_decoders(
    sizes: BackboneConfig, num_tokens: int, num_steps: int, device: torch.device
) -> dict[str, Decode]:
    """Returns a function per method that decodes one image, without guidance and with random weights."""
    changes: dict[str, Any] = {"condition_dim": 0, "grid": (math.isqrt(num_tokens),) * 2}
    networks = []
    # fork_rng keeps the random weights from changing the caller's generator.
    with torch.random.fork_rng(devices=[]), device:
        for attention in ("bidirectional", "causal"):
            config = replace(sizes, **changes | {"attention": attention})
            networks.append(create_network(config).eval().requires_grad_(requires_grad=False))
    bidirectional, causal = networks
    parallel = _build_decoder(bidirectional, DecodingConfig(num_steps), mask_schedules.build("cosine"), device)
    one_by_one = _build_decoder(causal, DecodingConfig(num_tokens, None), None, device)
    return dict(zip(METHODS, (parallel, one_by_one, partial(one_by_one, cache=False)), strict=True))


def _build_decoder(
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


def make_timing_page(rows: Sequence[Row]) -> Page:
    """Returns the page of ``measure_timings``: an explanation, the figure, and a table with the ratios."""
    first = rows[0]
    lines = {method: {row["num_tokens"]: row for row in rows if row["method"] == method} for method in METHODS}
    cells = []
    for count, maskgit_row in lines["MaskGIT"].items():
        points = [lines[method][count] for method in METHODS]
        seconds = [row["seconds_per_image"] for row in points]
        times = [f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms" for value in seconds]
        cells.append([
            str(count), str(maskgit_row["num_steps"]),
            *(f"{text} (n = {row['runs']})" for text, row in zip(times, points, strict=True)),
            *(f"{ratio:.{int(ratio < 9.95)}f}" for ratio in (value / seconds[0] for value in seconds[1:])),
        ])  # fmt: skip
    headings = ["N", "T of MaskGIT", *METHODS, "KV cache / MaskGIT", "no cache / MaskGIT"]
    text = [
        *heading("Figure 4: decoding time of autoregressive decoding and MaskGIT"),
        "![time per image over the number of tokens](figure-4.png)",
        "",
        *paragraph(
            "Time of the transformer per image with batch size 1, without guidance and without the tokenizer. Each",
            "value is the median of n runs, in which the methods took turns. Both methods use the same network with",
            "random weights, autoregressive decoding with a causal attention mask. MaskGIT decodes with the cosine",
            "schedule, the most confident tokens first; its first step, of an all-masked image, is computed, too.",
            f"Network: {markdown(first['network'])}, {markdown(first['dtype'])}. Machine:",
            f"{markdown(first['device'])}, torch {markdown(first['torch'])}. The paper reports ratios of 30 to 64",
            "on a GPU, on which a step for all tokens of an image takes about as long as a step for one. On a CPU, the",
            "time is proportional to the work, and a cache saves most of it.",
        ),
        "",
        *markdown_table(headings, cells, left=0),
    ]
    return Page("figure-4", text, rows, {"figure-4.png": _draw_timings(lines)})


def _draw_timings(lines: Mapping[str, Mapping[int, Row]]) -> bytes:
    """Draws the seconds per image over the number of tokens as a PNG, with a line per method.

    Source: paper, Figure 4.
    """
    page, counts = Figure(figsize=(8.8, 5.4), layout="constrained"), sorted(lines["MaskGIT"])
    axes, first = page.subplots(), lines["MaskGIT"][counts[0]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    steps = " and ".join(map(str, sorted({row["num_steps"] for row in lines["MaskGIT"].values()})))
    for method, points in lines.items():
        is_front = method == "MaskGIT"
        axes.plot(
            list(points), [row["seconds_per_image"] for row in points.values()], color=_COLOURS[method], marker="o",
            linewidth=3 if is_front else 1.8, zorder=3 if is_front else 2,
            label=f"MaskGIT, T = {steps}" if is_front else method,
        )  # fmt: skip
    axes.set_xticks(counts, [f"{count}\n{math.isqrt(count)} x {math.isqrt(count)}" for count in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.minorticks_off()
    axes.set(xlabel="tokens per image, N", ylabel="transformer time per image")
    axes.set_title(
        "Figure 4: autoregressive decoding and MaskGIT\n"
        f"{plain_label(first['network'])}; batch 1, {plain_label(first['dtype'])}\n"
        f"{plain_label(first['device'])}, torch {plain_label(first['torch'])}", fontsize=10, loc="left",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure_to_png(page)
