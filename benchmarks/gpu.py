"""Measures training of both stages and decoding on a GPU: images per second, FLOPs per second and memory.

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
from itertools import product
from pathlib import Path
from statistics import median

import stage1_step
import stage2_step
import torch
from decode import build_ours
from measuring import DTYPES, Contender, count_work, format_table, measure
from peers import NUM_STEPS, Task
from torch.nn.attention import SDPBackend, sdpa_kernel

from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.devices import cpu_name

_RESULTS = Path(__file__).parents[1] / "results"
_BACKBONES = ("bert", "adaln")
_WARM_UP = 2  # rounds before that of ``measure``, in which torch also compiles


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


@dataclass(frozen=True)
class Timer:
    """Times functions on a device.

    Args:
        device: The device.
        repeats: Rounds after the warm-up.
    """

    device: torch.device
    repeats: int

    def __call__(self, run: Callable[[], object]) -> float:
        """Returns the median of the seconds of a function."""
        for _ in range(_WARM_UP):
            run()
        contender = Contender("", "", run)
        measure([contender], repeats=self.repeats, clock=self._read_clock)
        return median(contender.seconds)

    def _read_clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset_memory(self) -> None:
        """Starts a new measurement of the memory, without that of earlier networks."""
        gc.collect()  # a module refers to itself
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def row(self, batch: int, seconds: float) -> dict[str, str]:
        """Returns the columns of both tables; the memory is in 10^9 bytes, "-" without a GPU."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "batch": str(batch),
            "ms": f"{1000 * seconds:.1f}",
            "images/s": f"{batch / seconds:.1f}",
            "memory GB": "-" if peak is None else f"{peak / 1e9:.1f}",
        }


def measure_training(sizes: Sizes, timer: Timer) -> Iterator[dict[str, str]]:
    """Yields a row for a training step of each stage, backbone and precision."""
    for precision in DTYPES:
        yield _measure_step("1, tokenizer", partial(stage1_step.Ours, sizes.stage1, precision), timer)
        for backbone in _BACKBONES:
            make = partial(stage2_step.Ours, replace(sizes.stage2, backbone=backbone), precision)
            yield _measure_step(f"2, {backbone}", make, timer)


def _measure_step(name: str, make: Callable[[], stage1_step.Ours | stage2_step.Ours], timer: Timer) -> dict[str, str]:
    timer.reset_memory()
    torch.manual_seed(0)
    step = make()
    step.module.to(timer.device)
    if isinstance(step, stage1_step.Ours):  # stage 2 copies its batch in each step, as the Trainer does
        step.batch = StepDataModule().transfer_batch_to_device(step.batch, timer.device, 0)
    batch, seconds = len(step.batch.labels), timer(step)
    figures = timer.row(batch, seconds)
    with sdpa_kernel(SDPBackend.MATH):  # torch's formulas of the other kernels count the backward pass differently
        flops = count_work(step).flops
    work = {"GFLOP": f"{flops / 1e9:.4g}", "TFLOP/s": f"{flops / seconds / 1e12:.4g}"}
    return {"stage": name, "precision": step.precision, **figures, **work}


def measure_decoding(sizes: Sizes, timer: Timer) -> Iterator[dict[str, str]]:
    """Yields a row for each batch, backbone and precision."""
    for batch, backbone, (precision, dtype) in product(sizes.decoded, _BACKBONES, DTYPES.items()):
        timer.reset_memory()
        task = replace(sizes.stage2, batch=batch, backbone=backbone)
        torch.manual_seed(0)
        network = task.network.create().to(timer.device, dtype).eval()
        seconds = timer(torch.inference_mode()(build_ours(network, task, device=timer.device)))
        yield {"decoder": f"{backbone}, {precision}", **timer.row(batch, seconds)}


def describe(device: torch.device) -> str:
    """Returns what was measured, and with which versions."""
    if device.type != "cuda":
        machine = f"{cpu_name()}, torch {torch.__version__}."
        return f"{machine}\n\nWithout a GPU, the sizes are small. These figures only show that the script runs."
    major, minor = torch.cuda.get_device_capability(device)
    card = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), torch {torch.__version__}"
    return f"{card}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}."


def report(sizes: Sizes, device: torch.device, *, repeats: int) -> str:
    """Returns the page of results."""
    timer = Timer(device, repeats)
    return f"""\
# {torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}

{describe(device)}

Written by `make benchmark-gpu`; medians of {repeats} rounds. [On a GPU](../docs/gpu.md) describes it.

## Training

{format_table(list(measure_training(sizes, timer)))}

## Decoding of tokens in {NUM_STEPS} steps

{format_table(list(measure_decoding(sizes, timer)))}
"""


def file_of(device: torch.device) -> Path | None:
    """Returns the page of a card; None without a GPU, whose figures are not kept."""
    if device.type != "cuda":
        return None
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return _RESULTS / f"gpu-{'-'.join(word for word in words if word not in ('nvidia', 'geforce'))}.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the page and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default, help="device (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds after the warm-up (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (results/gpu-CARD.md; none on a CPU)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    page = report(RELEASED if device.type == "cuda" else SMALL, device, repeats=arguments.repeats)
    print(page)
    out = arguments.out or file_of(device)
    if out is None:
        print("no GPU was measured, and no page of results was written (--out FILE writes one)")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
