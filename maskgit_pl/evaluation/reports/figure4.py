"""Figure 4 of the paper: what an image takes the transformer, sequential decoding against MaskGIT, by its tokens.

The networks have random weights, which take as long as trained ones, and there is no tokenizer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from maskgit_pl.checks import build_dataclass
from maskgit_pl.decoding import DecodingConfig, DecodingStep, SequentialDecoder, decode_classes, decode_in_order
from maskgit_pl.evaluation.bench.ledger import Ledger, Row
from maskgit_pl.evaluation.drawing import LineEnd, name_lines, save_figure
from maskgit_pl.evaluation.reports.tables import paragraph
from maskgit_pl.networks.causal import CausalTransformer
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.pretrained import read_config
from maskgit_pl.provenance import describe_environment, device_name
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.text import markdown, plain_label, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NUM_TOKENS", "SIZES", "Method", "Timing", "as_markdown", "draw", "measure", "sizes_of"]

Method = Literal["MaskGIT", "sequential, KV cache", "sequential, no cache"]
_METHODS: tuple[Method, ...] = get_args(Method)

SIZES = TransformerConfig(1024, 1000, (16, 16), width=256, depth=8, num_heads=8, mlp_width=1024)
"""Small enough for a processor: 1,024 tokens without a cache take it minutes."""
NUM_TOKENS = (16, 64, 256, 1024)

_KEY = ("method", "num_tokens", "num_steps", "network", "device", "torch")
_LATER = ("dtype", "kind")  # which ledgers of older versions lack
_SECONDS, _MOST = 10.0, 15  # of the runs of a point, unless one takes longer; runs of a point
_WARM_UP = 8  # tokens
_COLOURS = {"MaskGIT": "#0d7d6c", "sequential, KV cache": "#d98b1f", "sequential, no cache": "#c0392b"}
_TICKS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
_INK = "#444444"
_EXPLANATIONS = {  # by the kind of the device
    "cpu": "The paper's 30 to 64 times are a GPU's, which computes the tokens of an image in about the time of one; on "
    "a CPU, as here, time goes with the work, of which a cache saves the most.",
    "cuda": "This is a GPU, as in the paper, whose figure says 30 to 64 times. As long as the tokens of an image do "
    "not fill it, a step of all tokens takes about as long as a step of one, and the factor nears N / T; beyond, time "
    "goes with the work.",
}
_OTHER_DEVICE = "The paper's 30 to 64 times are a GPU's."
_STRIP = 0.2  # of the axes' height


@dataclass(frozen=True)
class Timing:
    """A point of the figure.

    Args:
        method: How the tokens were found.
        num_tokens: N.
        num_steps: T: forward passes.
        seconds: Of an image: the median of the runs.
        least: Of the quickest run.
        runs: How many.
        network: Its sizes, in words.
        device: In words: the name of the GPU, or of the CPU with its threads.
        torch: Its version.
        dtype: Of weights and products.
        kind: Of the device: cpu, cuda ...
    """

    method: Method
    num_tokens: int
    num_steps: int
    seconds: float
    least: float
    runs: int
    network: str
    device: str
    torch: str
    dtype: str
    kind: str


def sizes_of(folder: Path) -> TransformerConfig:
    """Returns the sizes of a transformer, from the folder that it was saved to.

    Raises:
        ValueError: if its config.json is not one of a transformer.
    """
    config = read_config(folder, "transformer")
    return build_dataclass(TransformerConfig, config.get("network"), f"{folder / 'config.json'}: network")


def measure(
    file: Path,
    *,
    sizes: TransformerConfig = SIZES,
    num_tokens: Sequence[int] = NUM_TOKENS,
    device: torch.device | str = "cpu",
    on_point: Callable[[Timing], object] = lambda timing: None,
) -> list[Timing]:
    """Times every method at every N, batch 1; what the file holds is not measured again.

    Runs of the methods take turns, so that a machine that slows down slows all of them.

    Args:
        file: A CSV file, in which a point is as soon as it is measured.
        sizes: Of the networks; their grid and attention are those of each point.
        num_tokens: N of the points: squares.
        device: Where.
        on_point: Told each point, measured or found.

    Returns:
        The points, by N and method.

    Raises:
        ValueError: Not a square, or a file that holds something else.
    """
    for count in num_tokens:
        if count < 1 or math.isqrt(count) ** 2 != count:
            raise ValueError(f"num_tokens: squares are needed, such as 16 or 256, got {count}")
    ledger = Ledger(file, _KEY, digests=_LATER, results=("seconds_per_image", "least", "runs"))
    device = torch.device(device)
    timings = []
    for count in sorted(set(num_tokens)):
        points = {method: _point(method, count, sizes, device) for method in _METHODS}
        missing = [method for method, point in points.items() if ledger.find(**point) is None]
        for method, seconds in _measured(missing, sizes, count, device) if missing else ():
            ledger.add({**points[method], **_numbers(seconds)})
            on_point(_timing(ledger, points[method]))
        for method, point in points.items():
            timings.append(_timing(ledger, point))
            if method not in missing:
                on_point(timings[-1])
    return timings


def _point(method: Method, num_tokens: int, sizes: TransformerConfig, device: torch.device) -> dict[str, Any]:
    """What says which point it is."""
    network = (
        f"{sizes.depth} layers x {sizes.width}, MLP {sizes.mlp_width}, {sizes.num_heads} heads, "
        f"{sizes.num_codes} codes, {sizes.num_classes} classes"
    )
    matmul = torch.get_float32_matmul_precision()
    return {
        "method": method,
        "num_tokens": num_tokens,
        "num_steps": _steps(num_tokens) if method == "MaskGIT" else num_tokens,
        "network": network,
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": "float32" if matmul == "highest" else f"float32, matmul precision {matmul}",
        "kind": device.type,
    }


def _steps(num_tokens: int) -> int:
    """The T of MaskGIT: as in the paper, 12 at 1,024 tokens and 8 below."""
    return min(num_tokens, 12 if num_tokens >= 1024 else 8)


def _numbers(seconds: Sequence[float]) -> dict[str, Any]:
    commit = describe_environment()["commit"]
    return {"seconds_per_image": median(seconds), "least": min(seconds), "runs": len(seconds), "commit": commit}


def _timing(ledger: Ledger, point: dict[str, Any]) -> Timing:
    row: Row | None = ledger.find(**point)
    assert row is not None
    return Timing(**point, seconds=float(row["seconds_per_image"]), least=float(row["least"]), runs=int(row["runs"]))


def _measured(
    methods: Sequence[Method], sizes: TransformerConfig, num_tokens: int, device: torch.device
) -> Iterator[tuple[Method, list[float]]]:
    """The seconds of each run of some methods, each as soon as it has enough of them."""
    decoders = _decoders(sizes, num_tokens, device)
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    for method in methods:
        for _ in zip(range(_WARM_UP), decoders[method](), strict=False):
            pass
    waiting = deque(methods)
    while waiting:
        method = waiting.popleft()
        own = seconds[method]
        own.append(_seconds(decoders[method], device))
        if len(own) < _MOST and sum(own) + own[-1] <= _SECONDS:
            waiting.append(method)
        else:
            yield method, own


def _seconds(decode: Callable[[], Iterator[DecodingStep]], device: torch.device) -> float:
    """What a run takes."""
    _wait(device)
    start = time.perf_counter()
    deque(decode(), maxlen=0)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decoders(
    sizes: TransformerConfig, num_tokens: int, device: torch.device
) -> dict[Method, Callable[[], Iterator[DecodingStep]]]:
    """The methods, without guidance; both networks have the same weights."""
    side, steps = math.isqrt(num_tokens), _steps(num_tokens)
    config = replace(sizes, grid=(side, side), attention="bidirectional")
    with torch.random.fork_rng(devices=[]), device:
        masked = MaskedTransformer(config).eval().requires_grad_(requires_grad=False)
        causal = CausalTransformer(replace(config, attention="causal")).eval().requires_grad_(requires_grad=False)
    causal.load_state_dict(masked.state_dict())
    in_order = partial(
        decode_in_order,
        causal,
        [0],
        [0],
        decoder=SequentialDecoder(num_tokens),
        scales=[0.0] * num_tokens,
        null_label=None,
        device=device,
    )
    in_parallel = partial(
        decode_classes,
        masked,
        [0],
        [0],
        decoder=DecodingConfig(steps).decoder(mask_schedules.build("cosine")),
        scales=[0.0] * steps,
        grid=(side, side),
        mask_token_id=config.mask_token_id,
        null_label=None,
        device=device,
    )
    return {
        "MaskGIT": in_parallel,
        "sequential, KV cache": in_order,
        "sequential, no cache": partial(in_order, cache=False),
    }


def _by_method(timings: Sequence[Timing]) -> dict[Method, dict[int, Timing]]:
    return {method: {timing.num_tokens: timing for timing in timings if timing.method == method} for method in _METHODS}


def draw(timings: Sequence[Timing], path: Path) -> None:
    """Writes the PNG: seconds of an image against its tokens, a line a method, its factor at each point.

    Args:
        timings: As of ``measure``.
        path: The file.

    Source: paper, Figure 4.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(8.8, 5.4), layout="constrained")
    axes = page.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lines = _by_method(timings)
    for method, points in lines.items():
        axes.plot(
            list(points), [timing.seconds for timing in points.values()], color=_COLOURS[method],
            linewidth=3 if method == "MaskGIT" else 1.8, marker="o", markersize=6 if method == "MaskGIT" else 4.5,
            zorder=3 if method == "MaskGIT" else 2,
        )  # fmt: skip
    _finish(axes, timings)
    _write_factors(axes, lines)
    ends: dict[str, LineEnd] = {method: _end(method, points) for method, points in lines.items()}
    name_lines(page, axes, ends, least=0.09)
    save_figure(page, path)


