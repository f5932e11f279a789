"""Measures training of both stages and decoding on a GPU: images per second, FLOPs utilization and memory.

    python benchmarks/gpu.py --repeats 20                 # writes results/gpu-CARD.md
    python benchmarks/gpu.py --device cpu --out gpu.md    # small sizes, to check the script without a GPU

docs/gpu.md describes the table.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import stage1_step
import stage2_step
import torch
from decode import build_network_config
from measuring import DTYPES, Precision, count_work, format_table, read_cpu_name
from peers import Task
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.decoding import ConditionalModel, DecodingConfig, decode_classes
from maskgit_pl.networks.transformer import MaskedTransformer
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.gpus import find_gpu

_RESULTS = Path(__file__).parents[1] / "results"
_NAMES = {"fp32": "32-true", "bf16": "bf16-mixed"}
_STEPS = 8
_WARM_UP = 3  # rounds, in which torch also compiles


@dataclass(frozen=True)
class Sizes:
    """The networks and the batches.

    Args:
        stage1: Task of stage 1, with its batch.
        stage2: Task of stage 2, with its batch.
        decoded: Images that are decoded together.
    """

    stage1: stage1_step.Task
    stage2: Task
    decoded: tuple[int, ...] = (1, 8, 64)


RELEASED = Sizes(
    stage1_step.Task(batch=16, image_size=256, base_channels=128, discriminator=1.0),
    Task(batch=64, depth=24),
)
"""The released sizes: a tokenizer of 256 px images, and the transformer with 24 layers."""

SMALL = Sizes(
    stage1_step.Task(
        image_size=32, base_channels=8, channel_multipliers=(1, 2), num_groups=4, codebook_size=16, code_dim=4,
        discriminator=0.03, has_perceptual=False,
    ),
    Task(batch=4, depth=2, embed_dim=32, mlp_dim=64, num_heads=2, grid=(4, 4), codebook_size=16,
                     num_classes=3),
    (1, 2),
)  # fmt: skip
"""Sizes to check the script on a CPU."""


class Measurement:
    """Times functions on a device.

    Args:
        device: The device.
        repeats: Rounds after the warm-up.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, run: Callable[[], object]) -> float:
        """Returns the median of the seconds of a function."""
        for _ in range(_WARM_UP):
            run()
        seconds = []
        for _ in range(self.repeats):
            self._wait()
            begun = time.perf_counter()
            run()
            self._wait()
            seconds.append(time.perf_counter() - begun)
        return median(seconds)

    def reset_memory(self) -> None:
        """Starts a new measurement of the memory, without that of earlier networks."""
        gc.collect()  # a module refers to itself
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> str:
        """Returns the peak of the memory in 10^9 bytes; "-" without a GPU."""
        return f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f}" if self.device.type == "cuda" else "-"

    def utilization(self, flops: float, seconds: float, precision: Precision) -> str:
        """Returns FLOPs per second in percent of the card's listed peak; "-" for a card that is not listed."""
        gpu = find_gpu(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return "-" if gpu is None else f"{100 * flops / seconds / gpu.rate(_NAMES[precision]):.1f}"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_training(sizes: Sizes, measure: Measurement, *, compiled: bool) -> Iterator[dict[str, str]]:
    """Yields a row for a training step of each stage and precision; of stage 2 also compiled."""
    for precision in DTYPES:
        yield _measure_step("1, tokenizer", partial(stage1_step.Ours, sizes.stage1, precision), measure)
        make = partial(stage2_step.Ours, sizes.stage2, precision)
        yield (eager := _measure_step("2, transformer", make, measure))
        if compiled:  # its FLOPs cannot be counted; they are the same
            name = "2, transformer, compiled: step"
            yield _measure_step(name, partial(make, compiled="step"), measure, gflop=eager["GFLOP"])


def _measure_step(
    name: str,
    make: Callable[[], stage1_step.Ours | stage2_step.Ours],
    measure: Measurement,
    *,
    gflop: str | None = None,
) -> dict[str, str]:
    measure.reset_memory()
    torch.manual_seed(0)
    step = make()
    step.module.to(measure.device)
    if isinstance(step, stage1_step.Ours):  # stage 2 copies its batch in each step, as the Trainer does
        step.batch = StepDataModule().transfer_batch_to_device(step.batch, measure.device, 0)
    batch = len(step.batch.labels)
    seconds, memory = measure(step), measure.memory()
    if gflop is None:
        with sdpa_kernel(SDPBackend.MATH):  # torch's formulas of the other kernels count the backward pass differently
            gflop = f"{count_work(step).flops / 1e9:.4g}"
    return {
        "stage": name,
        "precision": step.precision,
        "batch": str(batch),
        "ms": f"{1000 * seconds:.1f}",
        "images/s": f"{batch / seconds:.1f}",
        "GFLOP": gflop,
        "MFU %": measure.utilization(1e9 * float(gflop), seconds, step.precision),
        "memory GB": memory,
    }


def our_decoder(task: Task, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a function that decodes a batch in 8 steps."""
    torch.manual_seed(0)
    network = MaskedTransformer(build_network_config(task)).to(device, dtype).eval()
    config = DecodingConfig(_STEPS)
    decoder, model = (
        config.build_decoder(mask_schedules.build("cosine")),
        ConditionalModel.from_network(network, device),
    )
    labels, seeds = [number % task.num_classes for number in range(task.batch)], list(range(task.batch))

    @torch.inference_mode()
    def decode() -> Tensor:
        *_, last = decode_classes(model, labels, seeds, decoder=decoder, scales=config.scales())
        return last.tokens

    return decode


def measure_decoding(sizes: Sizes, measure: Measurement) -> Iterator[dict[str, str]]:
    """Yields a row for each precision and batch."""
    for batch in sizes.decoded:
        for precision, dtype in DTYPES.items():
            measure.reset_memory()
            seconds = measure(our_decoder(replace(sizes.stage2, batch=batch), measure.device, dtype))
            yield {
                "decoder": f"ours, {precision}",
                "batch": str(batch),
                "ms": f"{1000 * seconds:.1f}",
                "images/s": f"{batch / seconds:.1f}",
                "memory GB": measure.memory(),
            }


def describe(device: torch.device) -> list[str]:
    """Returns the lines that say what was measured, and with which versions."""
    if device.type != "cuda":
        return [
            f"{read_cpu_name()}, torch {torch.__version__}.",
            "",
            "Without a GPU, the sizes are small. These figures only show that the script runs.",
        ]
    major, minor = torch.cuda.get_device_capability(device)
    return [
        f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}.",
    ]


def report(sizes: Sizes, device: torch.device, *, repeats: int) -> str:
    """Returns the page of results."""
    measure = Measurement(device, repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    training = list(measure_training(sizes, measure, compiled=device.type == "cuda"))
    return "\n".join(
        [
            f"# {name}",
            "",
            *describe(device),
            "",
            f"Written by `make benchmark-gpu`; medians of {repeats} rounds. [On a GPU](../docs/gpu.md) describes it.",
            "",
            "## Training",
            "",
            format_table(training),
            "",
            f"## Decoding of tokens in {_STEPS} steps",
            "",
            format_table(list(measure_decoding(sizes, measure))),
            "",
        ]
    )


def file_of(device: torch.device) -> Path | None:
    """Returns the page of a card; None without a GPU, whose figures are not kept."""
    if device.type != "cuda":
        return None
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return _RESULTS / f"gpu-{'-'.join(word for word in words if word not in ('nvidia', 'geforce'))}.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the page and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=found, help="device (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds after the warm-up (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (results/gpu-CARD.md; none on a CPU)")
    given = parser.parse_args(argv)
    if given.repeats < 1:
        parser.error(f"--repeats must be an integer >= 1, got {given.repeats}")
    if given.device == "cuda" and found == "cpu":
        parser.error("--device cuda: torch finds no GPU here")
    device = torch.device(given.device)
    page, out = report(RELEASED if device.type == "cuda" else SMALL, device, repeats=given.repeats), given.out
    print(page)
    out = file_of(device) if out is None else out
    if out is None:
        print("no GPU was measured, and no page of results was written (--out FILE writes one)")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
