"""Compares the speed of two checkouts of this project: is NEW slower than OLD?

    make benchmark NAME=checkouts ARGS="OLD NEW"

Both run the same tasks on one core, in turn: OLD NEW, NEW OLD, ... All figures are CPU seconds, which other programs
affect less than wall time. benchmarks/README.md describes the tasks and the verdict.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median

import numpy as np
from measuring import children_cpu_seconds, format_table
from PIL import Image

from maskgit_pl.devices import cpu_name

LIMIT = 1.03
"""A median ratio up to this one is not slower."""

_CONFIDENCE = 0.95
_RECIPE = ["--data", "digits", "--recipe", "adaln"]
_SHORT = ["--trainer.log_every_n_steps", "10", "--data.validation_samples", "20"]
_DEMO = ["--short", "--images", "digit-files", "--data", "demo-data", "--runs-folder", "demo-runs"]

# Runs a ``maskgit`` command and reports the mean of its training steps, with loading and logging, after the first five.
_STEPS = """
import runpy, time
from torch.optim.optimizer import register_optimizer_step_post_hook
moments = []
register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
try:
    runpy.run_module("maskgit_pl", run_name="__main__", alter_sys=True)
finally:
    print("\\nCPU seconds:", (moments[-1] - moments[4]) / (len(moments) - 5))
"""
# Generates images in batches, the first of which is not counted. Arguments: batch size, number of batches.
_DECODE = """
import sys, time
from maskgit_pl import MaskGIT
size, batches = map(int, sys.argv[1:])
model = MaskGIT.from_pretrained("fashion-mnist-demo")
for number in range(batches + 1):
    model.generate([label % 10 for label in range(size)], seed=number)
    start = start if number else time.process_time()
print("CPU seconds:", (time.process_time() - start) / (size * batches))
"""
# Reads epochs of training batches, the first of which is not counted. Arguments: source, number of epochs.
_READ = """
import sys, time
from maskgit_pl.data import ShardData, ShardDataConfig
configs = {
    "images": dict(path="photos", image_size=256, global_batch=32),
    "tokens": dict(path="digits", image_size=28, in_channels=1, global_batch=32, token_store="runs/base/tokens"),
}
source, epochs, count = sys.argv[1], int(sys.argv[2]), 0
data = ShardData(ShardDataConfig(source=source, **configs[source]))
data.setup()
for epoch in range(epochs + 1):
    for batch in data.train_dataloader():
        count += len(batch[0]) if epoch else 0
    start = start if epoch else time.process_time()