def _end(method: Method, points: dict[int, Timing]) -> LineEnd:
    last = points[max(points)]
    steps = sorted({point.num_steps for point in points.values()})
    label = f"{method},\nT = {' and '.join(map(str, steps))}"
    label = label if method == "MaskGIT" else method.replace(", ", ",\n")
    return LineEnd(label, (last.num_tokens, last.seconds), _COLOURS[method], bold=method == "MaskGIT")


def _write_factors(axes: Axes, lines: dict[Method, dict[int, Timing]]) -> None:
    """How many times as long as MaskGIT the others take: two lines below theirs."""
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** _STRIP, high)  # room for them
    place = axes.get_xaxis_transform()
    for method, height in zip(_METHODS[1:], (0.02, 0.075), strict=True):
        for count, timing in lines[method].items():
            axes.text(
                count, height, f"{_factor(timing, lines)} x", transform=place, color=_COLOURS[method], fontsize=10.5,
                fontweight="bold", ha="center", va="bottom",
            )  # fmt: skip
    axes.text(0.012, 0.15, "times as long as MaskGIT", transform=axes.transAxes, color=_INK, fontsize=9, va="center")


def _factor(timing: Timing, lines: dict[Method, dict[int, Timing]]) -> str:
    """Its time over MaskGIT's, two digits."""
    factor = timing.seconds / lines["MaskGIT"][timing.num_tokens].seconds
    return f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"