print("CPU seconds:", (time.process_time() - start) / count)
"""


@dataclass(frozen=True)
class Side:
    """A checkout that takes part.

    Args:
        name: ``"OLD"`` or ``"NEW"``.
        checkout: Its folder.
        folder: Folder in which its commands run.
    """

    name: str
    checkout: Path
    folder: Path

    def run(self, *words: str) -> str:
        """Runs its Python with arguments and returns what it prints."""
        python = self.checkout / ".venv" / "bin" / "python"
        command = [str(python) if python.exists() else sys.executable, *words]
        environment = {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, **environment}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: exit code {done.returncode} of {command}\n{done.stderr[-3000:]}")
        return done.stdout

    def run_maskgit(self, *words: str) -> float:
        """Runs a ``maskgit`` command and returns the CPU seconds of its process and of all processes below it."""
        before = children_cpu_seconds()
        self.run("-m", "maskgit_pl", *words)
        return children_cpu_seconds() - before

    def measure(self, program: str, *words: str) -> float:
        """Runs a program of this file and returns the CPU seconds that it reports, without its start and imports."""
        return float(self.run("-c", program, *words).rpartition("CPU seconds:")[2])

    def train(self, stage: str, run: str, *, steps: int) -> float:
        """Returns the CPU seconds of a training step."""
        length = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
        shutil.rmtree(self.folder / "runs" / run / stage, ignore_errors=True)  # not resumed
        return self.measure(_STEPS, "train", stage, *_RECIPE, *_SHORT, *length, "--run", run)

    def prepare(self, tasks: Sequence[str]) -> None:
        """Makes what the tasks need; this also fills the caches of the system."""
        self.folder.mkdir()
        write_images(self.folder / "digit-files", "png", (28, 28), "L", classes=10, each=100)
        write_images(self.folder / "photo-files", "jpg", (500, 375), "RGB", classes=4, each=20)
        for name in ("digit", "photo"):
            self.run_maskgit("data", "make", f"{name}-files", "--out", f"{name}s", "--num-workers", "1")
        self.train("tokenizer", "base", steps=10)
        self.run_maskgit("tokenize", *_RECIPE, "--run", "base")
        if "demo" in tasks:  # trains the classifier, which the later ones find: it would be most of their time
            run_demo(self)


def write_images(folder: Path, suffix: str, size: tuple[int, int], mode: str, *, classes: int, each: int) -> None:
    """Writes smooth random pictures with a little noise, one folder per class."""
    generator = np.random.default_rng(0)
    for number in range(classes * each):
        coarse = generator.integers(256, size=(4, 4, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        pixels = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"class-{number % classes}" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path, quality=90)


def run_demo(side: Side) -> float:
    """Returns the CPU seconds of a short demo, which finds nothing of an earlier one but the classifier."""
    for name in ("demo-data", "demo-runs/demo-short", "demo-runs/tokens"):
        shutil.rmtree(side.folder / name, ignore_errors=True)
    return side.run_maskgit("demo", *_DEMO, "--data.global_batch", "16")


TASKS: Mapping[str, Callable[[Side], float]] = {
    "demo": run_demo,
    "stage1-step": lambda side: side.train("tokenizer", "stage1", steps=100),
    "stage2-step": lambda side: side.train("transformer", "base", steps=20),
    "decode-1": lambda side: side.measure(_DECODE, "1", "80"),
    "decode-50": lambda side: side.measure(_DECODE, "50", "3"),
    "read-jpeg": lambda side: side.measure(_READ, "images", "30"),
    "read-tokens": lambda side: side.measure(_READ, "tokens", "1000"),
}
"""Functions that run a task once and return CPU seconds."""


def compare(sides: Sequence[Side], tasks: Sequence[str], *, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Runs tasks on both sides in turn; the side that begins changes from round to round.

    Returns:
        For each task the CPU seconds of OLD and of NEW, one of each per round.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in tasks}
    for number in range(rounds):
        for name, both in seconds.items():
            for index in (0, 1) if number % 2 == 0 else (1, 0):
                both[index].append(TASKS[name](sides[index]))
        ratios = ", ".join(f"{name} {new[-1] / old[-1]:.3f}" for name, (old, new) in seconds.items())
        print(f"round {number + 1}: {ratios}", flush=True)
    return seconds


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns a distribution-free interval of the median.

    The k-th smallest and the k-th largest of n values enclose it with probability ``1 - 2 sum_{i<k} C(n, i) / 2^n``.
    Takes the largest k for which this is at least 95 %, and k = 1 for fewer than 6 values.
    """
    count, k = len(values), 1
    while 1 - 2 * sum(comb(count, i) for i in range(k + 1)) / 2**count >= _CONFIDENCE:
        k += 1
    return sorted(values)[k - 1], sorted(values)[-k]


def is_slower(ratios: Sequence[float]) -> bool:
    """Returns True if the median of NEW / OLD is above ``LIMIT`` and its interval does not contain 1."""
    low, high = median_interval(ratios)
    return median(ratios) > LIMIT and not low <= 1 <= high


def format_row(name: str, old: Sequence[float], new: Sequence[float]) -> dict[str, str]:
    """Returns the row of a task."""
    ratios = [after / before for before, after in zip(old, new, strict=True)]
    low, high = median_interval(ratios)
    return {
        "task": name,
        "OLD, CPU ms": f"{1000 * median(old):.5g}",
        "NEW, CPU ms": f"{1000 * median(new):.5g}",
        "NEW / OLD": f"{median(ratios):.3f}",
        "interval": f"{low:.3f} to {high:.3f}",
        "verdict": "SLOWER" if is_slower(ratios) else "not slower",
    }


def describe(checkout: Path) -> str:
    """Returns the commit of a checkout, with "-dirty" if files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown commit"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns 1 if a task is slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout to compare with")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout that must not be slower")
    parser.add_argument("--rounds", type=int, default=9, help="at least 8 for a verdict (%(default)s)")
    listed = f"tasks, of {', '.join(TASKS)} (all)"
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=listed)
    args = parser.parse_args(argv)
    for checkout in (args.old, args.new):
        if not (checkout / "maskgit_pl").is_dir():
            parser.error(f"OLD and NEW must be folders with a folder maskgit_pl, got {checkout}")
    machine = f"{cpu_name()}, 1 thread of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}, {args.rounds} rounds"
    commits = f"OLD {describe(args.old)}, NEW {describe(args.new)}"
    print(f"{machine}, {commits}, {datetime.datetime.now():%F %R}", flush=True)
    with tempfile.TemporaryDirectory() as made:
        sides = [Side(name, getattr(args, name.lower()).resolve(), Path(made, name)) for name in ("OLD", "NEW")]
        for side in sides:
            side.prepare(args.only)
        seconds = compare(sides, args.only, rounds=args.rounds)
    rows = [format_row(name, old, new) for name, (old, new) in seconds.items()]
    print("\n" + format_table(rows))
    return int(any(row["verdict"] == "SLOWER" for row in rows))


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # both sides on the same core: cores may differ
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sys.exit(main())