def _finish(axes: Axes, timings: Sequence[Timing]) -> None:
    counts = sorted({timing.num_tokens for timing in timings})
    seconds = [timing.seconds for timing in timings]
    axes.set_xticks(counts, [f"{count}\n{math.isqrt(count)} x {math.isqrt(count)}" for count in counts])
    shown = [tick for tick in _TICKS if min(seconds) / 2 <= tick <= max(seconds) * 2]
    axes.set_yticks(shown, [f"{tick:g} s" if tick >= 1 else f"{1000 * tick:g} ms" for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel("tokens of an image, N")
    axes.set_ylabel("transformer, time of an image")
    first = timings[0]
    axes.set_title("Figure 4: one token after the other, against MaskGIT", fontsize=12, loc="left", pad=36)
    axes.annotate(
        f"{plain_label(first.network)}; batch 1, {plain_label(first.dtype)}\n"
        f"{plain_label(first.device)}, torch {plain_label(first.torch)}", (0, 1), (0, 5),
        xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_INK, va="bottom", linespacing=1.4,
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.06, y=0.1)


def as_markdown(timings: Sequence[Timing], command: str) -> str:
    """The points as a page: how they were measured, the figure's place, a table with the factors.

    Args:
        timings: As of ``measure``.
        command: What makes it again.
    """
    first, lines = timings[0], _by_method(timings)
    counts = sorted({timing.num_tokens for timing in timings})
    page = [
        "# Figure 4: sequential decoding against MaskGIT",
        "",
        f"    {printable(command, limit=None)}",
        "",
        "![time of an image against its number of tokens](figure-4.png)",
        "",
        *paragraph(
            "What an image takes the transformer, batch 1, without guidance and tokenizer: the median of n runs, which",
            "took turns. Both are the same network with random weights, under a causal mask or none; MaskGIT decodes",
            "by the cosine schedule, the most confident tokens first, and computes its first step too.",
            f"{markdown(first.network)}, {markdown(first.dtype)}, on {markdown(first.device)}, torch",
            f"{markdown(first.torch)}.",
        ),
        "",
        f"| N | T of MaskGIT | {' | '.join(_METHODS)} | KV cache / MaskGIT | no cache / MaskGIT |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        here = [lines[method][count] for method in _METHODS]
        cells = [f"{_seconds_text(timing)} (n = {timing.runs})" for timing in here]
        factors = [f"{_factor(timing, lines)}" for timing in here[1:]]
        page.append(f"| {' | '.join([str(count), str(here[0].num_steps), *cells, *factors])} |")
    largest = [_factor(lines[method][counts[-1]], lines) for method in _METHODS[1:]]
    said = paragraph(
        f"At N = {counts[-1]} a sequential image takes {largest[0]} times as long as MaskGIT's with a cache and",
        f"{largest[1]} times without. {_EXPLANATIONS.get(first.kind, _OTHER_DEVICE)}",
    )
    return "\n".join([*page, "", *said, ""])


def _seconds_text(timing: Timing) -> str:
    return f"{timing.seconds:.3g} s" if timing.seconds >= 1 else f"{1000 * timing.seconds:.3g} ms"
